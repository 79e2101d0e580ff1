# SPDX-License-Identifier: Apache-2.0
"""Inputs of multi-scale deformable attention, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Grids = tuple[tuple[int, int], ...]  # (H, W) of each

# Of local sampling points around their query, in pixels of the level they sample. Trained models
# look a few pixels away.
LOCAL_SPREAD = 2.0

# Dtype of value, dtype of locations and weights.
DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16_points_fp32": (torch.float16, torch.float32),
    "bf16_points_fp32": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    value: Tensor
    spatial_shapes: list[tuple[int, int]]
    sampling_locations: Tensor
    attention_weights: Tensor
    level_start_index: list[int] | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.sampling_locations, self.attention_weights

    @property
    def flat_shapes(self) -> list[int]:
        """H0, W0, H1, W1, ..., as the operator's schema has it."""
        return [side for size in self.spatial_shapes for side in size]

    @property
    def starts(self) -> list[int]:
        """First pixel of each level: as given, or one level after the other."""
        if self.level_start_index is not None:
            return self.level_start_index
        areas = [height * width for height, width in self.spatial_shapes]
        return [sum(areas[:level]) for level in range(len(areas))]

    def to(self, dtype: torch.dtype, device: str = "cpu", points: torch.dtype | None = None):
        """A copy with value in `dtype`; locations and weights in `points`, or in `dtype`."""
        points = points or dtype
        return Inputs(
            self.value.to(device, dtype),
            self.spatial_shapes,
            self.sampling_locations.to(device, points),
            self.attention_weights.to(device, points),
            self.level_start_index,
        )


@dataclass(frozen=True)
class Case:
    """A shape: B batch, Q queries, M heads, D channels per head, P points, and the levels.

    Sampling points lie anywhere ("uniform"), or around their query's own position ("local"): the
    pixel centres of `grids`, one after the other and again from the first where they are fewer than
    the queries; without grids anywhere on the map.
    """

    name: str
    shapes: Grids
    batch: int = 2
    queries: int = 7
    heads: int = 3
    channels: int = 8
    points: int = 4
    starts: tuple[int, ...] | None = None
    pixels: int | None = None
    spread: float = 0.3  # how far beyond the map, as a fraction of it, uniform locations may lie
    locations: str = "uniform"
    grids: Grids = ()

    def __str__(self) -> str:
        return self.name

    def positions(self, generator: torch.Generator) -> Tensor:
        """Each query's own position [B, Q, 2], (x, y) as fractions of the map."""
        if not self.grids:
            size = (self.batch, self.queries, 2)
            return torch.rand(size, generator=generator, dtype=torch.float64)
        centres = []
        for h, w in self.grids:
            y = (torch.arange(h, dtype=torch.float64) + 0.5) / h
            x = (torch.arange(w, dtype=torch.float64) + 0.5) / w
            centres.append(torch.cartesian_prod(y, x).flip(-1))
        every = torch.cat(centres)
        return every[torch.arange(self.queries) % len(every)].expand(self.batch, -1, -1)

    def _locations(self, generator: torch.Generator) -> Tensor:
        """[B, Q, M, L, P, 2] in fp64."""
        size = (self.batch, self.queries, self.heads, len(self.shapes), self.points, 2)
        if self.locations == "uniform":
            locations = torch.rand(size, generator=generator, dtype=torch.float64)
            return locations * (1 + 2 * self.spread) - self.spread
        if self.locations != "local":
            raise ValueError(f"locations: expected uniform or local, got {self.locations!r}")
        around = self.positions(generator)[:, :, None, None, None]
        pixels = torch.randn(size, generator=generator, dtype=torch.float64) * LOCAL_SPREAD
        sides = torch.tensor([(w, h) for h, w in self.shapes], dtype=torch.float64)
        return around + pixels / sides[:, None]

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
        """Random inputs, with every sampling point at least 0.05 pixels from a pixel's centre line.

        On those lines the gradient of the location jumps, and a difference in the last bit of a
        coordinate would show as a difference of the whole gradient.
        """
        g = torch.Generator().manual_seed(seed)
        pixels = self.pixels or sum(h * w for h, w in self.shapes)
        value = torch.randn(self.batch, pixels, self.heads, self.channels, generator=g)
        locations = self._locations(g)
        for level, (h, w) in enumerate(self.shapes):
            scale = torch.tensor([w, h], dtype=torch.float64)
            pixel = locations[:, :, :, level] * scale - 0.5
            pixel = pixel.floor() + (pixel - pixel.floor()).clamp(0.05, 0.95)
            locations[:, :, :, level] = (pixel + 0.5) / scale
        weights = torch.rand(locations.shape[:-1], generator=g, dtype=torch.float64)
        weights = weights / weights.sum((3, 4), keepdim=True).clamp_min(1e-9)
        return Inputs(
            value.to(dtype),
            list(self.shapes),
            # Through fp32, so that the fp64 run sees the very locations of the fp32 run.
            locations.float().to(dtype),
            weights.float().to(dtype),
            list(self.starts) if self.starts else None,
        )


