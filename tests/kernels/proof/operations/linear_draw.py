"""The proof of `linear_draw` in Triton."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmd_kernels.linear_draw import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.compiler import MATRIX_OF_ONE_DEPTH
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta


def keys(num_rows: int) -> dict[str, Tensor]:
    """Greedy, cold, plain and hot rows in turn; seeds and choices that use their highest bit."""
    r = torch.arange(num_rows)
    return {
        "temperatures": torch.tensor([0.0, 1.0, 4.0, 16.0])[r % 4],
        "seeds": (r + 1) * -0x1E3779B97F4A7C15,
        "choices": (r % 3 - 1).to(torch.int32),
        "positions": (7 * r).to(torch.int32),
    }


def integers(*shape: int, largest: int, seed: int) -> Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed))


def arguments(
    num_rows: int, hidden_size: int, num_tokens: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Small integers: products that no dtype rounds, many equal. Rounding: tests/kernels/test_linear_draw.py."""
    x, weight = (
        integers(rows, hidden_size, largest=largest, seed=largest).to(dtype)
        for rows, largest in ((num_rows, 2), (num_tokens, 1))
    )
    return {"x": x, "weight": weight}


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for num_rows, hidden_size, num_tokens in ((0, 64, 64), (1, 64, 65), (5, 100, 70), (17, 65, 130)):
            name = f"{dtype_name(dtype)} {num_rows}×{hidden_size} → {num_tokens}"
            yield Case(name, arguments(num_rows, hidden_size, num_tokens, dtype) | keys(num_rows))
    yield Case("several spans", arguments(3, 1100, 40) | keys(3))
    yield Case("more rows than a tile", arguments(67, 32, 70) | keys(67))
    given = arguments(4, 96, 150) | keys(4)
    yield Case("divided and capped", {**given, "divisor": 0.5, "soft_cap": 30.0})
    yield Case("divided", {**given, "divisor": 8.0})
    apart_rows = {"x": apart(given["x"]), "weight": apart(given["weight"])}
    yield Case("rows apart", given | apart_rows)
    # All logits are equal where the weights are: greedy rows take the lowest id, of any tile.
    yield Case("ties", {**given, "weight": given["weight"][:1].expand(150, -1).contiguous()})
    yield Case(
        "weights are read once",
        arguments(2, 512, 640) | keys(2),
        bytes_moved=cost.bytes_moved(2, 512, 640, itemsize=2),
        shared_inputs=["x"],
    )


def rows(hidden_size: int, num_tokens: int) -> Rows:
    given, options = arguments(70, hidden_size, num_tokens), keys(70)

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        chosen = {name: column[ids] for name, column in options.items()}
        return (triton_ops.linear_draw(given["x"][ids], given["weight"], **chosen),)

    return Rows(f"{hidden_size} → {num_tokens}", 70, run)


def configurations() -> Iterator[Configuration]:
    for hidden_size, num_tokens in ((576, 49152), (4096, 128256), (4096, 151936), (3584, 256000)):
        for num_rows in (16, 32, 64, 256):
            for dtype in FLOATS:

                def call(
                    hidden_size: int = hidden_size,
                    num_tokens: int = num_tokens,
                    num_rows: int = num_rows,
                    dtype: torch.dtype = dtype,
                ) -> None:
                    triton_ops.linear_draw(
                        meta(num_rows, hidden_size, dtype=dtype),
                        meta(num_tokens, hidden_size, dtype=dtype),
                        meta(num_rows, dtype=torch.float32),
                        seeds=meta(num_rows, dtype=torch.int64),
                        choices=meta(num_rows, dtype=torch.int32),
                        positions=meta(num_rows, dtype=torch.int32),
                        soft_cap=30.0 if num_tokens == 256000 else None,
                    )

                # The loop over 576 inputs is short enough to be unrolled: then what each row asks for counts too.
                yield Configuration(
                    f"{dtype_name(dtype)} {num_rows}×{hidden_size} → {num_tokens}",
                    call,
                    narrow={"linear_draw_kernel": 0.8} if hidden_size == 576 else {},
                    matrix={} if dtype == torch.float32 else MATRIX_OF_ONE_DEPTH,
                )


PROOF = Proof(
    triton_ops.linear_draw,
    reference.linear_draw,
    list(cases()),
    [rows(100, 70)],
    list(configurations()),
)
