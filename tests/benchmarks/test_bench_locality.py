# SPDX-License-Identifier: Apache-2.0
"""benchmarks/op/locality.py: what a block of rows gathers, and how often for the first time."""

from __future__ import annotations

import pytest
import torch

from benchmarks.op import locality
from vitadapter_ops.testing import cases


@pytest.mark.parametrize(
    ("channels", "size", "rows"), [(32, 4, 32), (32, 2, 64), (12, 2, 64), (40, 4, 16), (128, 4, 8)]
)
def test_rows_of_a_block(channels, size, rows):
    assert locality.rows_of_a_block(channels, size) == rows


def test_only_the_first_look_at_a_pixel_counts():
    # Two queries, two heads, one point: both queries look at the same four pixels.
    numbers = torch.arange(4).expand(2, 2, 1, 4)
    inside = torch.ones(2, 2, 1, 4, dtype=torch.bool)
    in_memory = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    by_head = locality.runs(torch.arange(2), heads=2)
    assert by_head.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert locality.first_share(numbers, inside, in_memory, 2) == 1
    assert locality.first_share(numbers, inside, by_head, 2) == 0.5
    assert locality.first_share(numbers, inside, in_memory, 4) == 0.5


def test_squares_share_more_than_lines():
    grids = ((16, 16),)
    case = cases.Case("encoder", grids, 1, 256, 2, 32, locations="local", grids=grids)
    gathered, (memory, runs, squares) = locality.shares(case, 2)
    assert 0.7 < gathered / (256 * 2 * 4 * 4 * 32 * 2) < 1
    assert squares < runs < memory


def test_command_counts_the_shapes_and_dtypes_asked_for(capsys):
    assert locality.main(["--cases", "decoder*", "--dtype", "bf16"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    name, dtype, _, memory, runs, squares = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, dtype) == ("decoder-800x1333", "bf16")
    assert float(runs) <= float(memory) <= 1
    assert squares == "-"  # its queries are no pixels
