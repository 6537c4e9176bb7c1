"""The cost models against the tensors that the operations really take and give."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from llmd_kernels.add_rms_norm import cost as add_rms_norm_cost
from llmd_kernels.experts import cost as experts_cost
from llmd_kernels.gated_mul import cost as gated_mul_cost
from llmd_kernels.linear import cost as linear_cost
from llmd_kernels.paged_attention import cost as paged_attention_cost
from llmd_kernels.quantized_linear import cost as quantized_linear_cost
from llmd_kernels.quantized_linear import pack_int_weight
from llmd_kernels.rms_norm import cost as rms_norm_cost
from llmd_kernels.rope_kv_write import cost as rope_kv_write_cost
from llmd_kernels.route import cost as route_cost
from llmd_kernels.sample import cost as sample_cost
from llmd_kernels.token_logprobs import cost as token_logprobs_cost
from llmd_kernels.top_tokens import cost as top_tokens_cost


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    x, weight, bias, y = torch.empty(7, 5), torch.empty(3, 5), torch.empty(3), torch.empty(7, 3)
    assert linear_cost.bytes_moved(7, 5, 3, itemsize=4, has_bias=True) == size(x, weight, bias, y)
    assert rms_norm_cost.bytes_moved(7, 5, itemsize=4) == size(x, x, weight[0])
    assert add_rms_norm_cost.bytes_moved(7, 5, itemsize=4) == size(x, x, x, x, weight[0])
    assert gated_mul_cost.bytes_moved(7, 5, itemsize=4) == size(x, x, x)
    qkv, q, kv = torch.empty(7, (4 + 2 * 2) * 8), torch.empty(7, 4, 8), torch.empty(7, 2 * 2, 8, dtype=torch.bfloat16)
    moved = rope_kv_write_cost.bytes_moved(7, 4, 2, 8, rot_dim=6, itemsize=4, cache_itemsize=2)
    assert moved == size(qkv, q, kv, torch.empty(7, 6))
    expert_ids, weights, logits = torch.empty(7, 2, dtype=torch.int32), torch.empty(7, 2), torch.empty(7, 9)
    moved = route_cost.bytes_moved(7, 9, 2, itemsize=4, has_bias=True)
    assert moved == size(logits, logits[0], expert_ids, weights)
    used = torch.empty(4, 2 * 3, 5), torch.empty(4, 5, 3)
    assert experts_cost.bytes_moved(7, 2, 4, 5, 3, itemsize=4) == size(x, x, expert_ids, weights, *used)
    ids = torch.empty(7, 2, dtype=torch.int64)
    assert top_tokens_cost.bytes_moved(7, 5, 2, itemsize=4) == size(x, x[:, :2], ids)
    assert token_logprobs_cost.bytes_moved(7, 5, itemsize=4) == size(x)
    assert sample_cost.bytes_moved(7, 5, has_mask=True) == size(x, x > 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_of_a_quantised_weight_are_those_of_its_tensors(bits: Literal[4, 8]) -> None:
    x, bias, y = torch.empty(7, 128).half(), torch.empty(64).half(), torch.empty(7, 64).half()
    weight = pack_int_weight(torch.zeros(64, 128, dtype=torch.uint8), torch.ones(64, 2).half(), None, bits=bits)
    moved = quantized_linear_cost.bytes_moved(
        7, 128, 64, bits=bits, scale_bytes=weight.groups.nbytes, itemsize=2, has_bias=True
    )
    assert moved == size(x, weight.tiles, weight.groups, bias, y)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attention_counts_each_visible_key_of_each_query(window: int | None) -> None:
    sequences = [(1, 9), (5, 5), (3, 12), (0, 4)]
    seen: list[set[int]] = []
    pairs = 0
    for num_queries, kv_len in sequences:
        keys: set[int] = set()
        for p in range(kv_len - num_queries, kv_len):
            visible = range(0 if window is None else max(0, p - window + 1), p + 1)
            keys |= set(visible)
            pairs += len(visible)
        seen.append(keys)
    assert paged_attention_cost.operations(sequences, 6, 16, window=window) == 2 * 2 * pairs * 6 * 16
    q, kv = torch.empty(9, 6, 16), torch.empty(sum(map(len, seen)), 2, 3, 16, dtype=torch.bfloat16)
    moved = paged_attention_cost.bytes_moved(sequences, 6, 3, 16, itemsize=4, cache_itemsize=2, window=window)
    assert moved == size(q, q, kv)
