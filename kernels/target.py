"""What Triton compiles for now, and the options of a launch that only some compilers need or know."""

from triton.language.target_info import current_target

from llmd_kernels.kinds import kind_of


def target_kind() -> str | None:
    """ "sm_90", "gfx942"; None where kernels are interpreted."""
    target = current_target()
    if target is None:
        return None
    return str(target.arch) if target.backend == "hip" else kind_of(f"sm_{target.arch}")


def is_nvidia(kind: str | None) -> bool:
    return kind is not None and kind.startswith("sm_")


def at_most(num_registers: int) -> dict[str, int]:
    """How many registers a thread may have, where ptxas must be told; AMD's compiler has no such option.

    By itself ptxas spills a number or two to bring a thread's registers below the next bound at which another program
    fits on a multiprocessor, whether or not shared memory or the grid allow that program.
    """
    return {"maxnreg": num_registers} if is_nvidia(target_kind()) else {}


def of_one_depth() -> dict[str, int]:
    """Has AMD's compiler take matrix instructions that sum 16 numbers of K, whatever the tile.

    By itself it takes such that sum 8 for wide tiles, and so a row's last bits would depend on the number of rows.
    NVIDIA's have one depth.
    """
    kind = target_kind()
    return {"matrix_instr_nonkdim": 16} if kind is not None and not is_nvidia(kind) else {}
