"""What a GPU's weights go through: threads with one buffer each. Here the device is the CPU, the code is the same."""

from pathlib import Path

import pytest
import torch
from make_tiny_model import make_tiny_model

from llmd.model.checkpoint import load_parameters
from llmd.model.parallel import Rank
from llmd.model.parameters import parameters
from llmd.model.safetensors_folder import read_headers
from llmd.model.spec import load_spec
from llmd.model.staged_reads import StagedRead, run_reads

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [Rank(), Rank(0, 2), Rank(1, 2)])
def test_every_rank_reads_what_it_would_read_from_mapped_files(tmp_path: Path, dtype: torch.dtype, rank: Rank) -> None:
    folder = make_tiny_model(tmp_path, hidden_size=72, num_heads=9, num_kv_heads=3, intermediate_size=96)
    stored, wanted = read_headers(folder), parameters(load_spec(folder))
    heard: list[tuple[int, int]] = []
    mapped, staged = (
        load_parameters(
            stored,
            wanted,
            dtype=dtype,
            device=CPU,
            rank=rank,
            progress=lambda done, total: heard.append((done, total)),
            staged=is_staged,
        )
        for is_staged in (False, True)
    )
    assert staged.keys() == mapped.keys()
    assert all(torch.equal(staged[name], mapped[name]) for name in mapped)
    assert heard[-1][0] == heard[-1][1]


@pytest.mark.parametrize("buffer_bytes", [1, 100, 1000, 1 << 20])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_no_size_of_a_buffer_changes_what_is_read(tmp_path: Path, buffer_bytes: int, num_threads: int) -> None:
    numbers = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "numbers"
    file.write_bytes(b"header" + numbers.numpy().tobytes())
    whole, some, half = torch.empty(37, 11), torch.empty(20, 4), torch.empty(37, 11, dtype=torch.bfloat16)
    reads = [
        StagedRead(file, 6, torch.float32, 11, whole),
        StagedRead(file, 6 + 5 * 44, torch.float32, 11, some, columns=slice(3, 7)),
        StagedRead(file, 6, torch.float32, 11, half),
    ]
    heard: list[int] = []
    run_reads(reads, device=CPU, done=heard.append, num_threads=num_threads, buffer_bytes=buffer_bytes)
    assert torch.equal(whole, numbers)
    assert torch.equal(some, numbers[5:25, 3:7])
    assert torch.equal(half, numbers.bfloat16())
    assert sum(heard) == whole.nbytes + some.nbytes + half.nbytes


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(bytes(10))
    with pytest.raises(OSError, match="short ended"):
        run_reads([StagedRead(file, 0, torch.float32, 4, torch.empty(1, 4))], device=CPU, done=lambda _: None)


def test_nothing_to_read_is_done_at_once() -> None:
    heard: list[int] = []
    run_reads([], device=CPU, done=heard.append)
    assert heard == []
