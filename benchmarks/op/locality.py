# SPDX-License-Identifier: Apache-2.0
"""How much of what the CUDA kernels gather comes from L1, by the order in which rows are taken.

    python -m benchmarks.op.locality

A count, no measurement: it needs no GPU. For each shape of a GPU's benchmark with local sampling
points: the bytes of all corners of all points ("gathered"), and the share of them that a block of
256 threads asks for first, which is what crosses from L2 to L1 if L1 holds a block's pixels and
nothing of other blocks. Orders: that of memory, in which a query's heads follow each other; runs
of 64 queries of one head; and such runs as squares of 8 x 8, where queries are pixels. The kernels
take the last that there is (csrc/cuda/rows.cuh).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import options
from vitadapter_ops.testing import cases

THREADS, PACK = 256, 16  # of a block; bytes that a lane loads
RUN, BAND = 64, 8


def rows_of_a_block(channels: int, size: int) -> int:
    """A row has a power of two of lanes, at least four."""
    lanes = 4
    while lanes * PACK < channels * size:
        lanes *= 2
    return THREADS // lanes


def runs(queries: Tensor, heads: int) -> Tensor:
    """(q, m) of each row [Q * M, 2]: RUN of the given queries of one head, then of the next."""
    m = torch.arange(heads)
    return torch.cat([torch.cartesian_prod(m, run).flip(1) for run in queries.split(RUN)])


def banded(grids: cases.Grids) -> Tensor:
    """The pixels of grids, BAND lines at a time, column by column."""
    order, first = [], 0
    for height, width in grids:
        pixels = first + torch.arange(height * width).view(height, width)
        order += [band.t().flatten() for band in pixels.split(BAND)]
        first += height * width
    return torch.cat(order)


def corners(case: cases.Case) -> tuple[Tensor, Tensor]:
    """Pixel numbers [Q, M, K, 4] of one image, and which of them are on the map."""
    locations = replace(case, batch=1).inputs().sampling_locations[0]
    numbers, inside, start = [], [], 0
    for level, (height, width) in enumerate(case.shapes):
        x, y = (locations[:, :, level, :, i] * side - 0.5 for i, side in enumerate((width, height)))
        x = torch.stack([x.floor(), x.floor() + 1] * 2, -1).long()
        y = torch.stack([y.floor(), y.floor(), y.floor() + 1, y.floor() + 1], -1).long()
        numbers.append(start + y * width + x)
        inside.append((x >= 0) & (x < width) & (y >= 0) & (y < height))
        start += height * width
    return torch.cat(numbers, 2), torch.cat(inside, 2)


def first_share(numbers: Tensor, inside: Tensor, rows: Tensor, block: int) -> float:
    """Of the pixels that blocks of rows gather, the share that is new to the block."""
    heads = numbers.shape[1]
    q, m = rows.unbind(1)
    blocks = torch.arange(len(rows)) // block
    plane = blocks * heads + m  # another head's pixel is another pixel
    keys = (plane[:, None, None] * (int(numbers.max()) + 1) + numbers[q, m])[inside[q, m]]
    return len(keys.unique()) / len(keys)


def shares(case: cases.Case, size: int) -> tuple[int, list[float]]:
    """Bytes gathered for one image, and `first_share` in each order."""
    numbers, inside = corners(case)
    every = torch.arange(case.queries)
    orders = [torch.cartesian_prod(every, torch.arange(case.heads)), runs(every, case.heads)]
    if sum(height * width for height, width in case.grids) == case.queries:
        orders.append(runs(banded(case.grids), case.heads))
    block = rows_of_a_block(case.channels, size)
    found = [first_share(numbers, inside, rows, block) for rows in orders]
    return int(inside.sum()) * case.channels * size, found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.op.locality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_cases(parser, [case.name for case in cases.GPU_BENCH])
    dtypes = ["fp32", "bf16"]
    options.add_dtypes(parser, dtypes, default=dtypes, help="dtypes of value (default: both)")
    args = parser.parse_args(argv)
    print("| shape | dtype | gathered, MB an image | order of memory | runs | squares |")
    print("|---|---|---|---|---|---|")
    for case in options.matching(cases.GPU_BENCH, args.cases):
        for dtype in args.dtype:
            size = cases.DTYPES[dtype][0].itemsize
            gathered, found = shares(replace(case, locations="local"), size)
            cells = [f"{share:.2f}" for share in found] + ["-"] * (3 - len(found))
            print(f"| {case.name} | {dtype} | {gathered / 1e6:.0f} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
