"""What llmd wants to reach on one H100, beside what others do and what is possible; and where a figure is found.

Best-known figures and goals are of Llama-3.1-8B in bfloat16; their sources are in docs/performance.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.gpu.limits import Limits
from bench.gpu.results import Value, Values
from bench.gpu.sizes import WHOLE

# stage → row → values: all that has been measured.
Measured = Mapping[str, Mapping[str, Values]]
LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Goal:
    """One line. `measured` gives its cell, or None where the rows it needs are not there."""

    name: str
    known: str
    goal: str
    limit: str
    measured: Callable[[Measured], str | None] = lambda _: None


def value(measured: Measured, stage: str, row: str, name: str) -> Value:
    return measured.get(stage, {}).get(row, {}).get(name)


def one(stage: str, row: str, name: str, unit: str) -> Callable[[Measured], str | None]:
    """One value of one row."""

    def cell(measured: Measured) -> str | None:
        found = value(measured, stage, row, name)
        return None if found is None else f"{shown(float(found))} {unit}"

    return cell


def several(stage: str, rows: tuple[str, ...], name: str, unit: str) -> Callable[[Measured], str | None]:
    """The same value of several rows, or None if one of them is missing."""

    def cell(measured: Measured) -> str | None:
        found = [value(measured, stage, row, name) for row in rows]
        cells = [shown(float(number)) for number in found if number is not None]
        return f"{' / '.join(cells)} {unit}" if len(cells) == len(rows) else None

    return cell


def least(rows: Callable[[str], bool], share: Callable[[Values], float | None]) -> Callable[[Measured], str | None]:
    """The worst share among kernels, in per cent, and whose it is."""

    def cell(measured: Measured) -> str | None:
        shares = {name: share(values) for name, values in measured.get("kernels", {}).items() if rows(name)}
        known = {name: number for name, number in shares.items() if number is not None}
        if not known:
            return None
        worst = min(known, key=lambda name: known[name])
        return f"{known[worst]:.0%} ({worst})"

    return cell


def of_limit(values: Values) -> float | None:
    found = values.get("of limit")
    return None if found is None else float(found)


def of_cublas(values: Values) -> float | None:
    ours, theirs = values.get("us"), values.get("cuBLAS us")
    return float(theirs) / float(ours) if ours and theirs else None


def slower_than_cublas(numbers: tuple[int, ...]) -> Callable[[Measured], str | None]:
    """How much longer all products of a layer take than cuBLAS, which may sum as it likes.

    That is what the promise costs at most there: llmd has no faster mode of its own to compare with.
    """

    def cell(measured: Measured) -> str | None:
        costs = []
        for num_tokens in numbers:
            rows = [
                values
                for name, values in measured.get("kernels", {}).items()
                if is_linear(name) and tokens_of(name) == num_tokens and "lm_head" not in name
            ]
            ours, theirs = (sum(float(row.get(key) or 0) for row in rows) for key in ("us", "cuBLAS us"))
            if len(rows) < len(WHOLE.model.linears) - 1 or not all(row.get("cuBLAS us") for row in rows):
                return None
            costs.append(f"{ours / theirs - 1:.0%}")
        return " / ".join(costs)

    return cell


def decode_steps(*numbers: int) -> tuple[str, ...]:
    """Their rows."""
    return tuple(f"decode step, {num_seqs} at once" for num_seqs in numbers)


def tokens_of(row: str) -> int:
    """Of "linear qkv, 64 tokens"."""
    return int(row.split()[-2])


def is_linear(row: str) -> bool:
    return row.startswith("linear ")


def is_small(row: str) -> bool:
    return row.startswith(("add_rms_norm", "gated_mul", "rope_kv_write")) and tokens_of(row) == 8192


def is_large_decode(row: str) -> bool:
    """At least 256 MB of keys and values in one launch."""
    return row in ("paged_attention, decode 128 × 1024", "paged_attention, decode 256 × 1024", LONG_DECODE)


LONG_DECODE = "paged_attention, decode 32 × 8192"
SMALL_DECODES = ("paged_attention, decode 1 × 1024", "paged_attention, decode 8 × 1024")


def shown(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _serving(concurrency: int, known: str, goal: str) -> Goal:
    return Goal(
        f"output tokens/s, {concurrency} at once, 1,024 in / 256 out",
        known,
        goal,
        f"{LIMITS.closed_loop(concurrency, 1024, 256):,.0f}",
        one("server", f"load, {concurrency} at once", "output tok/s", "tok/s"),
    )


def _first_token(num_tokens: int, known: str, goal: str) -> Goal:
    return Goal(
        f"time to first token, {num_tokens:,} tokens, idle, over HTTP, p50",
        known,
        goal,
        f"{LIMITS.prefill(num_tokens) * 1e3:.1f} ms",
        one("server", f"first token, idle, prompt of {num_tokens}", "TTFT p50 ms", "ms"),
    )


GOALS = (
    _serving(1, "138 to 146", "172"),
    _serving(32, "about 2,850", "3,170"),
    _serving(256, "5,400 to 5,700", "6,250"),
    _first_token(1024, "27.7 ms at about 230 tokens", "25 ms"),
    _first_token(128, "", "10 ms"),
    Goal(
        "command to first token, weights in memory",
        "34 to 99 s",
        "6 s",
        "import of torch, context: 2 to 3 s",
        one("server", "start, warm compile cache", "first token s", "s"),
    ),
    Goal(
        "engine's CPU time a step, 1 / 256 sequences",
        "milliseconds",
        "70 / 150 µs",
        "",
        several("server", ("load, 1 at once", "load, 256 at once"), "engine CPU us a step", "µs"),
    ),
    Goal(
        "worker's time a decode step, 1 / 32 / 256 sequences",
        "",
        "",
        "",
        several("steps", decode_steps(1, 32, 256), "host us", "µs"),
    ),
    Goal(
        "GPU idle between decode steps, 1 / 32 / 256 sequences",
        "about 0",
        "20 µs",
        "0",
        several("steps", decode_steps(1, 32, 256), "idle us", "µs"),
    ),
    Goal(
        "decode steps as launched, 1 / 32 / 256 sequences, context 1,024",
        "",
        "",
        " / ".join(f"{LIMITS.decode_step(num_seqs, 1024) * 1e3:.2f}" for num_seqs in (1, 32, 256)) + " ms",
        several("steps", decode_steps(1, 32, 256), "us", "µs"),
    ),
    Goal(
        "cost of batch invariance (always on): matrix products of a layer beside cuBLAS, 64 / 256 tokens",
        "25 to 75 % (all of a step)",
        "5 %",
        "0",
        slower_than_cublas((64, 256)),
    ),
    Goal(
        "decode attention, at least 256 MB of KV a launch",
        "97 to 100 % of copy",
        "93 % of copy",
        "100 %",
        least(is_large_decode, of_limit),
    ),
    Goal(
        "decode attention, 1 × 1k / 8 × 1k",
        "7.6 / 11.4 µs (half the bytes)",
        "8 / 15 µs",
        "1.4 / 11.2 µs",
        several("kernels", SMALL_DECODES, "us", "µs"),
    ),
    Goal(
        "prefill attention, 8k, causal",
        "about 600 TFLOP/s",
        "450 TFLOP/s",
        "800 TFLOP/s",
        one("kernels", "paged_attention, prefill 8192", "TFLOP/s", "TFLOP/s"),
    ),
    Goal(
        "matrix products, up to 64 tokens, each shape",
        "cuBLAS",
        "90 % of copy",
        "100 %",
        least(lambda row: is_linear(row) and tokens_of(row) <= 64, of_limit),
    ),
    Goal(
        "matrix products, from 1,024 tokens on",
        "cuBLAS",
        "93 % of cuBLAS",
        "",
        least(lambda row: is_linear(row) and tokens_of(row) >= 1024, of_cublas),
    ),
    Goal(
        "norm, activation, rope with cache write, 8,192 tokens",
        "100 % of copy",
        "92 % of copy",
        "100 %",
        least(is_small, of_limit),
    ),
    Goal(
        "sampling, top-k and top-p, 256 rows of 128,256",
        "0.27 ms at 128 rows",
        "0.12 ms",
        "0.044 ms",
        one("kernels", "sample_on_device top-k and top-p, 256 rows", "us", "µs"),
    ),
    Goal("output tokens/s, 256 at once, float8 weights and KV", "", "10,500", "about 12,500"),
    Goal("output tokens/s, 1 at once, 4-bit weights", "", "380", "645"),
)
