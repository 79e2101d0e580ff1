# SPDX-License-Identifier: Apache-2.0
"""Parameters and operations of a model that a user has: each operation once, none left out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitadapter.analysis.counting import count, count_on
from vitadapter.analysis.full_count import SOFTMAX, full_count
from vitadapter.layers.attention import build_attention
from vitadapter_ops import ms_deform_attn_from_offsets


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

    net = Net()
    cost = count(net, (8, 8))
    assert not net.conv._forward_hooks
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


def test_deformable_sampling_is_counted_in_full():
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


def test_sampling_is_free_in_the_convention():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = build_attention("deformable", 12, 3, 1)

        def forward(self, x):
            return self.attention(x, [(4, 5)], x, [(4, 5)])

    with torch.device("meta"):
        cost = count_on(Layer(), torch.empty(1, 20, 12))
    assert cost.paper == 20 * 12 * (24 + 12 + 12 + 12)


def test_fused_sampling_costs_what_its_parts_cost():
    value = torch.empty(1, 20, 3, 4, device="meta")
    points = torch.empty(1, 20, 1, 2, device="meta")
    offsets = torch.empty(1, 20, 3, 4, 2, device="meta")
    with torch.no_grad(), full_count() as total:
        ms_deform_attn_from_offsets(value, [(4, 5)], points, offsets, offsets[..., 0])
    samples = 20 * 3 * 4
    assert total.total == samples * (4 * 4 + 16) + samples * 2 * 2 + samples * SOFTMAX


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_cost_their_products_and_their_bias(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    cost = count(kind(3, 6, 3, stride=2, padding=1, groups=3), (9, 9))
    side = 17 if transposed else 5
    positions = 9 * 9 if transposed else 5 * 5
    assert cost.full == positions * 6 * 9 + side * side * 6


def test_full_count_is_the_flop_counters_and_what_that_leaves_out(build):
    """Counted twice: products by torch's counter, halved; then everything."""
    model = build("detection")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 64, 96))
    products = counter.get_total_flops() // 2
    full = count(model, (64, 96)).full
    assert 0.8 * full < products < full


def test_unknown_operators_are_refused_by_name():
    message = r"no cost is known for the operator aten\.erfinv"
    with pytest.raises(NotImplementedError, match=message), full_count():
        torch.empty(3, device="meta").erfinv()
