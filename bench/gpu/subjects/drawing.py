"""From hidden states to tokens: the last product with the draw in it, logits' scaling, and sampling with filters."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bench.gpu.contexts import random_on
from bench.gpu.machine import Call, Machine
from bench.gpu.subject import Subject
from llmd_kernels import (
    DeviceSampling,
    SamplingRecords,
    linear_draw,
    pack_sampling,
    sample_on_device,
    scale_logits,
)
from llmd_kernels.linear_draw import cost as draw_cost
from llmd_kernels.sample import RowSampling
from llmd_kernels.sample import cost as sample_cost
from llmd_kernels.scale_logits import cost as scale_cost

TOP_K, TOP_P = 50, 0.9
SAMPLINGS = {
    "plain": RowSampling(seed=1),
    "top-k and top-p": RowSampling(seed=1, top_k=TOP_K, top_p=TOP_P),
    "top-p": RowSampling(seed=1, top_p=TOP_P),
}


def subjects(machine: Machine) -> Iterator[Subject]:
    for num_rows in machine.sizes.drawn_rows:
        for temperature in (0.0, 1.0):
            yield _linear_draw(machine, num_rows, temperature)
    num_rows = machine.sizes.drawn_rows[-1]
    for name, row in SAMPLINGS.items():
        yield _sample(machine, name, row, num_rows)
    yield _scale(machine, num_rows)


def _linear_draw(machine: Machine, num_rows: int, temperature: float) -> Subject:
    model = machine.sizes.model

    def make(seed: int) -> Mapping[str, Call]:
        random = random_on(machine, seed=seed)
        x, weight = random(num_rows, model.hidden), random(model.vocabulary, model.hidden) / model.hidden**0.5
        sampling = sampling_on(machine, RowSampling(seed=seed, temperature=temperature), num_rows)
        keys = {"seeds": sampling.seeds, "choices": sampling.choices, "positions": sampling.positions}
        generator = torch.Generator(machine.device).manual_seed(seed)
        noise = torch.empty(num_rows, model.vocabulary, device=machine.device).exponential_(generator=generator)
        return {
            "llmd": lambda: linear_draw(x, weight, sampling.temperatures, **keys),
            "cuBLAS and argmax": lambda: _product_and_argmax(x, weight, noise if temperature else None),
        }

    kind = "greedy" if temperature == 0 else "plain"
    return Subject(
        f"linear_draw {kind}, {num_rows} rows",
        make,
        draw_cost.bytes_moved(num_rows, model.hidden, model.vocabulary, itemsize=2),
        draw_cost.operations(num_rows, model.hidden, model.vocabulary, num_noisy_rows=num_rows if temperature else 0),
    )


def _product_and_argmax(x: Tensor, weight: Tensor, noise: Tensor | None) -> Tensor:
    """Flattered: the noise is there already."""
    logits = torch.mm(x, weight.t()).float()
    return logits.argmax(dim=-1) if noise is None else (logits.softmax(dim=-1) / noise).argmax(dim=-1)


def _sample(machine: Machine, name: str, row: RowSampling, num_rows: int) -> Subject:
    num_tokens = machine.sizes.model.vocabulary
    filters = row.top_p < 1

    def make(seed: int) -> Mapping[str, Call]:
        logits = random_on(machine, seed=seed)(num_rows, num_tokens).float() * 3
        sampling = sampling_on(machine, row, num_rows)
        generator = torch.Generator(machine.device).manual_seed(seed)
        noise = torch.empty(num_rows, num_tokens, device=machine.device).exponential_(generator=generator)
        return {
            "llmd": lambda: sample_on_device(logits, sampling),
            "torch sort": lambda: _sort_and_draw(logits, noise, top_k=row.top_k if filters else 0),
        }

    return Subject(
        f"sample_on_device {name}, {num_rows} rows",
        make,
        sample_cost.bytes_moved(num_rows, num_tokens),
        sample_cost.operations(0 if filters else num_rows * num_tokens),
    )


def _sort_and_draw(logits: Tensor, noise: Tensor, *, top_k: int) -> Tensor:
    """Sampling as torch offers it: sort, cut off, draw. The noise is there already."""
    values, ids = logits.sort(dim=-1, descending=True)
    if 0 < top_k < values.shape[1]:
        values[:, top_k:] = float("-inf")
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities.masked_fill(before >= TOP_P, 0.0)
    return ids.gather(1, (kept / noise).argmax(dim=-1, keepdim=True))


def _scale(machine: Machine, num_rows: int) -> Subject:
    num_tokens = machine.sizes.model.vocabulary

    def make(seed: int) -> Mapping[str, Call]:
        products = random_on(machine, seed=seed)(num_rows, num_tokens)
        return {
            "llmd": lambda: scale_logits(products, divisor=2.0, soft_cap=30.0),
            "torch": lambda: 30.0 * torch.tanh(products.float() / 2.0 / 30.0),
        }

    return Subject(
        f"scale_logits, {num_rows} rows",
        make,
        scale_cost.bytes_moved(num_rows, num_tokens, itemsize=2),
        scale_cost.operations(num_rows, num_tokens, has_soft_cap=True),
    )


def sampling_on(machine: Machine, row: RowSampling, num_rows: int) -> DeviceSampling:
    """So many rows that are drawn alike, each with noise of its own position."""
    records = SamplingRecords.of([row] * num_rows, prompt_lens=[0] * num_rows, places=range(num_rows))
    packed = pack_sampling(records, columns=range(num_rows), positions=range(num_rows))
    history = torch.zeros(num_rows, 1, dtype=torch.int32, device=machine.device)
    return packed.copied_to(machine.device, history=history)
