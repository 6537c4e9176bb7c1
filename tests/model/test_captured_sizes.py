"""Which steps a GPU captures: sizes by arithmetic."""

from itertools import pairwise

import pytest

from llmd.fetch.built_in import BUILT_IN
from llmd.model.captured_sizes import ROW_SIZES, TOKEN_SIZES, captured_sizes, graph_bytes, tokens_beside_launches
from llmd.model.spec import ModelSpec, parse_spec

SPEC = parse_spec(BUILT_IN["llama-3.1-8b"])


def tokens(spec: ModelSpec) -> float:
    return tokens_beside_launches(spec, dtype_bytes=2)


def test_little_of_a_step_is_empty() -> None:
    assert list(TOKEN_SIZES) == sorted(set(TOKEN_SIZES))
    assert all(large - small - 1 <= max(15, large // 5) for small, large in pairwise((0, *TOKEN_SIZES)))
    # steps of a size that is no multiple of eight would have another order of summation in some libraries
    assert not any(size % 8 for size in TOKEN_SIZES)


def test_no_more_than_the_limits_need() -> None:
    few = captured_sizes(SPEC, max_num_seqs=3, max_num_tokens=20, dtype_bytes=2)
    assert (few.rows, list(few.tokens)) == ((1, 2, 4), [16, 32])
    many = captured_sizes(SPEC, max_num_seqs=1000, max_num_tokens=8192, dtype_bytes=2)
    assert (many.rows, many.max_rows) == (ROW_SIZES, 256)
    assert many.max_tokens == max(size for size in TOKEN_SIZES if size <= tokens(SPEC))
    bytes_of_few, bytes_of_many = (graph_bytes(SPEC, sizes, dtype_bytes=2) for sizes in (few, many))
    assert 0 < bytes_of_few < bytes_of_many < 1 << 30


def test_a_dense_model_pays_while_its_products_are_short() -> None:
    """8 thousand million parameters, of which one is the embedding and the head: 7 of them for each token."""
    seconds = 32 * 300e-6
    assert tokens(SPEC) == pytest.approx(seconds * 300e12 / 6.98e9, rel=0.01)
    assert tokens(parse_spec(BUILT_IN["llama-3.2-1b"])) > 3 * tokens(SPEC)


@pytest.mark.parametrize("name", ["llama-3.1-70b", "mixtral-8x7b", "qwen3-30b-a3b"])
def test_a_model_whose_weights_take_longer_to_read_than_its_launches_pays_nothing(name: str) -> None:
    """Experts are read as soon as some token of a step has chosen them."""
    spec = parse_spec(BUILT_IN[name])
    assert tokens(spec) < 16
    sizes = captured_sizes(spec, max_num_seqs=256, max_num_tokens=8192, dtype_bytes=2)
    assert (sizes.rows, list(sizes.tokens)) == (ROW_SIZES, [])


def test_weights_of_four_bits_are_read_sooner() -> None:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    small = parse_spec({**BUILT_IN["llama-3.1-70b"], "quantization_config": quantization})
    assert tokens(small) > 64


def test_experts_in_four_bits_are_all_read_in_time() -> None:
    """Those of gpt-oss-20b are, so its products count; those of 120b are not, of which each token reads others."""
    hidden = 2880
    attention = hidden * 64 * (64 + 2 * 8) + 64 * (64 + 2 * 8) + 64 * 64 * hidden + hidden + 64
    expert = 3 * hidden * hidden

    def shared(layers: int, num_experts: int) -> int:
        return layers * (attention + num_experts * (hidden + 1) + 2 * hidden)

    small = parse_spec(BUILT_IN["gpt-oss-20b"])
    seconds = 24 * 300e-6
    assert tokens(small) == pytest.approx(seconds * 300e12 / (shared(24, 32) + 24 * 4 * expert), rel=1e-3)
    plain = {name: value for name, value in BUILT_IN["gpt-oss-20b"].items() if name != "quantization_config"}
    assert tokens(parse_spec(plain)) < 16

    large = parse_spec(BUILT_IN["gpt-oss-120b"])
    bytes_left = 36 * 300e-6 * 3e12 - 2 * (shared(36, 128) + hidden + 201088 * hidden)
    # a number has half a byte, 32 of them an exponent; biases are of 16 bits
    bytes_of_chosen = 36 * 4 * (expert * (1 / 2 + 1 / 32) + 2 * 3 * hidden)
    assert tokens(large) == pytest.approx(bytes_left / bytes_of_chosen, rel=1e-3)
