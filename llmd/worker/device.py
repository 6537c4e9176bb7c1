"""Where this rank computes, in which precision, with how many threads."""

import os
from pathlib import Path
from typing import Literal

import torch

from llmd.config import Dtype
from llmd.errors import StartupFailed


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to run on. Raises StartupFailed if a GPU was asked for and this PyTorch sees none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise StartupFailed("--device cuda: this PyTorch sees no GPU (driver missing, or a CPU build of PyTorch)")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


def choose_dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """The precision of weights and activations."""
    if wanted == "auto":
        # without hardware for it, 16-bit arithmetic on a CPU is slower than float32 and less exact
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, wanted)
    assert isinstance(dtype, torch.dtype)
    return dtype


def num_free_cores() -> int:
    """Cores that this process may use: its affinity, less what a container's quota leaves of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device; of main memory, what the kernel and a container's limit leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    limits = [_meminfo("MemAvailable")]
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text()
    except OSError:
        limit = "max"
    if limit != "max":
        limits.append(int(limit) - int(used))
    return max(0, min(limits))


def _meminfo(field: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
