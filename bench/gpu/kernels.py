"""Stage 3: every kernel at the sizes of Llama-3.1-8B, as a fraction of what the device can do, beside others' kernels."""

from pathlib import Path

from bench.gpu import device, results
from bench.gpu.machine import Call, Machine
from bench.gpu.results import Recorder, Value, Values, path_of
from bench.gpu.subject import Subject
from bench.gpu.subjects import attention, dense
from bench.gpu.timing import Timing, microseconds, num_input_sets, time_calls

OURS = "llmd"


def measure(machine: Machine, recorder: Recorder, folder: Path) -> None:
    peaks = read_peaks(folder)
    with machine.running():
        for subject in (*dense.subjects(machine), *attention.subjects(machine)):
            recorder.row(subject.name, lambda subject=subject: _measure(machine, subject, peaks))


def read_peaks(folder: Path) -> tuple[float, float] | None:
    """(bytes, operations) a second that the first stage saw on this device; None without it."""
    path = path_of(folder, "device")
    if not path.exists():
        return None
    rows = {row.name: row.values for row in results.read(path).rows if row.error is None}
    if device.COPY not in rows or device.MATRIX not in rows:
        return None
    return float(rows[device.COPY]["GB/s"] or 0) * 1e9, float(rows[device.MATRIX]["TFLOP/s"] or 0) * 1e12


def _measure(machine: Machine, subject: Subject, peaks: tuple[float, float] | None) -> Values:
    """All implementations on the same inputs, one after the other. A peer that fails is named, and no failure of ours."""
    sets = [subject.make(seed) for seed in range(num_input_sets(machine, subject.bytes_moved))]
    ours = time_calls(machine, [calls[OURS] for calls in sets])
    values = {"us": microseconds(ours), "timing": ours.how, "spread": round(ours.spread, 3), **_rates(subject, ours)}
    if peaks is not None:
        limit = max(subject.bytes_moved / peaks[0], subject.operations / peaks[1])
        values |= {"limit us": limit * 1e6, "of limit": limit / ours.seconds}
    for peer in [name for name in sets[0] if name != OURS]:
        values |= _peer(machine, peer, [calls[peer] for calls in sets])
    return values


def _rates(subject: Subject, timing: Timing) -> dict[str, Value]:
    return {
        "GB/s": subject.bytes_moved / timing.seconds / 1e9,
        "TFLOP/s": subject.operations / timing.seconds / 1e12,
    }


def _peer(machine: Machine, name: str, calls: list[Call]) -> dict[str, Value]:
    try:
        return {f"{name} us": microseconds(time_calls(machine, calls))}
    except Exception as error:
        return {f"{name} us": None, f"{name} error": f"{type(error).__name__}: {error}"[:300]}
