# SPDX-License-Identifier: Apache-2.0
"""The shapes that decide between kernels, and their inputs, which are drawn on the device."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu.predictions import DECISIVE, SIZES
from vitadapter_ops.testing import cases

DTYPES = tuple(SIZES)


def decisive(rehearse: bool) -> list[cases.Case]:
    known = {case.name: replace(case, locations="local") for case in cases.GPU_BENCH}
    chosen = [known[name] for name in DECISIVE]
    if rehearse:
        levels = ((6, 8), (3, 4))
        small = {"shapes": levels, "batch": 1, "heads": 2}
        chosen = [
            replace(chosen[0], **small, queries=60, grids=levels),
            replace(chosen[1], **small, queries=7),
        ]
    return chosen


def draw(case: cases.Case, dtypes: str, device: str) -> cases.Inputs:
    """Local points as `Case.inputs` has them, drawn on the device; fp32 has every location."""
    dtype, points = cases.DTYPES[dtypes]
    g = torch.Generator(device).manual_seed(0)
    pixels = sum(height * width for height, width in case.shapes)
    size = (case.batch, case.queries, case.heads, len(case.shapes), case.points)
    value = torch.randn(case.batch, pixels, case.heads, case.channels, generator=g, device=device)
    positions = case.positions(torch.Generator().manual_seed(0)).float().to(device)
    sides = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float32, device=device)
    noise = torch.randn(*size, 2, generator=g, device=device) * cases.LOCAL_SPREAD
    locations = positions[:, :, None, None, None] + noise / sides[:, None]
    weights = torch.rand(size, generator=g, device=device)
    weights = weights / weights.sum((3, 4), keepdim=True)
    return cases.Inputs(
        value.to(dtype), list(case.shapes), locations.to(points), weights.to(points), None
    )


def draw_offsets(case: cases.Case, dtypes: str, device: str) -> cases.OffsetInputs:
    _, points = cases.DTYPES[dtypes]
    g = torch.Generator(device).manual_seed(0)
    some = draw(case, dtypes, device)
    total = len(case.shapes) * case.points
    size = (case.batch, case.queries, case.heads, total)
    offsets = torch.randn(*size, 2, generator=g, device=device) * cases.LOCAL_SPREAD
    reference = case.positions(torch.Generator().manual_seed(0))[:1, :, None].float().to(device)
    return cases.OffsetInputs(
        some.value,
        some.spatial_shapes,
        reference,
        offsets.to(points),
        torch.randn(size, generator=g, device=device).to(points),
        [case.points] * len(case.shapes),
        None,
        None,
        None,
    )
