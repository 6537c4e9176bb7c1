"""How many registers a thread may have, where ptxas must be told.

By itself it spills a number or two to bring a thread's registers below the next bound at which another program fits on
a multiprocessor, whether or not shared memory or the grid allow that program.
"""

from triton.language.target_info import current_target


def at_most(num_registers: int) -> dict[str, int]:
    """The launch option that says so on NVIDIA's GPUs; AMD's compiler has none."""
    target = current_target()
    return {"maxnreg": num_registers} if target is not None and target.backend == "cuda" else {}
