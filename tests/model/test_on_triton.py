"""The decoder on Triton's kernels, interpreted, is the decoder on PyTorch's operators, but for rounding."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmd.model.checkpoint import load_decoder
from llmd_kernels import dispatch
from llmd_kernels.paged_attention import triton_ops as attention
from tests.kernels.proof.interpreter import interpreted
from tests.model.paged_steps import PagedSequences
from tests.model.reference_models import CASES, VOCAB_SIZE, make_reference, save_reference

OPERATIONS = ("add_rms_norm", "experts", "gated_mul", "linear", "rms_norm", "rope_kv_write", "route")


def logits(folder: Path, tokens: list[int]) -> Tensor:
    """Of two sequences in one step, with padding."""
    decoder = load_decoder(folder, dtype=torch.float16, device=torch.device("cpu"), max_model_len=16)
    run = PagedSequences(decoder, num_seqs=2, max_len=16, block_size=16)
    both = run.step({0: tokens[:4], 1: tokens[4:]})
    return torch.cat([both[0], both[1]])


@pytest.mark.parametrize("case", ["gpt-oss", "deepseek v3"])
def test_families_with_experts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, fields = CASES[case]
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0} if "deepseek" in case else {"num_hidden_layers": 2}
    folder = save_reference(make_reference(model_type, fields | layers), tmp_path)
    tokens = torch.randint(VOCAB_SIZE, (7,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = logits(folder, tokens)
    for operation in OPERATIONS:
        # what is imported inside of `interpreted` is not rewritten
        importlib.import_module(f"llmd_kernels.{operation}.triton_ops")
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cpu"})
    monkeypatch.setattr(attention, "processors", lambda _device: attention.Processors("sm_90", 2))
    with interpreted() as launches:
        ours = logits(folder, tokens)
    kernels = {launch.kernel for launch in launches}
    assert {"attend", "route_kernel", "gate_up_kernel", "down_kernel", "rope_kv_write_kernel"} <= kernels
    errors = (ours - expected).norm(dim=1) / expected.norm(dim=1)
    # 11 bits of mantissa; a token between two experts may go to the other one
    assert errors.median() < 0.005
