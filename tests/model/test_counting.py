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
from vitadapter_ops import ms_deform_attn_from_offsets

# What does not come out, and what does instead; everything else must, to the printed digit.
DIFFERENT = {
    ("table 1", "vit_small, Mask R-CNN", "params [M]"): "43.75",
    ("table 6", "vit_adapter_small (num_interactions=0), Mask R-CNN", "params [M]"): "43.75",
    ("table 7", "vit_adapter_small (attention=pale), Mask R-CNN", "FLOPs [G]"): "455.78",
    ("table 9", "beit_adapter_large (img_size=640), UPerNet-1024", "params [M]"): "451.92",
    ("table 9", "vit_adapter_large, Mask2Former", "params [M]"): "566.42",
    ("limitations", "vit_base (pretrain_size=384, vit), SETR-PUP", "params [M]"): "95.12",
    ("limitations", "vit_large (vit), SETR-PUP", "params [M]"): "315.11",
}


@pytest.fixture(scope="module")
def comparison():
    return counting.comparison()


def test_published_figures_come_out_to_the_printed_digit(comparison):
    different = {tuple(row[:3]): row[4] for row in comparison if row[5] != "0"}
    assert different == DIFFERENT


def test_comparison_explains_every_difference(comparison):
    assert not [row for row in comparison if row[5] != "0" and row[7] in ("", "unexplained")]
    assert not [row for row in comparison if row[5] == "0" and row[7]]


def test_beit_uper_net_row_comes_out_for_smaller_crops_and_for_no_other_reason():
    """Why 451 stands beside 451.92, and why nothing was left out."""

    def params(name, head, side):
        row = counting.Published("", name, head, "", options=(("img_size", side),))
        return row.cost().params

    adapter = [params("beit_adapter_large", "UPerNet-1024", 32 * n) for n in range(12, 21)]
    printed = [f"{number / 1e6:.0f}" for number in adapter]
    assert printed == ["450", *["451"] * 6, "452", "452"]  # crops of 384 to 640 pixels
    missing = params("beit_adapter_large", "UPerNet-1024", 640) - 451.5e6
    # More than the other rows' printed digits let any part be that they have in common.
    assert missing > params("beit_adapter_large", "Mask2Former-200", 896) - 570.5e6
    spare = params("beit_adapter_large", "UPerNet-1024", 512) - 450.5e6
    with torch.device("meta"):
        head = counting.heads.UPerNet(1024, 1024)
    sizes = [sum(p.numel() for p in part.parameters()) for part in head.modules()]
    assert not [size for size in sizes if missing < size < spare]


def test_difference_zero_means_the_printed_digit(comparison):
    for row in comparison:
        if row[5] == "0":
            decimals = len(row[3].partition(".")[2])
            assert float(row[4]) == pytest.approx(float(row[3]), abs=0.51 * 10**-decimals)


def test_table_holds_every_published_cell_that_must_come_out():
    by_source = {}
    for row in PUBLISHED:
        figures = [figure for figure in (row.params, row.flops) if figure]
        by_source.setdefault(row.source, []).extend(figures)
    assert sorted(by_source["table 1"], key=float) == [
        *("26.1", "26.6", "28.1", "43.8", "45.7", "47.8"),
        *("113.6", "120.2", "121.3", "337.3", "347.9", "350.9"),
    ]
    assert sorted(by_source["table 6"]) == ["43.8", "45.1", "45.5", "46.2", "46.6", "47.8", "49.4"]
    assert len(by_source["table 7"]) == 8
    assert by_source["table 9"] == ["441", "451", "451", "568", "571", "438"]
    assert by_source["table 10"] == [
        *("5.5", "21.7", "85.8", "303.3", "2.5", "5.8", "14.0", "23.7"),
        *("8.0", "27.5", "99.8", "327.0"),
    ]
    assert sorted(by_source["limitations"], key=int) == [
        *("98", "98", "105", "147", "170", "183", "318"),
        *("321", "324", "332", "414", "425", "445", "473"),
    ]


@pytest.mark.parametrize("row", [PUBLISHED[0], PUBLISHED[2]], ids=lambda row: row.model)
def test_convention_counts_less_than_everything(row):
    assert row.cost().full > row.cost().paper > 0


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


def test_fused_sampling_costs_what_its_parts_cost():
    value = torch.empty(1, 20, 3, 4, device="meta")
    points = torch.empty(1, 20, 1, 2, device="meta")
    offsets = torch.empty(1, 20, 3, 4, 2, device="meta")
    with torch.no_grad(), full_count() as total:
        ms_deform_attn_from_offsets(value, [(4, 5)], points, offsets, offsets[..., 0])
    samples = 20 * 3 * 4
    assert total.total == samples * (4 * 4 + 16) + samples * 2 * 2 + samples * SOFTMAX


def test_unknown_operators_are_refused_by_name():
    message = r"no cost is known for the operator aten\.erfinv"
    with pytest.raises(NotImplementedError, match=message), full_count():
        torch.empty(3, device="meta").erfinv()
