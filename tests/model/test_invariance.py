"""Contract C3: a token's logits are bitwise the same whatever runs beside it and however its prompt was cut."""

from pathlib import Path

import pytest
import torch

from llmd.model.checkpoint import load_decoder
from tests.model.paged_steps import logits_in_chunks, logits_in_one_step
from tests.model.reference_models import CASES, VOCAB_SIZE, make_reference, save_reference

FAMILIES = [
    "llama", "gemma2", "gemma3", "olmo2", "smollm3 with windows", "phi3, longrope, long", "llama, dynamic rope",
    "mixtral with windows", "qwen2 moe, some dense layers, windows", "qwen3 moe", "gpt-oss",
    "deepseek v2, groups, yarn, biases", "deepseek v3",
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "kv_dtype"),
    [
        *((case, torch.float32) for case in FAMILIES),
        ("gemma3", torch.float8_e4m3fn),
        ("deepseek v3", torch.float8_e4m3fn),
    ],
)
def test_neighbours_and_chunks_change_no_bit(case: str, kv_dtype: torch.dtype, tmp_path: Path) -> None:
    model_type, fields = CASES[case]
    folder = save_reference(make_reference(model_type, fields), tmp_path)
    decoder = load_decoder(folder, dtype=torch.float32, device=torch.device("cpu"), max_model_len=64)
    generator = torch.Generator().manual_seed(3)
    lens = (33, 50, 7, 1, 16, 29)
    sequences = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lens]
    alone = [logits_in_one_step(decoder, [ids], kv_dtype=kv_dtype)[0] for ids in sequences]
    together = logits_in_one_step(decoder, sequences, kv_dtype=kv_dtype)
    chunked = logits_in_chunks(decoder, sequences, [5, 11, 1, 2, 16], kv_dtype=kv_dtype)
    for expected, *others in zip(alone, together, chunked, strict=True):
        assert all(torch.equal(expected, other) for other in others)


def test_a_float8_cache_changes_little(tmp_path: Path) -> None:
    model_type, fields = CASES["llama"]
    decoder = load_decoder(
        save_reference(make_reference(model_type, fields), tmp_path), dtype=torch.float32, device=torch.device("cpu")
    )
    (exact,) = logits_in_one_step(decoder, [list(range(40))])
    (rounded,) = logits_in_one_step(decoder, [list(range(40))], kv_dtype=torch.float8_e4m3fn)
    assert not torch.equal(exact, rounded)
    # three bits of mantissa, amplified by random weights
    assert (rounded - exact).std() < 0.15 * exact.std()
