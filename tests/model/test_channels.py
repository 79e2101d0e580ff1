# SPDX-License-Identifier: Apache-2.0
"""Images of other than three channels, from the first convolutions to the maps and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import FAMILIES, build
from optional import require_integration
from vitadapter import ViTAdapter
from vitadapter.analysis.counting import count

CHANNELS = [1, 5]


def _check(model: nn.Module, in_chans: int, side: int = 64) -> None:
    images = torch.randn(2, in_chans, side, side, requires_grad=True)
    maps = model(images)
    assert [tuple(m.shape[2:]) for m in maps] == [(side // s, side // s) for s in (4, 8, 16, 32)]
    sum(m.square().mean() for m in maps).backward()
    assert images.grad.flatten(2).any(-1).all()
    with pytest.raises(ValueError, match=rf"images: expected {in_chans} channels in .*, got 3"):
        model(torch.randn(2, 3, side, side))


@pytest.mark.parametrize("in_chans", CHANNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_published_models_take_any_number_of_channels(family, in_chans):
    _check(build(family, in_chans=in_chans), in_chans)


@pytest.mark.parametrize("in_chans", CHANNELS)
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "beit_base_patch16_224"])
def test_models_of_timm_say_their_number_of_channels(name, in_chans):
    timm = require_integration("timm")
    sizes = {"depth": 4, "embed_dim": 96, "num_heads": 3, "in_chans": in_chans}
    made = timm.create_model(name, img_size=64, **sizes)
    for vit, how in ((name, {"model_args": sizes, "img_size": 64}), (made, {})):
        model = ViTAdapter.from_timm(vit, task="segmentation", conv_inplane=8, **how)
        assert model.config.in_chans == in_chans
        _check(model, in_chans)


@pytest.mark.parametrize("in_chans", CHANNELS)
def test_a_users_backbone_may_say_its_number_of_channels(in_chans):
    inner = build("plain", in_chans=in_chans)

    class Own(nn.Module):
        embed_dim, depth, patch_size, num_prefix_tokens = 32, 4, 16, 0

        def __init__(self):
            super().__init__()
            self.in_chans = in_chans
            self.vit = inner

        def start(self, images):
            return inner.start(images)

    _check(ViTAdapter.around(Own(), task="segmentation", adapter_heads=2, conv_inplane=8), in_chans)


def test_counting_feeds_the_models_own_number_of_channels():
    costs = [count(build("plain", in_chans=number), (64, 64)) for number in (3, 5)]
    # Two more channels in the stem's first convolution, 3 x 3 and 4 wide, and in 16 x 16 patches.
    assert costs[1].params - costs[0].params == 2 * (9 * 4 + 256 * 32)
    assert costs[1].paper - costs[0].paper == 2 * (32**2 * 9 * 4 + 4**2 * 256 * 32)
