"""The machine that a stage measures: a GPU, or what stands for one in a rehearsal."""

from bench.gpu.machine import Gpu, Machine


def choose_machine(*, rehearsal: bool) -> Machine:
    if rehearsal:
        # Brings Triton's interpreter with it.
        from bench.gpu.rehearsal import Rehearsal

        return Rehearsal()
    return Gpu()
