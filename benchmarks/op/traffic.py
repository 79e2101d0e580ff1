# SPDX-License-Identifier: Apache-2.0
"""How many bytes deformable attention moves at least, and what a machine makes of them.

Two numbers bound an implementation. What it gathers: for each sampling point the D channels of up
to four pixels, wherever they lie, by far the most, and served by the caches. And what has to cross
the memory bus even with an endless cache: every input read once and every result written once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.op.bandwidth import Machine
from vitadapter_ops.testing import cases

PASSES = ("forward", "backward")
BOTH = "both"  # forward with a graph, then backward
LINE = 64  # bytes of a cache line
# Of a level's bandwidth: with less than this something else decides, such as the arithmetic or the
# latency of loads whose addresses are known late.
BOUND_SHARE = 0.5


def pixels_gathered(inputs: cases.Inputs) -> int:
    """Corners of all sampling points that are on the map, for each head."""
    count = 0
    for level, (height, width) in enumerate(inputs.spatial_shapes):
        at = inputs.sampling_locations[:, :, :, level].double()
        x, y = at[..., 0] * width - 0.5, at[..., 1] * height - 0.5
        count += int((_inside(x, width) * _inside(y, height)).sum())
    return count


def _inside(coordinate: torch.Tensor, side: int) -> torch.Tensor:
    """How many of a coordinate's two neighbours are within 0 ... side - 1."""
    low = coordinate.floor()
    return ((low >= 0) & (low < side)).long() + ((low >= -1) & (low < side - 1)).long()


@dataclass(frozen=True)
class Traffic:
    """What one pass moves.

    Attributes:
        pixels: pixels gathered.
        row: bytes read of each.
        sums: bytes of the pixel's gradient, which are read and written; 0 in the forward pass.
        least: bytes of all arguments and results, once; of value what is gathered, if that is less.
    """

    pixels: int
    row: int
    sums: int
    least: int

    @property
    def gathered(self) -> int:
        """Bytes read, and of gradients also written, at addresses that depend on the data."""
        return self.pixels * (self.row + 2 * self.sums)

    def loads(self, vector_bytes: int) -> int:
        """Vector loads that read this much."""
        return self.pixels * (-(-self.row // vector_bytes) - (-self.sums // vector_bytes))


def traffic(inputs: cases.Inputs, which: str) -> Traffic:
    value, locations, weights = inputs.tensors
    batch, _, heads, channels = value.shape
    size = value.element_size()
    pixels = pixels_gathered(inputs)
    points = locations.nbytes + weights.nbytes
    out = batch * locations.shape[1] * heads * channels * size
    read = min(value.nbytes, pixels * channels * size) + points
    forward = Traffic(pixels, channels * size, 0, read + out)
    if which == "forward":
        return forward
    # The gradient of value is accumulated in fp32 where value is stored in 16 bits.
    sums = channels * max(size, 4)
    backward = Traffic(pixels, channels * size, sums, read + out + value.nbytes + points)
    if which == "backward":
        return backward
    return Traffic(pixels, 2 * backward.row, sums, forward.least + backward.least)


def plane_bytes(inputs: cases.Inputs) -> tuple[int, int]:
    """What one head of one image takes in a cache: packed, and as the CPU kernels read it.

    They copy it, packed and in fp32 at least, where points are more than pixels. Elsewhere its
    pixels lie M * D apart.

    A cache places a line by some bits of its address. Where the distance of two pixels is a
    multiple of a power of two, lines share the same few places, and the plane takes as much of the
    cache as if it were that much larger.
    """
    _, pixels, heads, channels = inputs.value.shape
    _, queries, _, levels, points = inputs.attention_weights.shape
    row = channels * inputs.value.element_size()
    packed = pixels * row
    if queries * levels * points >= pixels:
        return packed, pixels * channels * max(inputs.value.element_size(), 4)
    lines = math.ceil(row / LINE)
    apart, rest = divmod(heads * row, LINE)
    places = max(lines, apart & -apart) if rest == 0 else lines
    return packed, max(packed, pixels * places * LINE)


@dataclass(frozen=True)
class Limit:
    """How far from the machine's limits a measurement is.

    Attributes:
        packed, read: names of the levels that hold one head's plane (see `plane_bytes`).
        served_by: the level that held what was gathered: `read`'s, or a nearer one where it
            delivers less than was measured, which is so when neighbouring queries share pixels.
        share: of that level's bandwidth.
        of_nearest: of the nearest cache's bandwidth, which nothing can pass.
        of_memory: of the memory's bandwidth that `Traffic.least` takes.
        bound: what holds it back.
    """

    packed: str
    read: str
    served_by: str
    share: float
    of_nearest: float
    of_memory: float
    bound: str


def limit(machine: Machine, moved: Traffic, planes: tuple[int, int], seconds: float) -> Limit:
    levels = machine.levels
    packed, read = (machine.fitting(size) for size in planes)
    gb_per_s = moved.gathered / seconds / 1e9
    served = read
    while served > 0 and gb_per_s > levels[served].gb_per_s:
        served -= 1
    share = gb_per_s / levels[served].gb_per_s
    of_memory = moved.least / seconds / 1e9 / levels[-1].gb_per_s
    if of_memory >= max(share, BOUND_SHARE):
        bound = "memory"
    elif share >= BOUND_SHARE:
        bound = levels[served].name
    else:
        bound = "not bandwidth"
    of_nearest = gb_per_s / levels[0].gb_per_s
    names = (levels[packed].name, levels[read].name, levels[served].name)
    return Limit(*names, share, of_nearest, of_memory, bound)
