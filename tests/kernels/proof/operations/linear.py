"""The proof of `linear` in Triton."""

from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from llmd_kernels.linear import cost, reference, triton_ops
from llmd_kernels.linear.tiles import DEVICES, MASKED, Tile, candidates, with_pointers
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.compiler import MATRIX_OF_ONE_DEPTH
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn

# (inputs, outputs) of fused qkv, output, gate and up, down, head of Llama-3.1-8B, and SmolLM2-135M's.
SHIPPED = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256), (576, 960), (1536, 576))


def weight(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> Tensor:
    return (randn(num_outputs, num_inputs, seed=1) / num_inputs**0.5).to(dtype)


def cases() -> Iterator[Case]:
    # The first have descriptors, to the others none can point.
    for gap in (8, 1):
        x, w = apart(randn(70, 128, dtype=torch.bfloat16), gap), weight(40, 128, torch.bfloat16)
        yield Case(f"many rows, {gap} apart", {"x": x, "weight": w, "bias": None})
    shapes = (
        (0, 64, 64),
        (1, 64, 64),
        (3, 100, 70),
        (17, 65, 130),
        (65, 128, 200),
        (2, 1100, 40),
        (7, 1100, 40),
        (130, 1024, 33),
    )
    for dtype in FLOATS:
        for num_tokens, num_inputs, num_outputs in shapes:
            yield Case(
                f"{dtype_name(dtype)} {num_tokens}×{num_inputs} → {num_outputs}",
                {
                    "x": randn(num_tokens, num_inputs, dtype=dtype),
                    "weight": weight(num_outputs, num_inputs, dtype),
                    "bias": randn(num_outputs, dtype=dtype, seed=2) if num_tokens % 2 else None,
                },
            )
    x = apart(randn(5, 96, dtype=torch.bfloat16))
    yield Case("rows apart", {"x": x, "weight": apart(weight(40, 96, torch.bfloat16)), "bias": None})
    moved = cost.bytes_moved(3, 512, 640, itemsize=2)
    yield Case(
        "weights are read once",
        {"x": randn(3, 512).bfloat16(), "weight": weight(640, 512, torch.bfloat16), "bias": None},
        outputs=["y"],
        bytes_moved=moved,
        shared_inputs=["x"],
    )


def rows(num_inputs: int, num_outputs: int, dtype: torch.dtype = torch.bfloat16) -> Rows:
    """So many rows that some of the runs have programs for each span and some do not."""
    x = randn(70, num_inputs, dtype=dtype)
    w, bias = weight(num_outputs, num_inputs, dtype), randn(num_outputs, dtype=dtype, seed=2)

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        return (triton_ops.linear(x[ids], w, bias),)

    return Rows(f"{dtype_name(dtype)} {num_inputs} → {num_outputs}", len(x), run)


def configurations() -> Iterator[Configuration]:
    yield from shipped()
    for arch, device in DEVICES.items():
        for tile in with_pointers(candidates(device, has_spans=False)):
            yield of_tile(arch, tile, "all of K", 4096, 28672)
        for tile in with_pointers(candidates(device, has_spans=True)):
            yield of_tile(arch, tile, "a span of K" if tile.splits else "two spans of K", 4096, 4096)
            if not tile.splits:
                yield of_tile(arch, tile, "four spans of K", 2048, 1024)
                yield of_tile(arch, tile, "eight spans of K", 8192, 1024)
        yield of_tile(arch, MASKED, "K masked", 4073, 4096, vector_share=0.0)


def of_tile(
    arch: str, tile: Tile, what: str, num_inputs: int, num_outputs: int, *, vector_share: float = 0.9
) -> Configuration:
    """What may be chosen for an architecture, whether today's models and steps have it chosen or not."""

    def call() -> None:
        with patch.object(triton_ops, "tile_of_launch", lambda *_, **__: tile):
            triton_ops.linear(
                meta(1024, num_inputs, dtype=torch.bfloat16), meta(num_outputs, num_inputs, dtype=torch.bfloat16)
            )

    return Configuration(
        f"{tile.outputs}×{tile.tokens}, {tile.num_warps} warps, {tile.num_stages} stages, "
        f"{'descriptors' if tile.descriptors else 'pointers'}, {what}",
        call,
        archs=[arch],
        vector_share=vector_share,
        by_descriptors=tile.descriptors,
        matrix=MATRIX_OF_ONE_DEPTH,
    )


def shipped() -> Iterator[Configuration]:
    """As models have it, with the tile that is chosen."""
    for num_inputs, num_outputs in SHIPPED:
        for num_tokens in (16, 32, 64, 128):
            for dtype in (torch.bfloat16, torch.float16):

                def call(
                    num_inputs: int = num_inputs,
                    num_outputs: int = num_outputs,
                    num_tokens: int = num_tokens,
                    dtype: torch.dtype = dtype,
                ) -> None:
                    x, w = meta(num_tokens, num_inputs, dtype=dtype), meta(num_outputs, num_inputs, dtype=dtype)
                    triton_ops.linear(x, w)

                yield Configuration(
                    f"{dtype_name(dtype)} {num_tokens}×{num_inputs} → {num_outputs}", call, matrix=MATRIX_OF_ONE_DEPTH
                )
    for num_tokens in (16, 128):

        def call_float32(num_tokens: int = num_tokens) -> None:
            triton_ops.linear(meta(num_tokens, 576, dtype=torch.float32), meta(960, 576, dtype=torch.float32))

        yield Configuration(f"float32 {num_tokens}×576 → 960", call_float32)


PROOF = Proof(
    triton_ops.linear,
    reference.linear,
    list(cases()),
    [rows(100, 70), rows(2100, 65), rows(100, 70, torch.float32)],
    list(configurations()),
)
