"""`all_reduce_add_rms_norm` between two processes: the order of the ranks, to the bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llmd_kernels import all_reduce_add_rms_norm, rms_norm
from llmd_kernels.all_reduce_add_rms_norm import cost, reference


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*shape, generator=generator) for shape in ((3, 5, 40), (5, 40), (40,)))
    return x.bfloat16(), residual.bfloat16(), weight.bfloat16()


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    x, residual, weight = inputs()
    group = dist.group.WORLD
    assert group is not None
    torch.save(all_reduce_add_rms_norm(x[rank], residual, weight, 1e-5, ranks=group), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_get_the_sum_in_their_order(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=3)  # type: ignore[no-untyped-call]
    x, residual, weight = inputs()
    new_residual = (x[0].float() + x[1].float() + x[2].float() + residual.float()).bfloat16()
    normed = rms_norm(new_residual, weight, 1e-5)
    exact, _ = reference.all_reduce_add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), exact, rtol=2e-2, atol=2e-2)
    for rank in range(3):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(result[0], normed)
        assert torch.equal(result[1], new_residual)


def test_cost() -> None:
    x, residual, weight = inputs()
    parts = x.numel() * 2
    own = 5 * residual.numel() * 2  # x, its copy, residual, both results
    assert cost.bytes_moved(5, 40, 3, itemsize=2) == parts + own + weight.numel() * 2
    assert cost.bytes_received(5, 40, 3, itemsize=2) == parts * 2 // 3