SMALL = (
    Case("one-of-everything", ((1, 1),), 1, 1, 1, 1, 1),
    Case("row-map", ((1, 9),), channels=3),
    Case("column-map", ((9, 1),), channels=5),
    Case("three-levels", ((8, 12), (4, 6), (2, 3)), channels=8),
    Case("five-levels", ((9, 7), (5, 4), (3, 2), (2, 1), (1, 1)), points=2, channels=16),
    Case("odd-channels", ((5, 7), (3, 4)), channels=31),
    Case("wide-channels", ((5, 7),), channels=71, queries=5),
    Case("channels-12", ((6, 5), (3, 3)), channels=12),
    Case("channels-64", ((6, 5),), channels=64),
    Case("channels-128", ((4, 5),), channels=128, heads=2, queries=4),
    Case("one-point", ((6, 6), (3, 3)), points=1),
    Case("many-points", ((6, 6),), points=11),
    Case("far-outside", ((4, 4), (2, 2)), spread=3.0),
    Case("permuted-levels", ((4, 6), (2, 3)), starts=(6, 0)),
    Case("overlapping-levels", ((4, 6), (4, 6), (2, 3)), starts=(0, 0, 10), pixels=24),
    Case("gap-between-levels", ((2, 3), (2, 2)), starts=(1, 9), pixels=15),
)


def vit_adapter(size: str, image: int) -> tuple[Case, Case]:
    """The injector and extractor of ViT-Adapter-S, -B or -L for a square image, batch 1."""
    heads, channels = {"S": (6, 64), "B": (12, 32), "L": (16, 32)}[size]
    grids = tuple((image // s, image // s) for s in (8, 16, 32))
    tokens = sum(h * w for h, w in grids)
    vit = grids[1][0] * grids[1][1]
    name = f"{size}-{image}"
    return (
        Case(f"injector-{name}", grids, 1, vit, heads, channels, spread=0.05, grids=grids[1:2]),
        Case(f"extractor-{name}", grids[1:2], 1, tokens, heads, channels, spread=0.05, grids=grids),
    )


def deformable_detr() -> tuple[Case, Case]:
    """Encoder and decoder of Deformable DETR for an 800x1066 image; the decoder with two images."""
    levels = ((100, 134), (50, 67), (25, 34), (13, 17))
    pixels = sum(h * w for h, w in levels)
    return (
        Case("encoder-detr", levels, 1, pixels, 8, 32, spread=0.05, grids=levels),
        Case("decoder-detr", levels, 2, 300, 8, 32, spread=0.05),
    )


MODEL = tuple(case for size in "SBL" for case in vit_adapter(size, 512))
ALL = SMALL + MODEL
# What benchmarks/op.py times.
BENCH = (
    *MODEL,
    *(case for size in "SBL" for case in vit_adapter(size, 1024)),
    *deformable_detr(),
)
