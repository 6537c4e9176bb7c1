"""A device whose memory is not the host's: tensors of PyTorch's device "meta", and a stream that counts its copies.

Kernels are not launched, nothing is computed, and results are zeros; but which tensor is where is as on a GPU. So a
copy that does not go through the stream is found: `UnseenCopy` is raised where it is made.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from triton.runtime.jit import JITFunction

from llmd.worker.stream import Download
from llmd_kernels import dispatch
from llmd_kernels.paged_attention import triton_ops

DEVICE = torch.device("meta")


class UnseenCopy(Exception):
    """Something was copied between host and device, and not by the stream."""


@dataclass
class CountingStream:
    """Copies, and sizes of what was copied to the host; what arrives there is zeros."""

    num_uploads: int = 0
    num_downloads: int = 0

    def upload(self, numbers: npt.NDArray[np.int32], target: Tensor) -> None:
        assert target.is_meta
        assert target.dtype == torch.int32
        assert 0 < len(numbers) <= len(target)
        self.num_uploads += 1

    def download(self, source: Tensor) -> Download:
        assert source.is_meta
        # what is empty is waited for and not copied
        self.num_downloads += source.numel() > 0
        return Arrived(torch.zeros(source.shape, dtype=source.dtype))

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        work()
        return lambda: None


@dataclass(frozen=True)
class Arrived:
    numbers: Tensor

    def wait(self) -> Tensor:
        return self.numbers


@contextmanager
def separate_memory() -> Iterator[None]:
    """Inside, tensors of DEVICE have kernels, as those of a large GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "TRITON_DEVICES", {DEVICE.type})
        patch.setattr(triton_ops, "processors", lambda _: triton_ops.Processors("sm_90", 132))
        patch.setattr(JITFunction, "run", _launch)
        yield


@contextmanager
def no_unseen_copies() -> Iterator[None]:
    """Inside, what copies between host and device raises UnseenCopy."""
    with _NoCopiesOfData(), _NoCopiesOfTensors():
        yield


def _launch(_kernel: Any, *args: Any, **options: Any) -> None:
    for argument in (*args, *options.values()):
        if isinstance(argument, Tensor) and not argument.is_meta:
            raise UnseenCopy("a kernel was given memory of the host")


# What makes tensors of the host's numbers: where they are to be on the device, PyTorch copies.
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}


class _NoCopiesOfData(TorchFunctionMode):
    """Lists and arrays that become tensors on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FROM_DATA and result.is_meta:
            raise UnseenCopy(func.__name__)
        if func in _INDEXING and args[0].is_meta and any(_is_data(index) for index in _indices(args[1])):
            raise UnseenCopy(f"{func.__name__} by numbers of the host")
        return result


def _indices(index: Any) -> Iterable[Any]:
    return index if isinstance(index, tuple) else (index,)


def _is_data(index: Any) -> bool:
    return isinstance(index, list | range | np.ndarray) or (isinstance(index, Tensor) and not index.is_meta)


class _NoCopiesOfTensors(TorchDispatchMode):
    """Tensors that are copied, or used where they are not. A number on the host may go with a launch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        devices = {tensor.device for tensor in tensors if tensor.dim() > 0}
        if name in ("aten::copy_", "aten::_to_copy"):
            devices |= {tensor.device for tensor in tensors} | {kwargs.get("device") or tensors[0].device}
        if len(devices) > 1:
            raise UnseenCopy(name)
        return func(*args, **kwargs)
