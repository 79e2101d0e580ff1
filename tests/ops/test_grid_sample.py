# SPDX-License-Identifier: Apache-2.0
"""The operators in terms of grid_sample, which exporters write: the reference's numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from vitadapter_ops import _grid_sample, _ops, reference
from vitadapter_ops.testing.tolerances import DEFINITION_ULPS, assert_same_definition

SHAPES = [5, 4, 2, 3, 1, 1]
STARTS = [0, 20, 26]
PIXELS, HEADS, CHANNELS = 27, 2, 3

_ODD = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30]


def _values(batch):
    return torch.randn(batch, PIXELS, HEADS, CHANNELS, dtype=torch.float64)


@pytest.mark.parametrize(
    ("batch", "queries", "points"), [(2, 5, 3), (1, 1, 1), (0, 5, 3), (2, 0, 3), (2, 5, 0)]
)
def test_sampling_is_the_references(batch, queries, points):
    value = _values(batch)
    locations = torch.rand(batch, queries, HEADS, 3, points, 2, dtype=torch.float64) * 3 - 1
    weights = torch.rand(batch, queries, HEADS, 3, points, dtype=torch.float64)
    arguments = (value, SHAPES, STARTS, locations, weights)
    exact = reference.ms_deform_attn(*arguments)
    got = _grid_sample.ms_deform_attn(*arguments)
    assert got.shape == exact.shape
    if got.numel():
        assert_same_definition("out", got, exact)


def test_levels_may_overlap_and_leave_pixels_out():
    value = _values(2)
    locations = torch.rand(2, 5, HEADS, 3, 2, 2, dtype=torch.float64)
    weights = torch.rand(2, 5, HEADS, 3, 2, dtype=torch.float64)
    arguments = (value, SHAPES, [7, 3, 0], locations, weights)
    assert_same_definition(
        "out", _grid_sample.ms_deform_attn(*arguments), reference.ms_deform_attn(*arguments)
    )


def test_points_off_the_map_count_for_nothing():
    value = _values(1)
    value[:, 0] = float("inf")  # the map of one pixel has none beside it
    value[:, 26] = float("inf")
    pairs = [(x, 0.5) for x in _ODD] + [(0.5, y) for y in _ODD] + [(2.0, 0.5), (-1.0, -1.0)]
    locations = torch.tensor(pairs, dtype=torch.float64).expand(1, 1, HEADS, 3, -1, -1)
    weights = torch.full(locations.shape[:-1], float("nan"), dtype=torch.float64)
    out = _grid_sample.ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("points", "coordinates", "levels", "scaled"),
    [
        ([2, 2, 2], 2, 3, False),
        ([3, 1, 1], 2, 1, False),
        ([3, 0, 2], 4, 3, False),
        ([2, 2, 2], 4, 1, True),
        ([1, 4, 2], 4, 3, True),
    ],
)
def test_one_step_is_the_references(points, coordinates, levels, scaled, dtype):
    total = sum(points)
    value = _values(2).to(dtype)
    boxes = torch.rand(1, 5, levels, coordinates, dtype=torch.float64)
    offsets = torch.randn(2, 5, HEADS, total, 2, dtype=torch.float64).to(dtype)
    logits = torch.randn(2, 5, HEADS, total, dtype=torch.float64).to(dtype)
    scale = torch.rand(total, dtype=torch.float64) if scaled else None
    for mask, wanted in itertools.product((None, torch.rand(2, PIXELS) < 0.4), (False, True)):
        levels_of = (SHAPES, STARTS, points)
        others = (boxes, offsets, logits, mask, scale, wanted)
        got = _grid_sample.ms_deform_attn_from_offsets(
            _grid_sample.ms_deform_attn, value, *levels_of, *others
        )
        exact = reference.ms_deform_attn_from_offsets(value, *levels_of, *others)
        for mine, theirs in zip(got, exact, strict=True):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            if dtype == torch.float64 and mine.numel():
                assert_same_definition("result", mine, theirs, DEFINITION_ULPS)
            elif mine.numel():
                ulps = 8 * torch.finfo(dtype).eps * theirs.abs().max().item()
                torch.testing.assert_close(mine, theirs, rtol=0, atol=ulps)


def test_torch_export_keeps_the_operators_and_their_fakes(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("torch.export asked for a decomposition")

    class Model(torch.nn.Module):
        def forward(self, value, locations, weights):
            height = value.shape[1] // 4
            return torch.ops.vitadapter_ops.ms_deform_attn(
                value, [height, 4], [0], locations, weights
            )

    overload = torch.ops.vitadapter_ops.ms_deform_attn.default
    monkeypatch.setitem(torch._decomp.decomposition_table, overload, refuse)
    monkeypatch.setitem(_ops._composites, "ms_deform_attn", refuse)
    arguments = (torch.randn(2, 20, 2, 3), torch.rand(2, 5, 2, 1, 3, 2), torch.rand(2, 5, 2, 1, 3))
    dims = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, None, None)
    program = torch.export.export(Model(), arguments, dynamic_shapes=dims)
    program = program.run_decompositions()
    assert overload in {node.target for node in program.graph.nodes}
