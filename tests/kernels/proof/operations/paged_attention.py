"""The proof of `paged_attention` in Triton. More that is particular to it: test_paged_attention_triton.py."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmd_kernels import AttentionBatch
from llmd_kernels.kinds import WITH_FLOAT8
from llmd_kernels.paged_attention import reference, triton_ops
from llmd_kernels.paged_attention.device_work import allocate_lists
from llmd_kernels.paged_attention.tiles import TABLE, Numbers, TileConfig
from llmd_kernels.paged_attention.workspace import LayerKind
from tests.kernels.batches import Heads, Inputs, context, inputs
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.compiler import MATRIX
from tests.kernels.proof.inputs import FLOATS, dtype_name, meta

# Small, so that short contexts have several tiles and splits.
SMALL = TileConfig(rows=16, tile=32, split=64, num_warps=4, num_stages=1, programs_per_processor=1)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "soft cap": {"soft_cap": 5.0},
    "sinks": {"sinks": True},
    "all": {"window": 33, "soft_cap": 3.0, "sinks": True},
}

# Head sizes of models, with the one in the table that they are padded to.
HEAD_DIMS = {64: 64, 80: 128, 96: 128, 128: 128, 192: 256, 256: 256}
# (sliding window, soft cap, sinks): Llama; Gemma 2 and gpt-oss together.
FEATURES: tuple[tuple[int | None, float | None, bool], ...] = ((None, None, False), (128, 50.0, True))
# Keys and values come in wide loads. The rest are ids of blocks and scales, one a key, which all but one of the
# threads that ask for them find in the first cache.
VECTOR_SHARES: dict[Numbers, float] = {"16/16": 0.65, "16/8": 0.15, "32": 0.75, "32/8": 0.2}


def paged_attention(**arguments: Any) -> Tensor:
    return triton_ops.paged_attention(**arguments, config=SMALL, num_processors=3)


def arguments(step: Inputs, *, sinks: bool = False, **options: Any) -> dict[str, Any]:
    return {
        "q": step.q,
        "k_cache": step.k_cache,
        "v_cache": step.v_cache,
        "batch": step.batch,
        "scale": step.q.shape[2] ** -0.5,
        "sinks": torch.linspace(-1, 2, step.q.shape[1]) if sinks else None,
        **options,
    }


def cases() -> Iterator[Case]:
    """What no query may read is NaN: unused blocks, slots behind a sequence's end, padding rows of Q."""
    for dtype in FLOATS:
        contexts = [context(n, Heads(6, 2, 16), seed=n, dtype=dtype) for n in (1, 33, 70, 17, 90)]
        step = inputs(contexts, [1, 33, 1, 0, 7], filling=torch.nan)
        for name, options in VARIANTS.items() if dtype is torch.bfloat16 else [("all", VARIANTS["all"])]:
            yield Case(f"{dtype_name(dtype)} {name}", arguments(step, **options), outputs=["out"])
    for heads, block_size in (
        (Heads(4, 4, 64), 32),
        (Heads(4, 1, 80), 16),
        (Heads(8, 1, 96), 64),
        (Heads(2, 1, 128), 16),
        (Heads(2, 2, 192), 32),
        (Heads(2, 1, 256), 16),
        (Heads(40, 2, 16), 16),
    ):
        contexts = [context(n, heads, seed=n, dtype=torch.bfloat16) for n in (40, 5)]
        step = inputs(contexts, [1, 5], block_size=block_size, filling=torch.nan)
        yield Case(f"{heads}, blocks of {block_size}", arguments(step, sinks=True), outputs=["out"])


def rows() -> Rows:
    """Each a sequence that decodes."""
    contexts = [context(n, Heads(4, 2, 16), seed=n, dtype=torch.bfloat16) for n in (1, 150, 64, 65, 90)]

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        step = inputs([contexts[i] for i in ids.tolist()], [1] * len(ids), block_seed=len(ids))
        return (paged_attention(**arguments(step))[: len(ids)],)

    return Rows("decode", len(contexts), run)


def configurations() -> Iterator[Configuration]:
    for arch in sorted({arch for arch, _, _ in TABLE}):
        yield from _configurations(arch)


def _configurations(arch: str) -> Iterator[Configuration]:
    for head_dim, padded in HEAD_DIMS.items():
        for numbers in VECTOR_SHARES:
            config = TABLE.get((arch, padded, numbers))
            if config is not None:
                for block_size in (16, 64) if head_dim == padded else (16,):
                    for features in FEATURES:
                        yield _configuration(arch, head_dim, numbers, config, block_size, features)


def _configuration(
    arch: str,
    head_dim: int,
    numbers: Numbers,
    config: TileConfig,
    block_size: int,
    features: tuple[int | None, float | None, bool],
) -> Configuration:
    window, soft_cap, has_sinks = features
    is_float8 = numbers.endswith("/8")
    q_dtype = torch.float32 if numbers.startswith("32") else torch.bfloat16
    cache_dtype = torch.float8_e4m3fn if is_float8 else q_dtype

    def call() -> None:
        ints = torch.tensor([0, 3, 4]), torch.tensor([500, 1000])
        batch = AttentionBatch(*ints, meta(2, 64, dtype=torch.int64), block_size)
        cache = meta(1000, 8, block_size, head_dim, dtype=cache_dtype)
        scales = meta(1000, 8, block_size, dtype=torch.float32) if is_float8 else None
        triton_ops.paged_attention(
            meta(4, 32, head_dim, dtype=q_dtype),
            cache,
            cache,
            batch,
            scale=0.1,
            window=window,
            soft_cap=soft_cap,
            sinks=meta(32, dtype=torch.float32) if has_sinks else None,
            k_scales=scales,
            v_scales=scales,
            config=config,
            num_processors=100,
        )

    extras = " with window, soft cap and sinks" if has_sinks else ""
    # A product of float32 has no matrix instruction on NVIDIA; wgmma takes 64 rows, fewer are mma's.
    matrix = {arch: "HMMA" if config.rows < 64 and arch.startswith("sm_") else MATRIX[arch]}
    if arch not in WITH_FLOAT8:
        config = replace(config, float8_by_bits=is_float8)
    return Configuration(
        f"{numbers} bits, head size {head_dim}, block size {block_size}{extras}",
        call,
        archs=(arch,),
        vector_share=VECTOR_SHARES[numbers],
        matrix={} if numbers.startswith("32") and arch.startswith("sm_") else matrix,
    )


def work_list() -> None:
    """Made on the device, see test_triton_plan.py."""
    device = torch.device("meta")
    kinds = {LayerKind(32, 8, 128, window): TABLE["sm_90", 128, "16/16"] for window in (None, 128)}
    work = allocate_lists(kinds, max_seqs=256, max_tokens=2048, max_len=8192, num_processors=132, device=device)
    work.plan(meta(257, dtype=torch.int64), meta(256, dtype=torch.int64), meta(256, dtype=torch.int64))


# A number a thread: a few kilobytes in all.
WORK_LIST = Configuration("work list", work_list, vector_share=0.0)
PROOF = Proof(paged_attention, reference.paged_attention, list(cases()), [rows()], [WORK_LIST, *configurations()])
