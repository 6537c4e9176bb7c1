"""The operations of Triton's interpreter, mended: small floats compute in float32 and are rounded once an operation.

Stock Triton (3.6 to 3.9) holds bfloat16 as uint16 and then adds, multiplies and `dot`s those integers; it cuts float32
off instead of rounding it, flushes float8 denormals, and lets NaN win in a maximum that must ignore it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle

from tests.kernels.proof.memory import Access, Memory
from tests.kernels.proof.small_floats import Array, is_small_float, narrow, widen

Ufunc = Callable[..., Array]


class Builder(stock.InterpreterBuilder):  # type: ignore[misc]
    """Runs a kernel's operations on numpy arrays; `memory` watches every address, `program` says who touches it."""

    def __init__(self, memory: Memory, *, check_overflow: bool) -> None:
        super().__init__()
        self.options = replace(self.options, sanitize_overflow=check_overflow, debug=check_overflow)
        self.memory = memory
        # What happens before an atomic: another program may have its turn.
        self.before_atomic: Callable[[], None] = lambda: None

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        _, num_y, num_z = self.grid_dim
        self.memory.program = (x * num_y + y) * num_z + z

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(narrow(np.array([value]), tl.bfloat16), tl.bfloat16)

    def create_splat(self, block: tl.dtype, arg: TensorHandle) -> TensorHandle:
        """A comparison's truth stays one: stock Triton gives it the dtype of what was compared."""
        dtype = tl.int1 if arg.data.dtype == bool else arg.dtype.scalar
        return TensorHandle(np.full(block.shape, arg.data, dtype=arg.data.dtype), dtype)

    def create_masked_load(self, ptrs: TensorHandle, mask: TensorHandle, *args: Any, **kwargs: Any) -> TensorHandle:
        self._touch("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, *args, **kwargs)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *args: Any, **kwargs: Any
    ) -> Any:
        self._touch("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def create_atomic_rmw(
        self, op: Any, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, sem: Any, scope: Any
    ) -> TensorHandle:
        self.before_atomic()
        self._touch("atomic", ptrs, mask, ordering=sem)
        return super().create_atomic_rmw(op, ptrs, value, mask, sem, scope)

    def create_atomic_cas(self, ptrs: TensorHandle, cmp: Any, value: Any, sem: Any, scope: Any) -> TensorHandle:
        self.before_atomic()
        self._touch("atomic", ptrs, TensorHandle(np.ones_like(ptrs.data, dtype=bool), tl.int1), ordering=sem)
        return super().create_atomic_cas(ptrs, cmp, value, sem, scope)

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        wide = widen(src.data, src.dtype)
        dtype = dst_type.scalar
        if is_small_float(dtype):
            return TensorHandle(narrow(wide, dtype), dtype)
        return TensorHandle(wide.astype(stock._get_np_dtype(dtype)), dtype)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any) -> TensorHandle:
        return self.cast_impl(src, dst_type)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Ufunc) -> TensorHandle:
        if not is_small_float(lhs.dtype):
            return super().binary_op(lhs, rhs, op)
        return _rounded(op(widen(lhs.data, lhs.dtype), widen(rhs.data, rhs.dtype)), lhs.dtype)

    def unary_op(self, arg: TensorHandle, op: Ufunc) -> TensorHandle:
        if not is_small_float(arg.dtype):
            return super().unary_op(arg, op)
        return _rounded(op(widen(arg.data, arg.dtype)), arg.dtype)

    def create_clampf(self, arg: TensorHandle, low: TensorHandle, high: TensorHandle, _: Any) -> TensorHandle:
        wide = [widen(handle.data, handle.dtype) for handle in (arg, low, high)]
        return _rounded(np.clip(*wide), arg.dtype)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        wide = [widen(handle.data, handle.dtype) for handle in (x, y, z)]
        return _rounded(wide[0] * wide[1] + wide[2], z.dtype)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_rsqrt(self, arg: TensorHandle) -> TensorHandle:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def create_erf(self, arg: TensorHandle) -> TensorHandle:
        return self.unary_op(arg, stock.np_erf_fp64 if arg.dtype.scalar == tl.float64 else stock.np_erf_fp32)

    def create_dot(self, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *_: Any) -> TensorHandle:
        """Sums in float64, rounded once: for bfloat16 and float16 exact, so that no shape has an order of its own.

        tf32 is not imitated: the device cuts float32 operands to 10 bits unless the kernel asks for more.
        """
        wide_a, wide_b = widen(a.data, a.dtype), widen(b.data, b.dtype)
        exact = np.float64 if wide_a.dtype.kind == "f" else acc.data.dtype
        total = np.matmul(wide_a.astype(exact), wide_b.astype(exact)) + acc.data
        return TensorHandle(total.astype(acc.data.dtype), acc.dtype.scalar)

    def _touch(self, access: Access, ptrs: TensorHandle, mask: TensorHandle, ordering: Any = None) -> None:
        shape = np.broadcast_shapes(ptrs.data.shape, mask.data.shape)
        addresses = np.broadcast_to(ptrs.data, shape)[np.broadcast_to(mask.data, shape)]
        itemsize = stock._get_np_dtype(ptrs.get_element_ty()).itemsize
        self.memory.touch(access, addresses, itemsize, ordering="" if ordering is None else ordering.name)


def _rounded(result: Array, dtype: tl.dtype) -> TensorHandle:
    """A result of wide operands as a handle of `dtype`; what a comparison gives stays boolean."""
    if result.dtype != bool and is_small_float(dtype):
        result = narrow(result, dtype)
    return TensorHandle(result, dtype.scalar)
