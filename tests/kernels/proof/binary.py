"""What a compiled kernel is made of, read from its machine code: registers, spills, loads and matrix instructions.

Reads SASS with the tools in Triton's wheel and AMD's assembly as text; knows neither Triton's compiler nor kernels.
"""

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence, Set
from pathlib import Path

import msgspec
import triton
from triton import knobs

from tests.kernels.proof import control_flow
from tests.kernels.proof.compiler import Compiled
from tests.kernels.proof.control_flow import Instruction, in_loops

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# How a load by a descriptor counts: whatever its size, one instruction of one thread brings a whole block.
BLOCK_LOAD_BITS = 1024
NVIDIA_MATRIX = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
AMD_LOAD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}
AMD_FILE = r'\.file\s+(\d+) "(.+)" "(.+)"'


class Listing(msgspec.Struct, frozen=True):
    """One kernel's machine code in numbers."""

    registers: int
    warp_size: int
    spilled: int  # bytes of a thread's stack, or registers that are written to memory
    # Bits of a global load → how many such instructions; in loops alone, if any loop loads. Without those of single
    # numbers, which all threads of a program load from one address.
    loads: dict[int, int]
    loads_in_loop: bool
    matrix: dict[str, int]  # matrix instructions by name

    @property
    def vector_share(self) -> float:
        """The part of loaded bytes that comes 512 at a time: 16 bytes a thread, 8 where a warp has 64 threads."""
        total = sum(bits * count for bits, count in self.loads.items())
        wide = sum(bits * count for bits, count in self.loads.items() if bits * self.warp_size >= 8 * 512)
        return wide / total if total else 1.0


def listing(compiled: Compiled) -> Listing:
    """Read it, or remember what was read from the same code with the same reader (kept beside Triton's cache)."""
    readers = b"".join(Path(str(file)).read_bytes() for file in (__file__, control_flow.__file__))
    key = hashlib.sha256(compiled.code + repr(sorted(compiled.single_loads)).encode() + readers).hexdigest()
    kept = Path(knobs.cache.dir) / "llmd-listings" / f"{key}.json"
    if kept.exists():
        return msgspec.json.decode(kept.read_bytes(), type=Listing)
    found = _nvidia(compiled) if compiled.arch.startswith("sm_") else _amd(compiled)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        file.write(msgspec.json.encode(found))
    Path(file.name).replace(kept)
    return found


def _nvidia(compiled: Compiled) -> Listing:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.code)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "--print-code", "--print-line-info", file.name)
    resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = _nvidia_code(sass)
    spilled = resources["STACK"] + resources["LOCAL"] + 4 * sum(line.name.startswith(("LDL", "STL")) for line in code)
    loads, in_loop = _loads(code, _nvidia_load_bits, compiled.single_loads)
    matrix = Counter(line.name.split(".")[0] for line in code if line.name.startswith(NVIDIA_MATRIX))
    return Listing(resources["REG"], 32, spilled, loads, in_loop, dict(matrix))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _nvidia_code(sass: str) -> list[Instruction]:
    code, label, source = [], "", ""
    for text in sass.splitlines():
        if place := re.match(r'\s*//## File "(.+?)", line (\d+)', text):
            source = f"{place[1]}:{place[2]}"
        elif named := re.match(r"(\.L_x_\d+):", text):
            label = named[1]
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]+)(.*)", text):
            guard, name, operands = found.groups()
            target = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
            # A branch may also depend on a predicate among its operands.
            is_certain = guard is None and not re.search(r"\bU?P\w+|~?URZ?\b", operands)
            goes_on = not (is_certain and name.startswith(("BRA", "EXIT", "RET")))
            code.append(Instruction(name, label, target[0] if target else "", goes_on, source))
            label = ""
    return code


def _nvidia_load_bits(name: str) -> int:
    """LDG.E.LTC128B.128 is a load of 128 bits with a hint; without a size it has 32. 0: not a global load."""
    parts = name.split(".")
    if parts[0] == "UTMALDG":
        return BLOCK_LOAD_BITS
    if parts[0] not in ("LDG", "LDGSTS"):
        return 0
    sizes = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((sizes[part] for part in parts if part in sizes), 32)


def _amd(compiled: Compiled) -> Listing:
    assembly = compiled.code.decode()
    numbers = {
        name: int(number)
        for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    code = _amd_code(assembly)
    # Scalar registers spill into lanes of a vector register, which costs no memory.
    spilled = numbers["private_segment_fixed_size"] + 4 * numbers["vgpr_spill_count"]
    loads, in_loop = _loads(code, _amd_load_bits, compiled.single_loads)
    matrix = Counter(line.name for line in code if line.name.startswith("v_mfma"))
    return Listing(numbers["vgpr_count"], 64, spilled, loads, in_loop, dict(matrix))


def _amd_code(assembly: str) -> list[Instruction]:
    code, label, source = [], "", ""
    files = {number: f"{folder}/{name}" for number, folder, name in re.findall(AMD_FILE, assembly)}
    for text in assembly.splitlines():
        if place := re.match(r"\s+\.loc\s+(\d+) (\d+)", text):
            source = f"{files[place[1]]}:{place[2]}"
        elif named := re.match(r"(\.LBB\d+_\d+):", text):
            label = named[1]
        elif found := re.match(r"\s+([a-z]\w+)(.*)", text):
            name, operands = found.groups()
            target = re.search(r"\.LBB\d+_\d+", operands) if name.startswith(("s_branch", "s_cbranch")) else None
            goes_on = not name.startswith(("s_branch", "s_endpgm"))
            code.append(Instruction(name, label, target[0] if target else "", goes_on, source))
            label = ""
    return code


def _amd_load_bits(name: str) -> int:
    size = re.match(r"(?:global|buffer|flat)_load_(?:lds_)?(dwordx\d|dword|ushort|short|ubyte)", name)
    return AMD_LOAD_BITS[size[1]] if size else 0


def _loads(
    code: Sequence[Instruction], bits_of: Callable[[str], int], single_loads: Set[str]
) -> tuple[dict[int, int], bool]:
    inside: Counter[int] = Counter()
    everywhere: Counter[int] = Counter()
    for instruction, is_in_loop in zip(code, in_loops(code), strict=True):
        bits = bits_of(instruction.name)
        if bits and instruction.source not in single_loads:
            everywhere[bits] += 1
            inside[bits] += is_in_loop
    return dict(+inside or everywhere), bool(+inside)
