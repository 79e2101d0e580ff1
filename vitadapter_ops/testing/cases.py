# SPDX-License-Identifier: Apache-2.0
"""Shapes and inputs of multi-scale deformable attention, for tests and benchmarks of any backend.

`SMALL` and `OFFSETS` are the shapes on which a backend is to be right, edges included; `MODEL`,
`BENCH` and `GPU_BENCH` are those of models. `DTYPES` names what they come in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

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
    """The arguments of one call of `ms_deform_attn`, with the shapes that are documented there."""

    value: Tensor  # [B, S, M, D]
    spatial_shapes: list[tuple[int, int]]
    sampling_locations: Tensor  # [B, Q, M, L, P, 2]
    attention_weights: Tensor  # [B, Q, M, L, P]
    level_start_index: list[int] | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that may get a gradient."""
        return self.value, self.sampling_locations, self.attention_weights

    @property
    def flat_shapes(self) -> list[int]:
        """H0, W0, H1, W1, ..., as the operator's schema has it."""
        return [side for size in self.spatial_shapes for side in size]

    @property
    def starts(self) -> list[int]:
        """First pixel of each level: as given, or one level after the other."""
        return first_pixels(self.spatial_shapes, self.level_start_index)

    def copy(self) -> Inputs:
        """The same in other memory."""
        value, locations, weights = (tensor.clone() for tensor in self.tensors)
        return Inputs(value, self.spatial_shapes, locations, weights, self.level_start_index)

    def to(
        self, dtype: torch.dtype, device: str = "cpu", points: torch.dtype | None = None
    ) -> Inputs:
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


@functools.lru_cache(maxsize=1)
def drawn(case: Case) -> Inputs:
    """`case.inputs()`, kept for the next who asks: for an encoder it takes long. Not to change."""
    return case.inputs()


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


@dataclass(frozen=True)
class OffsetInputs:
    """The arguments of one call of `ms_deform_attn_from_offsets`; K points of all levels."""

    value: Tensor  # [B, S, M, D]
    spatial_shapes: list[tuple[int, int]]
    reference_points: Tensor  # [B or 1, Q, L or 1, 2 or 4]
    sampling_offsets: Tensor  # [B, Q, M, K, 2]
    attention_logits: Tensor  # [B, Q, M, K]
    points_per_level: list[int]
    level_start_index: list[int] | None
    padding_mask: Tensor | None  # [B, S], bool
    offset_scale: Tensor | None  # [K]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What gets a gradient."""
        return (
            self.value,
            self.reference_points,
            self.sampling_offsets,
            self.attention_logits,
        )

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `ms_deform_attn_from_offsets` that hold no gradient."""
        return {
            "points_per_level": self.points_per_level,
            "level_start_index": self.level_start_index,
            "padding_mask": self.padding_mask,
            "offset_scale": self.offset_scale,
        }

    @property
    def arguments(self) -> list[Any]:
        """All, in the order of the operator's schema, without return_weights."""
        sizes = [side for size in self.spatial_shapes for side in size]
        starts = first_pixels(self.spatial_shapes, self.level_start_index)
        return [
            self.value,
            sizes,
            starts,
            self.points_per_level,
            *self.tensors[1:],
            self.padding_mask,
            self.offset_scale,
        ]

    def to(
        self, dtype: torch.dtype, device: str = "cpu", points: torch.dtype | None = None
    ) -> OffsetInputs:
        """A copy with value in `dtype`, offsets and logits in `points` or in `dtype`.

        Reference points and scales are in the dtype of arithmetic.
        """
        points = points or dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        mask, scale = self.padding_mask, self.offset_scale
        return replace(
            self,
            value=self.value.to(device, dtype),
            reference_points=self.reference_points.to(device, compute),
            sampling_offsets=self.sampling_offsets.to(device, points),
            attention_logits=self.attention_logits.to(device, points),
            padding_mask=None if mask is None else mask.to(device),
            offset_scale=None if scale is None else scale.to(device, compute),
        )


