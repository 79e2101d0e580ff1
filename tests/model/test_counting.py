# SPDX-License-Identifier: Apache-2.0
"""Published parameter and operation counts come out to the printed digit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitadapter.analysis import counting
from vitadapter.analysis.counting import PUBLISHED, Cost, count
from vitadapter.analysis.full_count import SOFTMAX, full_count
from vitadapter.layers.attention import build_attention

# The one figure that our reading of an attention without published code cannot give exactly.
PALE_TOLERANCE = 0.01


def _row_id(row) -> str:
    parts = (row.source, row.size, row.head or "backbone", row.attention, row.num_interactions)
    return " ".join(map(str, parts))


@pytest.mark.parametrize("row", PUBLISHED, ids=_row_id)
def test_published_figures_come_out_to_the_printed_digit(row):
    cost = row.cost()
    if row.params is not None:
        assert counting.rounded(cost.params, 1e6, row.params) == row.params
    if row.flops is not None and row.attention != "pale":
        assert counting.rounded(cost.paper, 1e9, row.flops) == row.flops
    if row.attention == "pale":
        assert cost.paper / 1e9 == pytest.approx(float(row.flops), rel=PALE_TOLERANCE)
    # No single run of the convention counts more than everything.
    assert cost.full > cost.paper


def test_table_holds_every_published_cell_that_must_come_out():
    cells = {(row.head, row.size): row.params for row in PUBLISHED if row.source != "table 6"}
    assert [cells[None, size] for size in ("tiny", "small", "base", "large")] == [
        *("8.0", "27.5", "99.8", "327.0")
    ]
    assert sum(row.flops is not None for row in PUBLISHED) == 6
    assert all(row.params is not None for row in PUBLISHED)


def test_comparison_explains_every_difference():
    rows = counting.comparison()
    assert not [row for row in rows if row[5] != "0" and row[7] in ("", "unexplained")]


def test_costs_add():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


def test_counting_leaves_the_model_untouched(build):
    model = build("detection")
    before = copy.deepcopy(model.state_dict())
    cost = count(model, (64, 96))
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_frozen_parameters_are_not_counted(build):
    model = build("detection")
    full = count(model, (64, 64)).params
    model.pos_embed.requires_grad_(False)
    assert count(model, (64, 64)).params == full - model.pos_embed.numel()


def test_simple_modules_cost_what_the_rules_say():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.relu = nn.ReLU()
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.relu(self.norm(self.conv(x))).mean((2, 3)))

    cost = count(Net(), (8, 8))
    pixels = 4 * 4
    conv = pixels * 8 * 27 + pixels * 8
    assert cost.paper == conv + pixels * 8 + 8 * 5
    assert cost.full == conv + 2 * pixels * 8 + pixels * 8 + 8 * 5 + 5
    assert cost.params == 8 * 27 + 8 + 16 + 45


def test_attention_is_counted_once_whatever_it_decomposes_into():
    q, k, v = (torch.empty(1, 2, n, 4, device="meta") for n in (3, 7, 7))
    with full_count() as total:
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.shape == (1, 2, 3, 4)
    assert total.total == 2 * 3 * 4 + 2 * 3 * 7 * (4 + SOFTMAX + 4)


def test_naive_and_fused_attention_cost_the_same():
    totals = []
    for naive in (False, True):
        with torch.device("meta"):
            layer = build_attention("dense", 12, 3, 1, naive=naive)
            x = torch.empty(1, 20, 12)
        with torch.no_grad(), full_count() as total:
            layer(x, [(4, 5)], x, [(4, 5)])
        totals.append(total.total)
    assert totals[0] == totals[1]


def test_deformable_sampling_is_counted_in_full_and_free_in_the_paper():
    with torch.device("meta"):
        layer = build_attention("deformable", 12, 3, 1)
        x = torch.empty(1, 20, 12)
    with torch.no_grad(), full_count() as total:
        layer(x, [(4, 5)], x, [(4, 5)])
    samples = 20 * 3 * 1 * 4
    linears = 20 * 12 * (24 + 12 + 12 + 12) + 20 * (24 + 12 + 12 + 12)
    sampling = samples * (4 * 4 + 16)
    points = 2 * 9  # reference points: + 0.5 and / side, for 4 rows and 5 columns
    # Offsets in fractions (divide, add: 2 each per coordinate) and softmax.
    coordinates = samples * 2 * 2 + samples * SOFTMAX
    assert total.total == linears + sampling + points + coordinates


def test_unknown_operators_are_refused_by_name():
    message = r"no cost is known for the operator aten\.erfinv"
    with pytest.raises(NotImplementedError, match=message), full_count():
        torch.empty(3, device="meta").erfinv()
