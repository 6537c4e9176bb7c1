"""The kinds of devices for which tiles are chosen, and proven by compiling. Imports neither Triton nor torch."""

# GPUs that differ from another in nothing that a tile is about, and have no less shared memory.
NEXT_OF_KIN = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120"}

# Those for which Triton has float8_e4m3fn.
WITH_FLOAT8 = ("sm_89", "sm_90", "sm_100", "sm_120")


def kind_of(arch: str) -> str:
    """arch: "sm_90", "gfx942"."""
    return NEXT_OF_KIN.get(arch, arch)
