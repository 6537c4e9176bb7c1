"""How `quantized_linear` is tiled on each kind of device: as `linear`, where unpacking leaves room for that."""

from llmd_kernels.linear import triton_ops as plain
from llmd_kernels.target import at_most, is_nvidia, target_kind

# Kinds whose programs have 99 KiB of shared memory.
SMALL_SHARED = ("sm_86", "sm_89", "sm_120")
# Those whose matrix instructions run beside the threads (wgmma, tcgen05), which so keep registers for unpacking.
ASYNCHRONOUS_MATRIX = ("sm_90", "sm_100")


def tile(num_tokens: int, scale_inputs: int, kind_of_weight: str) -> tuple[int, int, int, int]:
    """(outputs and tokens of a program, warps, stages of its pipeline). No bit depends on them.

    kind_of_weight: "int4", "int8", "float8", "float8_bits" or "float4".
    """
    kind = target_kind()
    if kind is not None and not is_nvidia(kind):
        # Deeper pipelines do not compile where weights are computed with before they are multiplied; more tokens spill.
        outputs, tokens, num_warps, _ = plain.tile(min(num_tokens, 64))
        return outputs, tokens, num_warps, 2
    outputs, tokens, num_warps, num_stages = plain.tile(num_tokens)
    if outputs == 128 and kind is not None and kind not in ASYNCHRONOUS_MATRIX:
        # Two scales a turn and row: more rows spill.
        if scale_inputs == plain.BLOCK_K:
            return 64, tokens, 4, 3
        if kind_of_weight == "float4":
            return 64, min(tokens, 64), 4, 3
        # int8 needs 113 KiB with three.
        num_stages = 2 if kind in SMALL_SHARED else 3
    return outputs, tokens, num_warps, min(num_stages, 4)


def registers(num_tokens: int, kind_of_weight: str) -> dict[str, int]:
    """Shared memory allows no more programs than these do. On Hopper none spills."""
    return {} if target_kind() == "sm_90" else at_most(128 if num_tokens <= 64 and kind_of_weight != "float4" else 255)
