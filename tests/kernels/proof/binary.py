"""What a compiled kernel is made of, read from its machine code: registers, spills, loads and matrix instructions.

Reads SASS with the tools in Triton's wheel and AMD's assembly as text; knows neither Triton's compiler nor kernels.
"""

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import triton
from triton import knobs

from tests.kernels.proof.compiler import Compiled

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# How a load by a descriptor counts: whatever its size, one instruction of one thread brings a whole block.
BLOCK_LOAD_BITS = 1024
NVIDIA_MATRIX = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
AMD_LOAD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}


class Listing(msgspec.Struct, frozen=True):
    """One kernel's machine code in numbers."""

    registers: int
    warp_size: int
    spilled: int  # bytes of a thread's stack, or registers that are written to memory
    # Bits of a global load → how many such instructions; in loops alone, if any loop loads.
    loads: dict[int, int]
    loads_in_loop: bool
    matrix: dict[str, int]  # matrix instructions by name

    @property
    def vector_share(self) -> float:
        """The part of loaded bytes that comes 512 at a time: 16 bytes a thread, 8 where a warp has 64 threads."""
        total = sum(bits * count for bits, count in self.loads.items())
        wide = sum(bits * count for bits, count in self.loads.items() if bits * self.warp_size >= 8 * 512)
        return wide / total if total else 1.0


@dataclass(frozen=True)
class Line:
    """One instruction, or a label in front of one."""

    name: str
    operands: str
    label: str = ""


def listing(compiled: Compiled) -> Listing:
    """Read it, or remember what was read from the same code with the same reader (kept beside Triton's cache)."""
    key = hashlib.sha256(compiled.code + Path(__file__).read_bytes()).hexdigest()
    kept = Path(knobs.cache.dir) / "llmd-listings" / f"{key}.json"
    if kept.exists():
        return msgspec.json.decode(kept.read_bytes(), type=Listing)
    found = _nvidia(compiled.code) if compiled.arch.startswith("sm_") else _amd(compiled.code.decode())
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        file.write(msgspec.json.encode(found))
    Path(file.name).replace(kept)
    return found


def _nvidia(cubin: bytes) -> Listing:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = _nvidia_lines(sass)
    spilled = resources["STACK"] + resources["LOCAL"] + 4 * sum(line.name.startswith(("LDL", "STL")) for line in lines)
    loads, in_loop = _loads([(line, _nvidia_load_bits(line.name)) for line in lines], _loops(lines, "BRA"))
    matrix = Counter(line.name.split(".")[0] for line in lines if line.name.startswith(NVIDIA_MATRIX))
    return Listing(resources["REG"], 32, spilled, loads, in_loop, dict(matrix))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _nvidia_lines(sass: str) -> list[Line]:
    lines = []
    for text in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", text):
            lines.append(Line("", "", label[1]))
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)(.*)", text):
            lines.append(Line(instruction[1], instruction[2]))
    return lines


def _nvidia_load_bits(name: str) -> int:
    """LDG.E.LTC128B.128 is a load of 128 bits with a hint; without a size it has 32. 0: not a global load."""
    parts = name.split(".")
    if parts[0] == "UTMALDG":
        return BLOCK_LOAD_BITS
    if parts[0] not in ("LDG", "LDGSTS"):
        return 0
    sizes = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((sizes[part] for part in parts if part in sizes), 32)


def _amd(assembly: str) -> Listing:
    numbers = {
        name: int(number)
        for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    lines = []
    for text in assembly.splitlines():
        if label := re.match(r"(\.LBB\d+_\d+):", text):
            lines.append(Line("", "", label[1]))
        elif instruction := re.match(r"\s+([a-z]\w+)(.*)", text):
            lines.append(Line(instruction[1], instruction[2]))
    # Scalar registers spill into lanes of a vector register, which costs no memory.
    spilled = numbers["private_segment_fixed_size"] + 4 * numbers["vgpr_spill_count"]
    loads, in_loop = _loads(
        [(line, _amd_load_bits(line.name)) for line in lines], _loops(lines, "s_cbranch", "s_branch")
    )
    matrix = Counter(line.name for line in lines if line.name.startswith("v_mfma"))
    return Listing(numbers["vgpr_count"], 64, spilled, loads, in_loop, dict(matrix))


def _amd_load_bits(name: str) -> int:
    size = re.match(r"(?:global|buffer|flat)_load_(?:lds_)?(dwordx\d|dword|ushort|short|ubyte)", name)
    return AMD_LOAD_BITS[size[1]] if size else 0


def _loops(lines: Sequence[Line], *branches: str) -> list[range]:
    """Where a branch leads back to a label before it."""
    places = {line.label: place for place, line in enumerate(lines) if line.label}
    loops = []
    for place, line in enumerate(lines):
        if line.name.startswith(branches) and (target := re.search(r"\.L(?:_x_|BB)[\d_]+", line.operands)):
            start = places.get(target[0], place)
            if start < place:
                loops.append(range(start, place))
    return loops


def _loads(lines: Sequence[tuple[Line, int]], loops: Sequence[range]) -> tuple[dict[int, int], bool]:
    inside = Counter(bits for place, (_, bits) in enumerate(lines) if bits and any(place in loop for loop in loops))
    everywhere = Counter(bits for _, bits in lines if bits)
    return dict(inside or everywhere), bool(inside)
