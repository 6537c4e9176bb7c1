"""Proofs on a device: inside of `launched_on` a kernel that is launched with CPU tensors runs on the device instead.

What the proofs have (cases, rows, host code around kernels) stays as it is; only the interpreter's place is taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


@contextmanager
def launched_on(device: torch.device, *, shuffle: int | None = None) -> Iterator[None]:
    """What `torch.empty` gives inside is poisoned, so that a number that no program writes is found.

    shuffle: not used, a device has an order of its own.
    """
    launch = JITFunction.run

    def run(kernel: JITFunction[Any], *args: Any, **options: Any) -> None:
        copies = _Copies(device)
        launch(kernel, *map(copies.there, args), **{name: copies.there(value) for name, value in options.items()})
        copies.bring_back()

    was_deterministic = torch.are_deterministic_algorithms_enabled()
    # Only with deterministic algorithms does torch fill what it allocates.
    torch.use_deterministic_algorithms(True)
    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]
        torch.use_deterministic_algorithms(was_deterministic)


class _Copies:
    """One launch's tensors on the device. Those that share memory here share it there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}  # address → its bytes here and there

    def there(self, value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            return replace(value, base=self.there(value.base))
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[storage.data_ptr()] = here, torch.empty_like(here, device=self._device).copy_(here)
        _, there = self._storages[storage.data_ptr()]
        empty = torch.empty(0, dtype=value.dtype, device=self._device)
        return empty.set_(there.untyped_storage(), value.storage_offset(), value.shape, value.stride())

    def bring_back(self) -> None:
        for here, there in self._storages.values():
            here.copy_(there)
