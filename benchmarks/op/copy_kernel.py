# SPDX-License-Identifier: Apache-2.0
"""The copy kernel behind the bandwidths of a GPU: a stream from L2 or memory, and back."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements at once: with 8 warps, four loads of 16 bytes in flight per thread
WARPS = 8
PROGRAMS = 8  # for each multiprocessor: as many as fit


@triton.jit
def copy_kernel(target, source, rounds, blocks, BLOCK: tl.constexpr):
    # .cg: past L1, so that every round is served by L2 or by memory. Fewer than 2^31 elements.
    for _ in range(rounds):
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(target + at, tl.load(source + at, cache_modifier=".cg"), cache_modifier=".cg")


def copy(target: Tensor, source: Tensor, rounds: int, multiprocessors: int) -> None:
    """Copies `source` to `target`, both of a multiple of BLOCK elements, `rounds` times over."""
    blocks = source.numel() // BLOCK
    grid = (min(blocks, PROGRAMS * multiprocessors),)
    copy_kernel[grid](target, source, rounds, blocks, BLOCK=BLOCK, num_warps=WARPS)
