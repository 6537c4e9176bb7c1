"""The proof of `sample_on_device` in Triton."""

from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor

from llmd_kernels import DeviceSampling, RowSampling
from llmd_kernels.sample import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn
from tests.kernels.proof.sampling import History, on_device

# Each kind of row once: greedy, plain, each filter alone and together, whatever changes the logits.
KINDS = (
    RowSampling(seed=3, temperature=0),
    RowSampling(seed=2**64 - 3, choice=2**32 - 1, temperature=1.25),
    RowSampling(seed=5, top_k=5),
    RowSampling(seed=6, top_k=60, min_p=0.5, temperature=3.0),
    RowSampling(seed=7, top_p=0.6),
    RowSampling(seed=8, min_p=0.25, temperature=1.75),
    RowSampling(seed=9, top_k=40, top_p=0.75, min_p=0.0625, temperature=1.5),
    RowSampling(seed=10, temperature=0, repetition_penalty=1.5, logit_bias={0: 2.0, 3: float("-inf"), 149: 1.0}),
    RowSampling(seed=11, temperature=1.5, frequency_penalty=0.75, presence_penalty=-0.5, repetition_penalty=0.75),
    RowSampling(seed=12, top_p=0.875, temperature=1.5, frequency_penalty=1.5, min_tokens=5, stop_token_ids=(1, 4)),
)

NARROW = {
    # One number for each 4,096 logits, a few of them a row.
    "pick_kernel": 0.0,
    # Besides the maxima of groups of 128 logits the same few numbers a row.
    "bound_kernel": 0.5,
    # Besides all logits, where it must bisect them, candidates eight at a time.
    "choose_kernel": 0.75,
}

PENALTIES = (
    RowSampling(seed=0, temperature=0, repetition_penalty=2.0),
    RowSampling(seed=0, temperature=0, frequency_penalty=2.0),
    RowSampling(seed=0, temperature=0, presence_penalty=2.0, frequency_penalty=0.25),
    RowSampling(seed=0, temperature=0, repetition_penalty=0.5, presence_penalty=0.5),
)


def histories(num_rows: int, num_tokens: int) -> list[History]:
    """Prompts and outputs in which tokens come back."""
    prompt, output = torch.tensor([4, 1, 1, 3]), torch.tensor([2, 6, 2, 4, 4, 2])
    return [
        (((prompt + r) % num_tokens).tolist()[: r % 5], ((output + 3 * r) % num_tokens).tolist()[: r % 7])
        for r in range(num_rows)
    ]


def case(name: str, logits: Tensor, rows: tuple[RowSampling, ...], *, masked: bool = False) -> Case:
    num_rows, num_tokens = logits.shape
    mask = randn(num_rows, num_tokens, seed=9) < 0.5 if masked else None
    chosen = [rows[r % len(rows)] for r in range(num_rows)]
    sampling = on_device(chosen, histories(num_rows, num_tokens), mask=mask)
    return Case(name, {"logits": logits, "sampling": sampling})


