"""The proof of `rope_kv_write` in Triton."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmd_kernels.rope_kv_write import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn

CACHES = ("k_cache", "v_cache", "k_scales", "v_scales")


@dataclass(frozen=True)
class Shape:
    """How a model's heads are laid out, normed and turned."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rot_dim: int
    interleaved: bool = False
    norms: str = ""  # "q", "k", both or none
    block_size: int = 16

    @property
    def row(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


SMALL = (
    Shape("neox", 6, 2, 16, 16, block_size=4),
    Shape("interleaved", 3, 3, 16, 16, interleaved=True, block_size=4),
    Shape("partial neox, norms", 4, 2, 24, 8, norms="qk", block_size=4),
    Shape("partial interleaved, k norm", 5, 1, 20, 12, interleaved=True, norms="k", block_size=4),
    Shape("no rotation, q norm", 2, 2, 16, 0, norms="q", block_size=4),
    Shape("no rotation, no norm", 3, 1, 10, 0, block_size=4),
    Shape("odd heads, norms", 9, 3, 64, 64, norms="qk", block_size=4),
)
SHIPPED = (
    Shape("SmolLM2-135M", 9, 3, 64, 64),
    Shape("Llama-3.1-8B", 32, 8, 128, 128),
    Shape("Qwen3-8B", 32, 8, 128, 128, norms="qk"),
    Shape("Gemma-3", 8, 4, 256, 256, norms="qk"),
    Shape("GLM-4", 32, 2, 128, 64, interleaved=True),
    Shape("Phi-4-mini", 24, 8, 128, 96),
)


def arguments(
    shape: Shape, num_tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    num_blocks = num_tokens // shape.block_size + 2
    generator = torch.Generator().manual_seed(1)
    k_cache = torch.full(
        (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim), torch.nan, dtype=cache_dtype or dtype
    )
    scales = torch.full(k_cache.shape[:3], torch.nan) if cache_dtype == torch.float8_e4m3fn else None
    return {
        "qkv": randn(num_tokens, shape.row, dtype=dtype),
        "positions": torch.arange(num_tokens).flip(0) * 3,
        "slots": torch.randperm(num_blocks * shape.block_size, generator=generator)[:num_tokens],
        "k_cache": k_cache,
        "v_cache": k_cache.clone(),
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "cos_sin": randn(3 * num_tokens + 1, shape.rot_dim, seed=4) if shape.rot_dim else None,
        "interleaved": shape.interleaved,
        "q_norm": randn(shape.head_dim, dtype=dtype, seed=2) if "q" in shape.norms else None,
        "k_norm": randn(shape.head_dim, dtype=dtype, seed=3) if "k" in shape.norms else None,
        "norm_eps": 1e-5,
        "norm_weight_offset": 1.0 if shape.norms == "qk" else 0.0,
        "k_scales": scales,
        "v_scales": None if scales is None else scales.clone(),
    }


def cases() -> Iterator[Case]:
    for shape in SMALL[1:6]:
        yield _case(f"{shape.name}, float8 cache", shape, 3, torch.bfloat16, torch.float8_e4m3fn)
    zeros = arguments(SMALL[0], 4, torch.bfloat16, torch.float8_e4m3fn)
    yield Case("zeros into float8", {**zeros, "qkv": zeros["qkv"] * 0}, in_place=CACHES)
    for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        given = arguments(SMALL[2], 4, torch.bfloat16, cache_dtype)
        in_place = CACHES if cache_dtype == torch.float8_e4m3fn else CACHES[:2]
        padded = given | {"slots": torch.tensor([5, -1, 2, -1])}
        yield Case(f"padding, {dtype_name(cache_dtype)} cache", padded, in_place=in_place, outputs=["q"])
    for shape in SMALL:
        for dtype in FLOATS:
            for num_tokens in (0, 4):
                yield _case(f"{shape.name}, {dtype_name(dtype)}, {num_tokens} tokens", shape, num_tokens, dtype)
    yield _case("float32 into bfloat16", SMALL[0], 3, torch.float32, torch.bfloat16)
    yield _case("bfloat16 into float32", SMALL[2], 3, torch.bfloat16, torch.float32)
    given = arguments(SMALL[0], 4, torch.bfloat16)
    yield Case("rows apart", {**given, "qkv": apart(given["qkv"])}, in_place=CACHES[:2])
    for shape in SHIPPED:
        if not shape.norms:
            moved = cost.bytes_moved(
                3,
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                rot_dim=shape.rot_dim,
                itemsize=2,
                cache_itemsize=2,
            )
            yield _case(shape.name, shape, 3, torch.bfloat16, bytes_moved=moved)


def _case(
    name: str,
    shape: Shape,
    num_tokens: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    bytes_moved: int | None = None,
) -> Case:
    return Case(
        name,
        arguments(shape, num_tokens, dtype, cache_dtype),
        in_place=CACHES if cache_dtype == torch.float8_e4m3fn else CACHES[:2],
        outputs=["q"] if num_tokens else [],
        bytes_moved=bytes_moved,
        shared_inputs=("cos_sin", "positions", "slots", "q_norm", "k_norm"),
    )


def rows(shape: Shape, cache_dtype: torch.dtype | None = None) -> Rows:
    given = arguments(shape, 7, torch.bfloat16, cache_dtype)
    row_inputs = {name: given.pop(name) for name in ("qkv", "positions", "slots")}

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        caches = {name: given[name].clone() for name in CACHES if given[name] is not None}
        q = triton_ops.rope_kv_write(**{name: value[ids] for name, value in row_inputs.items()}, **{**given, **caches})
        slots = row_inputs["slots"][ids]
        written = [cache.transpose(1, 2).flatten(0, 1)[slots] for cache in caches.values()]
        return (q, *written)

    return Rows(shape.name if cache_dtype is None else f"{shape.name}, float8 cache", 7, run)


def configurations() -> Iterator[Configuration]:
    for shape in SHIPPED:
        for dtype in (torch.bfloat16, torch.float16):

            def call(shape: Shape = shape, dtype: torch.dtype = dtype, cache_dtype: torch.dtype | None = None) -> None:
                given = arguments(shape, 1, dtype, cache_dtype)
                tensors = {
                    name: meta(*value.shape, dtype=value.dtype)
                    for name, value in given.items()
                    if isinstance(value, Tensor)
                }
                triton_ops.rope_kv_write(**{**given, **tensors})

            # Heads come in wide loads. The row of angles and that of weights, which a program's heads share, and what
            # is not turned (32 numbers a head) are less than a wide load of each thread. There is no loop.
            vector_share = 0.65 if shape.norms else 0.75
            yield Configuration(f"{shape.name} {dtype_name(dtype)}", call, vector_share=vector_share)
            yield Configuration(
                f"{shape.name} {dtype_name(dtype)}, float8 cache",
                partial(call, cache_dtype=torch.float8_e4m3fn),
                archs=("sm_89", "sm_90", "sm_100", "sm_120"),
                vector_share=vector_share,
            )


PROOF = Proof(
    triton_ops.rope_kv_write,
    reference.rope_kv_write,
    list(cases()),
    [*(rows(shape) for shape in SMALL[:4]), rows(SMALL[2], torch.float8_e4m3fn)],
    list(configurations()),
)