@dataclass(frozen=True)
class OffsetCase:
    """A shape of the fused operator, with the letters of `Case`; `points` of each level.

    Reference points lie anywhere, or are the pixel centres of `grids`; they are boxes where `boxes`
    says so, and shared by all images or levels where `shared_*` does.
    """

    name: str
    shapes: Grids
    points: tuple[int, ...]
    batch: int = 2
    queries: int = 7
    heads: int = 3
    channels: int = 8
    boxes: bool = False
    scaled: bool = False
    shared_batch: bool = False
    shared_levels: bool = False
    masked: bool = False
    starts: tuple[int, ...] | None = None
    spread: float = 3.0  # of the offsets, in pixels
    grids: Grids = ()

    def __str__(self) -> str:
        return self.name

    def inputs(
        self, seed: int = 0, dtype: torch.dtype = torch.float64, stored: torch.dtype | None = None
    ) -> OffsetInputs:
        """Random inputs, with every point at least 0.02 pixels from a pixel's centre line.

        Args:
            seed: of the numbers.
            dtype: what they come in.
            stored: the narrowest dtype that offsets and logits will be rounded to; they are
                multiples of its steps, so that no rounding moves a point across a line.
        """
        g = torch.Generator().manual_seed(seed)
        pixels = sum(h * w for h, w in self.shapes)
        levels, total = len(self.shapes), sum(self.points)
        stored = stored or torch.bfloat16
        value = torch.randn(self.batch, pixels, self.heads, self.channels, generator=g)
        boxes = (
            1 if self.shared_batch else self.batch,
            self.queries,
            1 if self.shared_levels else levels,
        )
        if self.grids:
            centres = Case("", self.shapes, 1, self.queries, grids=self.grids).positions(g)
            reference = centres[:, :, None].expand(*boxes, 2)
        else:
            reference = torch.rand(*boxes, 2, generator=g, dtype=torch.float64) * 1.2 - 0.1
        if self.boxes:
            extent = torch.rand(*boxes, 2, generator=g, dtype=torch.float64) * 0.5 + 0.1
            reference = torch.cat((reference, extent), -1)
        reference = reference.float().double()
        size = (self.batch, self.queries, self.heads, total)
        offsets = torch.randn(*size, 2, generator=g, dtype=torch.float64) * self.spread
        logits = torch.randn(size, generator=g, dtype=torch.float64).to(stored)
        scale = None
        if self.scaled:
            scale = (torch.rand(total, generator=g, dtype=torch.float64) + 0.1).float().double()
        mask = torch.rand(self.batch, pixels, generator=g) < 0.3 if self.masked else None
        inputs = OffsetInputs(
            value.double(),
            list(self.shapes),
            reference,
            offsets.to(stored).double(),
            logits.double(),
            list(self.points),
            list(self.starts) if self.starts else None,
            mask,
            scale,
        )
        for _ in range(100):
            position = torch.cat([x for _, x in offset_positions(inputs)], 3) - 0.5
            close = (position - position.round()).abs() < 0.02
            if not close.any():
                break
            moved = inputs.sampling_offsets + torch.rand(close.shape, generator=g).double() * close
            inputs = replace(inputs, sampling_offsets=moved.to(stored).double())
        return inputs.to(dtype)


def first_pixels(shapes: list[tuple[int, int]], starts: list[int] | None) -> list[int]:
    """First pixel of each level: as given, or one level after the other."""
    if starts is not None:
        return starts
    areas = [height * width for height, width in shapes]
    return [sum(areas[:level]) for level in range(len(areas))]


def offset_positions(inputs: OffsetInputs) -> Iterator[tuple[int, Tensor]]:
    """Yields each level and its points' locations [B, Q, M, P, 2] in pixels, from the equation."""
    first = 0
    for level, ((height, width), points) in enumerate(
        zip(inputs.spatial_shapes, inputs.points_per_level, strict=True)
    ):
        here = slice(first, first + points)
        first += points
        offsets = inputs.sampling_offsets[..., here, :]
        reference = inputs.reference_points
        box = reference[:, :, min(level, reference.shape[2] - 1), None, None]
        sides = torch.tensor([width, height], dtype=offsets.dtype, device=offsets.device)
        if box.shape[-1] == 2:
            location = box + offsets / sides
        else:
            given = inputs.offset_scale
            scale = 0.5 / max(points, 1) if given is None else given[here, None]
            location = box[..., :2] + offsets * scale * box[..., 2:]
        yield level, location * sides


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