def cases() -> Iterator[Case]:
    """Cheap ones first: a planted fault runs them until one finds it."""
    # Signed zeros are equal: the lower id stays.
    zeros = torch.zeros(2, 40)
    zeros[:, ::2] = -0.0
    yield case("zeros of both signs", zeros, (RowSampling(seed=1, top_k=1), RowSampling(seed=1, temperature=0)))
    greedy_and_plain = on_device([RowSampling(seed=1, temperature=0), RowSampling(seed=2)])
    yield Case(
        "logits are read once",
        {"logits": randn(2, 8192), "sampling": greedy_and_plain},
        bytes_moved=cost.bytes_moved(2, 8192),
    )
    hot = tuple(RowSampling(seed=seed, temperature=4.0) for seed in range(8))
    yield case("noise decides", randn(8, 30), hot)
    yield case("no rows", randn(0, 10), KINDS)
    # Few tokens, all of them seen, and no chance: what is taken off decides.
    yield case("penalties", randn(16, 6), PENALTIES)
    # Behind the first sequence the table ends; behind the second one lies a token that must not count.
    ends = on_device([PENALTIES[1]] * 2, [([2, 0], [3, 3, 0, 3]), ([0], [2, 3])], table_size=(2, 6))
    logits = torch.tensor([[1.0, 2.0, 0.0, 3.0], [2.5, 3.0, 0.0, 0.0]])
    yield Case("ends of histories", {"logits": logits, "sampling": ends})
    # The second token crosses top_p, and is kept.
    crossing = tuple(RowSampling(seed=seed, temperature=4.0, top_p=0.75) for seed in range(8))
    yield case("two tokens", torch.tensor([[0.0, 1.0]] * 8), crossing)
    # Negative logits, equal ones at every border: lower ids stay.
    yield case("ties", (randn(len(KINDS), 150) * 2).round() - 9, KINDS, masked=True)
    for dtype in FLOATS:
        logits = apart((randn(4, 150) * 3).to(dtype))
        yield case(f"{dtype_name(dtype)}, rows apart", logits, (KINDS[1], KINDS[6], KINDS[9], KINDS[2]), masked=True)
    # More survivors than are ranked among each other: the row is bisected.
    flat = randn(3, 1500) / 8
    yield case("flat", flat, (RowSampling(seed=1, top_p=0.96875), RowSampling(seed=2, top_k=1400, top_p=0.9375)))
    # Several chunks; a nucleus in a corner.
    wide = randn(3, 9000)
    wide[:, 4090:4100] += 8
    yield case("chunks", wide, (RowSampling(seed=4), RowSampling(seed=5, top_p=0.5), RowSampling(seed=6, top_k=3)))


def rows(name: str, kinds: tuple[RowSampling, ...], num_tokens: int) -> Rows:
    """The same rows with other neighbours, so that other launches are made for them."""
    logits = randn(len(kinds), num_tokens) * 2
    everything = histories(len(kinds), num_tokens)

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        chosen = ids.tolist()
        sampling = on_device([kinds[r] for r in chosen], [everything[r] for r in chosen])
        return (triton_ops.sample_on_device(logits[ids], sampling),)

    return Rows(name, len(kinds), run)


def on_meta(row: RowSampling, num_rows: int) -> DeviceSampling:
    """Without memory."""
    sampling = on_device([row] * num_rows)
    tensors = {
        field.name: meta(*value.shape, dtype=value.dtype)
        for field in fields(sampling)
        if isinstance(value := getattr(sampling, field.name), Tensor)
    }
    tensors["history"] = meta(256, 8192, dtype=torch.int32)
    bitmask = meta(4, 4008, dtype=torch.int32) if sampling.adjusts else None
    return DeviceSampling(
        **{field.name: getattr(sampling, field.name) for field in fields(sampling)} | tensors | {"bitmask": bitmask}
    )


def configurations() -> Iterator[Configuration]:
    kinds = {
        "plain": RowSampling(seed=1),
        "filters": RowSampling(seed=1, top_p=0.5),
        "everything": RowSampling(seed=1, top_p=0.5, presence_penalty=1, logit_bias={1: 1.0}),
    }
    for num_tokens in (49152, 128256, 151936, 262144):
        for dtype in (torch.float32, torch.bfloat16):
            for name, row in kinds.items():

                def call(num_tokens: int = num_tokens, dtype: torch.dtype = dtype, row: RowSampling = row) -> None:
                    triton_ops.sample_on_device(meta(64, num_tokens, dtype=dtype), on_meta(row, 64))

                yield Configuration(f"{dtype_name(dtype)} {num_tokens} {name}", call, narrow=NARROW)


PROOF = Proof(
    triton_ops.sample_on_device,
    reference.sample_on_device,
    list(cases()),
    [
        rows("every kind of row", KINDS, 150),
        rows("several chunks", (KINDS[1], KINDS[4]), 4200),
    ],
    list(configurations()),
)
