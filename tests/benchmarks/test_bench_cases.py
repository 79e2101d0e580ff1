# SPDX-License-Identifier: Apache-2.0
"""vitadapter_ops.testing.cases: where the queries of benchmarked shapes are and where they look."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from op_results import TINY
from vitadapter_ops.testing import cases


def test_local_positions_are_the_pixel_centres_of_the_grids_in_turn():
    case = dataclasses.replace(TINY, grids=((1, 2), (2, 1)), queries=5)
    expected = [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75], [0.25, 0.5]]
    assert case.positions(torch.Generator())[0].tolist() == expected


@pytest.mark.parametrize("case", cases.BENCH[:2], ids=str)
def test_local_points_lie_two_pixels_around_their_query(case):
    case = dataclasses.replace(case, locations="local")
    away = (
        case.inputs().sampling_locations - case.positions(torch.Generator())[:, :, None, None, None]
    )
    for level, (height, width) in enumerate(case.shapes):
        pixels = away[:, :, :, level] * torch.tensor([width, height])
        assert pixels.mean().abs() < 0.05
        assert pixels.std() == pytest.approx(cases.LOCAL_SPREAD, rel=0.02)


def test_grids_of_every_benchmarked_case_have_one_position_for_each_query():
    for case in cases.BENCH:
        if case.grids:
            assert sum(h * w for h, w in case.grids) == case.queries


def test_unknown_locations_are_refused():
    with pytest.raises(ValueError, match="expected uniform or local, got 'global'"):
        dataclasses.replace(TINY, locations="global").inputs()
