"""The step of a GPU, on CPU tensors, for what the smallest float32 model has not: 16 bits, experts, latent attention,
quantised weights and caches. All can be captured, give what the CPU's runner gives, and do not know their company.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model import quantized_checkpoints
from tests.model.mxfp4_checkpoints import save_with_mxfp4
from tests.model.reference_models import DEEPSEEK, GPT_OSS, make_reference, save_reference
from tests.worker.engine import Answer, generate_request
from tests.worker.pretended_gpu import cpu_engine, load_for_cpu, load_for_gpu, run_on_gpu

VOCAB_SIZE = 64
SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
POSITIONS = {"max_position_embeddings": 128}


@dataclass(frozen=True)
class Family:
    """A model, and how far its log-probabilities may be from those of the CPU."""

    model_type: str
    dtype: torch.dtype
    tolerance: float
    fields: dict[str, Any]
    quantized: str | None = None  # how: a case of quantized_checkpoints, or "mxfp4"
    kv_dtype: torch.dtype | None = None


DENSE_KERNELS = ("linear_kernel", "quantized_linear_kernel", "linear_draw_kernel")
MOE_KERNELS = ("linear_kernel", "route_kernel", "group_kernel", "gate_up_kernel", "down_kernel")
FAMILIES = {
    "int4": Family("qwen3", torch.float16, 0.02, {}, quantized="gptq, 4 bits, shuffled"),
    "float8 weights and cache": Family(
        "llama", torch.bfloat16, 0.15, {}, quantized="fp8, small blocks", kv_dtype=torch.float8_e4m3fn
    ),
    "mixtral, float32": Family("mixtral", torch.float32, 1e-4, {"num_local_experts": 5, "num_experts_per_tok": 2}),
    # two kinds of layers: with a window, without
    "gpt-oss": Family("gpt_oss", torch.bfloat16, 0.1, GPT_OSS | {"num_hidden_layers": 2, "num_local_experts": 4}),
    "gpt-oss, MXFP4": Family(
        "gpt_oss", torch.bfloat16, 0.1, GPT_OSS | {"num_hidden_layers": 2, "num_local_experts": 4}, quantized="mxfp4"
    ),
    "mixtral, int4": Family(
        "mixtral", torch.float16, 0.02, {"num_local_experts": 5, "num_experts_per_tok": 2}, quantized="awq"
    ),
    "qwen3 moe, float8": Family(
        "qwen3_moe",
        torch.bfloat16,
        0.15,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        quantized="fp8, small blocks",
    ),
    "deepseek v3": Family(
        "deepseek_v3",
        torch.float16,
        0.02,
        DEEPSEEK
        | {"q_lora_rank": None, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "num_key_value_heads": 2},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_of_a_gpu(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = make_folder(family, tmp_path)
    on_cpu, on_gpu = load_for_cpu(folder, family.dtype), load_for_gpu(folder, family.dtype)
    has_experts = on_gpu.spec.layers[0].moe is not None
    # a long prompt and a short one; without experts the second runs on alone: its steps end with a draw
    prompts, lens = [[(3 + 7 * i * i) % VOCAB_SIZE for i in range(n)] for n in (19, 5)], (3, 3 if has_experts else 5)
    first, second, told = (
        generate_request(i, prompts[i], max_tokens=lens[i], temperature=0.0, num_logprobs=num_logprobs)
        for i, num_logprobs in ((0, 2), (1, None), (1, 2))
    )
    together = run_on_gpu(on_gpu, [first, second], chunk=16, kv_dtype=family.kv_dtype)
    assert together.stream.num_captures == (1 if has_experts else 2)
    expected = cpu_engine(on_cpu, chunk=16, kv_dtype=family.kv_dtype).run([first, told])
    for request_id in (0, 1):
        assert_close(together.answers[request_id], expected[request_id], tolerance=family.tolerance)
    kernels = MOE_KERNELS if has_experts else DENSE_KERNELS
    assert together.kernels >= {*kernels, "attend", "rope_kv_write_kernel"}
    alone = run_on_gpu(on_gpu, [first], kv_dtype=family.kv_dtype, with_graphs=False)
    assert alone.answers[0] == together.answers[0]


def make_folder(family: Family, tmp_path: Path) -> Path:
    model = make_reference(family.model_type, SIZES | family.fields | POSITIONS)
    if family.quantized == "mxfp4":
        return save_with_mxfp4(model, tmp_path)
    folder = save_reference(model, tmp_path / "model")
    if family.quantized is None:
        return folder
    quantized_checkpoints.write_quantized(folder, tmp_path / "quantized", quantized_checkpoints.CASES[family.quantized])
    return tmp_path / "quantized"


def assert_close(answer: Answer, expected: Answer, *, tolerance: float) -> None:
    """The same tokens as long as the likeliest is so by more than rounding; the same log-probabilities but for it."""
    for index, entry in enumerate(expected.logprobs):
        if answer.logprobs:
            assert answer.logprobs[index].top_logprobs == pytest.approx(entry.top_logprobs, abs=tolerance)
        if answer.token_ids[index] != entry.token_id:
            assert entry.top_logprobs[0] - entry.top_logprobs[1] < 2 * tolerance
            return
    assert len(answer.token_ids) == len(expected.token_ids)
