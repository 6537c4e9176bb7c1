"""Which matrix instruction a launch uses, where the compiler must be told."""

from triton.language.target_info import current_target


def of_one_depth() -> dict[str, int]:
    """The launch option that has AMD's compiler take instructions which sum 16 numbers of K, whatever the tile.

    By itself it takes such that sum 8 for wide tiles, and so a row's last bits would depend on the number of rows.
    NVIDIA's have one depth.
    """
    target = current_target()
    return {"matrix_instr_nonkdim": 16} if target is not None and target.backend == "hip" else {}