def detr(name: str, levels: Grids, batch: int) -> tuple[Case, Case]:
    """Encoder and decoder of a Deformable DETR; the decoder with twice the encoder's images."""
    pixels = sum(h * w for h, w in levels)
    return (
        Case(f"encoder-{name}", levels, batch, pixels, 8, 32, spread=0.05, grids=levels),
        Case(f"decoder-{name}", levels, 2 * batch, 300, 8, 32, spread=0.05),
    )


# Levels of images of 800x1066 and 800x1333.
DETR_1066 = ((100, 134), (50, 67), (25, 34), (13, 17))
DETR_1333 = ((100, 167), (50, 84), (25, 42), (13, 21))


def dinov3_adapter(size: str) -> Case:
    """The extractor of DINOv3's adapter, two images of 896x896: 16 heads of half the width."""
    channels = {"S": 12, "B": 24, "L": 32, "H": 40, "7B": 128}[size]
    grids = tuple((896 // s, 896 // s) for s in (8, 16, 32))
    queries = sum(h * w for h, w in grids)
    name = f"dinov3-{size}-896"
    return Case(name, grids[1:2], 2, queries, 16, channels, spread=0.05, grids=grids)


OFFSETS = (
    OffsetCase("one-of-everything", ((1, 1),), (1,), 1, 1, 1, 1, spread=0.3),
    OffsetCase("row-map", ((1, 9),), (4,), channels=3),
    OffsetCase("column-map", ((9, 1),), (3,), channels=5, boxes=True),
    OffsetCase("three-levels", ((8, 12), (4, 6), (2, 3)), (4, 4, 4), masked=True),
    OffsetCase("boxes", ((8, 12), (4, 6), (2, 3)), (4, 4, 4), boxes=True),
    OffsetCase("prime-queries", ((6, 7), (3, 4)), (4, 4), 3, 13, shared_batch=True),
    OffsetCase("shared-reference", ((6, 7), (3, 4)), (2, 2), shared_batch=True, shared_levels=True),
    OffsetCase("shared-boxes", ((6, 7), (3, 4)), (3, 3), boxes=True, shared_levels=True),
    OffsetCase("unequal-points", ((6, 7), (3, 4), (2, 2)), (3, 6, 1), channels=16, masked=True),
    OffsetCase(
        "unequal-scaled-boxes", ((6, 7), (3, 4)), (3, 6), boxes=True, scaled=True, masked=True
    ),
    OffsetCase("a-level-without-points", ((6, 7), (3, 4)), (0, 5), boxes=True),
    OffsetCase("many-points", ((6, 6), (3, 3)), (11, 9), channels=31),
    OffsetCase("far-outside", ((4, 4), (2, 2)), (4, 4), channels=12, spread=20.0),
    OffsetCase("permuted-levels", ((4, 6), (2, 3)), (4, 4), starts=(6, 0), channels=24),
    OffsetCase("wide-channels", ((5, 7),), (4,), queries=5, channels=71, masked=True),
    OffsetCase("channels-128", ((4, 5),), (4,), heads=2, queries=4, channels=128),
)


def fused(case: Case) -> OffsetCase:
    """The shape of a case that has `grids`, with its queries' positions as reference points."""
    points = (case.points,) * len(case.shapes)
    return OffsetCase(
        case.name,
        case.shapes,
        points,
        case.batch,
        case.queries,
        case.heads,
        case.channels,
        shared_batch=True,
        shared_levels=True,
        spread=LOCAL_SPREAD,
        grids=case.grids,
    )


MODEL = tuple(case for size in "SBL" for case in vit_adapter(size, 512))
ALL = SMALL + MODEL
# What benchmarks/op times on a CPU.
BENCH = (
    *MODEL,
    *(case for size in "SBL" for case in vit_adapter(size, 1024)),
    *detr("detr", DETR_1066, 1),
)
# ... and on a GPU, the most telling first.
GPU_BENCH = (
    *detr("800x1333", DETR_1333, 2),
    *(replace(case, name=f"{case.name}-x2", batch=2) for case in vit_adapter("B", 512)),
    dinov3_adapter("L"),
    dinov3_adapter("S"),
    *(replace(case, name=f"{case.name}-x2", batch=2) for case in vit_adapter("L", 1024)),
    dinov3_adapter("7B"),
    *(replace(case, name=f"{case.name}-x2", batch=2) for case in vit_adapter("S", 512)),
    dinov3_adapter("B"),
)
