"""Who gets which part of the memory, by arithmetic."""

from typing import Any

import pytest

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.errors import StartupFailed
from llmd.fetch.built_in import BUILT_IN
from llmd.model.ledger import GIB, MemoryLedger, plan_memory
from llmd.model.memory import kv_bytes_per_token
from llmd.model.spec import ModelSpec, parse_spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
SPEC: ModelSpec = parse_spec(LLAMA)


def plan(
    available: float,
    *,
    on_cpu: bool = True,
    max_model_len: int | None = None,
    num_blocks: int | None = None,
    kv_dtype_bytes: int = 2,
    spec: ModelSpec = SPEC,
    enforce_eager: bool = False,
    **cache: Any,
) -> MemoryLedger:
    return plan_memory(
        spec,
        dtype_bytes=2,
        kv_dtype_bytes=kv_dtype_bytes,
        available_bytes=int(available),
        on_cpu=on_cpu,
        model=ModelConfig(cache_dir="", served_names=("m",), max_model_len=max_model_len, enforce_eager=enforce_eager),
        cache=CacheConfig(**cache),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256),
        num_blocks=num_blocks,
    )


def test_everything_adds_up() -> None:
    ledger = plan(16 * GIB)
    assert ledger.weights + ledger.activations + ledger.kv_cache + ledger.free == 16 * GIB
    # the cache that is allocated has one block more than the scheduler uses
    block = ledger.block_size * kv_bytes_per_token(SPEC, dtype_bytes=2)
    assert ledger.kv_cache == (ledger.num_blocks + 1) * block


def test_a_cache_of_one_byte_a_number_holds_nearly_twice_as_many_tokens() -> None:
    usual, small = plan(5 * GIB), plan(5 * GIB, kv_dtype_bytes=1)
    # a float32 scale beside 64 numbers
    assert small.num_blocks / usual.num_blocks == pytest.approx(128 / 68, rel=0.01)
    block = small.block_size * kv_bytes_per_token(SPEC, dtype_bytes=1)
    assert small.kv_cache == (small.num_blocks + 1) * block


def test_a_gpu_keeps_sequences_and_graphs() -> None:
    cpu, eager, captured = (
        plan(64 * GIB, on_cpu=on_cpu, enforce_eager=enforce_eager)
        for on_cpu, enforce_eager in ((True, False), (False, True), (False, False))
    )
    tables = 16 * (32768 + 32768 // 16) * 4
    assert cpu.activations + tables < eager.activations < captured.activations
    assert captured.weights + captured.activations + captured.kv_cache + captured.free == 64 * GIB


def test_enough_memory_reduces_nothing() -> None:
    ledger = plan(64 * GIB)
    assert ledger.max_model_len == 32768
    assert len(ledger.lines()) == 1


def test_a_context_that_does_not_fit_is_reduced_and_the_remedy_works() -> None:
    ledger = plan(16 * GIB, memory_bytes=256 << 20)
    assert ledger.max_model_len == ledger.num_blocks * ledger.block_size < 32768
    line = ledger.lines()[1]
    assert f"from 32,768 to {ledger.max_model_len:,}" in line
    advised = int(line.split("--kv-cache-memory-bytes ")[1].split("M")[0]) << 20
    assert plan(16 * GIB, memory_bytes=advised).max_model_len == 32768


def test_no_more_than_could_be_used() -> None:
    ledger = plan(64 * GIB, max_model_len=64)
    assert ledger.num_blocks == 16 * 64 // ledger.block_size


def test_a_gpu_gives_its_share() -> None:
    ledger = plan(24 * GIB, on_cpu=False, memory_utilization=0.5)
    assert ledger.weights + ledger.activations + ledger.kv_cache <= 12 * GIB
    assert ledger.kv_cache > 12 * GIB - ledger.weights - ledger.activations - (1 << 20)


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(StartupFailed, match=r"weights 2\.\d GiB.*--dtype"):
        plan(2 * GIB)
    with pytest.raises(StartupFailed, match="--kv-cache-memory-bytes"):
        plan(8 * GIB, memory_bytes=10 * GIB)


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(StartupFailed, match="--max-model-len 40000 is more than the model allows: 32768"):
        plan(64 * GIB, max_model_len=40_000)


def test_a_restart_keeps_the_limits_whatever_is_free() -> None:
    before = plan(16 * GIB)
    for available in (0.5 * GIB, 16 * GIB, 64 * GIB):
        after = plan(available, num_blocks=before.num_blocks)
        assert (after.num_blocks, after.max_model_len) == (before.num_blocks, before.max_model_len)
        assert any("as large as before the restart" in line for line in after.lines()) == (available < GIB)


def test_quantized_weights_count_as_what_is_held() -> None:
    """On a CPU they are dequantised. With kernels they stay, and room for the largest one dequantised is left: once in
    the memory of graphs.
    """
    int4 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    quantized = parse_spec(LLAMA | {"quantization_config": int4})
    assert plan(16 * GIB, spec=quantized) == plan(16 * GIB)
    plain, kept = plan(16 * GIB, on_cpu=False), plan(16 * GIB, on_cpu=False, spec=quantized)
    linear = 22 * (2048 * (2048 + 2 * 256 + 2048) + 3 * 2048 * 5632)
    assert plain.weights - kept.weights == linear * 2 - linear // 2 - linear // 128 * 4
    assert kept.activations - plain.activations == 2 * (2 * 5632 * 2048 * 2)


def test_quantized_experts_stay_and_no_step_dequantizes_them() -> None:
    """Room for a dequantised weight is left for attention alone, whose q, k and v are the largest."""
    int4 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    mixtral = parse_spec(BUILT_IN["mixtral-8x7b"])
    quantized = parse_spec({**BUILT_IN["mixtral-8x7b"], "quantization_config": int4})
    assert plan(128 * GIB, spec=quantized) == plan(128 * GIB, spec=mixtral)
    plain, kept = (plan(128 * GIB, on_cpu=False, enforce_eager=True, spec=spec) for spec in (mixtral, quantized))
    linear = 32 * (4096 * (2 * 4096 + 2 * 1024) + 8 * 3 * 4096 * 14336)
    assert plain.weights - kept.weights == linear * 2 - linear // 2 - linear // 128 * 4
    assert kept.activations - plain.activations == 2 * (4096 + 2 * 1024) * 4096


@pytest.mark.parametrize(("name", "num_experts", "num_layers"), [("gpt-oss-20b", 32, 24), ("gpt-oss-120b", 128, 36)])
def test_mxfp4_experts_take_four_bits_and_a_quarter(name: str, num_experts: int, num_layers: int) -> None:
    """Beside that nothing: all else is plain, and no step dequantises them."""
    config = {key: value for key, value in BUILT_IN[name].items() if key != "quantization_config"}
    plain, kept = (
        plan(256 * GIB, on_cpu=False, enforce_eager=True, spec=spec)
        for spec in (parse_spec(config), parse_spec(BUILT_IN[name]))
    )
    numbers = num_layers * num_experts * 3 * 2880 * 2880
    assert plain.weights - kept.weights == numbers * 2 - numbers // 2 - numbers // 32
    assert kept.activations == plain.activations
