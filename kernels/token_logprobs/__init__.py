"""Log-probabilities of given tokens, their ranks and the most likely tokens beside them."""

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.token_logprobs import torch_ops
from llmd_kernels.token_logprobs.result import DeviceLogprobs, TokenLogprobs

__all__ = ["DeviceLogprobs", "TokenLogprobs", "token_logprobs", "token_logprobs_on_device"]


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    """logits [R, V] float, token_ids [R] int64, 0 ≤ num_top ≤ V → one TokenLogprobs a row.

    Natural logarithms of the softmax of the logits as they are (no temperature, no filter). Waits for the device.
    """
    if uses_triton(logits):
        return token_logprobs_on_device(logits, token_ids, num_top).on_host()
    return torch_ops.token_logprobs(logits, token_ids, num_top)


def token_logprobs_on_device(logits: Tensor, token_ids: Tensor, num_top: int) -> DeviceLogprobs:
    """The same as tensors on the logits' device; nothing is read back."""
    if uses_triton(logits):
        from llmd_kernels.token_logprobs import triton_ops

        return triton_ops.token_logprobs_on_device(logits, token_ids, num_top)
    return torch_ops.token_logprobs_on_device(logits, token_ids, num_top)
