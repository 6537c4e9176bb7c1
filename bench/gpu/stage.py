"""`python -m bench.gpu.stage NAME FOLDER ORIGIN`: one stage in a process of its own, as `running` starts it."""

import argparse
import json
import os
import time
from pathlib import Path

from bench.gpu.packages import check_packages
from bench.gpu.results import Origin, Recorder

NAMES = ("device", "correctness", "kernels", "steps", "server", "sweep")

# Seconds of a row on a GPU in this process.
_ROW_LIMIT = 40.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("origin", help="as JSON; one of a rehearsal makes this one")
    parser.add_argument("--go-on", action="store_true", help="behind the last row, also if that has failed")
    options = parser.parse_args()
    origin = Origin(**json.loads(options.origin))
    is_here = options.name != "server" and not origin.rehearsal
    recorder = Recorder(
        options.folder,
        options.name,
        origin,
        goes_on=options.go_on,
        is_usable=_is_gpu_usable if is_here else lambda: True,
        limit=_ROW_LIMIT if is_here else None,
    )
    # Each imports what it needs and no more: torch takes seconds, and the server's stage leaves the GPU to the server.
    if options.name == "server":
        from bench.gpu import server

        server.measure(recorder, rehearsal=origin.rehearsal)
    elif options.name == "device":
        _measure_device(recorder, rehearsal=origin.rehearsal)
    else:
        _measure_here(options.name, recorder, options.folder, rehearsal=origin.rehearsal)
    recorder.finish()


def _is_gpu_usable() -> bool:
    """After an access to memory that is none, or a failed assertion, every call of CUDA fails in this process."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _measure_device(recorder: Recorder, *, rehearsal: bool) -> None:
    """This process has just begun: what it takes to have torch and a context is what every process pays."""
    started = time.perf_counter()
    import torch

    torch_import = time.perf_counter() - started
    from bench.gpu import device
    from bench.gpu.choice import choose_machine

    started = time.perf_counter()
    machine = choose_machine(rehearsal=rehearsal)
    torch.zeros(1, device=machine.device)
    machine.synchronize()
    context = time.perf_counter() - started
    device.measure(machine, recorder, torch_import=torch_import, context=context)


def _measure_here(name: str, recorder: Recorder, folder: Path, *, rehearsal: bool) -> None:
    # Everything that the pool's processes need is imported before they are forked, and no GPU touched.
    from bench.gpu import correctness, kernels, sweep
    from bench.gpu.choice import choose_machine
    from bench.gpu.compiling import compile_pool

    if name == "steps":
        # Needs what the server needs, which the kernels do not.
        check_packages()
        from bench.gpu import steps

    with compile_pool(1 if rehearsal else os.cpu_count() or 1) as pool:
        machine = choose_machine(rehearsal=rehearsal)
        match name:
            case "correctness":
                correctness.measure(machine, recorder, pool)
            case "kernels":
                kernels.measure(machine, recorder, pool, folder)
            case "steps":
                steps.measure(machine, recorder, pool, folder)
            case "sweep":
                sweep.measure(machine, recorder, pool, folder)


if __name__ == "__main__":
    main()
