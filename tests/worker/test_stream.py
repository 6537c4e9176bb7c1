"""What a stream of a GPU keeps on the host: buffers that come back and are given out again."""

import torch

from llmd.worker.stream import PinnedBuffers


def test_a_buffer_that_is_given_back_is_the_next_one_of_its_size() -> None:
    buffers = PinnedBuffers()
    first, second = buffers.take(100), buffers.take(100)
    assert min(first.nbytes, second.nbytes) >= 100
    assert first.data_ptr() != second.data_ptr()
    buffers.give_back(first)
    assert buffers.take(1000).data_ptr() != first.data_ptr()
    assert buffers.take(70).data_ptr() == first.data_ptr()
    assert buffers.take(70).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_buffers_begin_where_any_dtype_may() -> None:
    buffers = PinnedBuffers()
    for num_bytes in (0, 8, 24, 4096):
        assert buffers.take(num_bytes)[:num_bytes].view(torch.float64).numel() == num_bytes // 8
