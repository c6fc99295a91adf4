"""Buffers are kept for the next block, and only as many and as large as blocks are."""

from __future__ import annotations

import numpy as np

from toolchain.merging import stream


def test_a_block_is_used_again_and_a_whole_tensor_is_not() -> None:
    buffers = stream.Buffers()
    block, whole = np.empty(1 << 20, np.uint8), np.empty(stream.LARGEST + 1, np.uint8)
    buffers.give(whole)
    assert buffers.take(1000) is not whole
    buffers.give(block)
    assert buffers.take(1000) is block


def test_no_more_are_kept_than_are_in_flight() -> None:
    buffers = stream.Buffers()
    for _ in range(3 * stream._MOST):
        buffers.give(np.empty(10, np.uint8))
    assert buffers._free.qsize() == stream._MOST
