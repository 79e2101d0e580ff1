# SPDX-License-Identifier: Apache-2.0
"""Models say how the images of their pre-training were normalised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import vitadapter
from families import FAMILIES, build
from optional import require_integration
from vitadapter import ViTAdapter

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
AUGREG = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize("name", vitadapter.list_models())
def test_published_models_say_what_their_vit_was_trained_with(name):
    with torch.device("meta"):
        model = vitadapter.create_model(name, task="segmentation")
    is_augreg = "large" in name and not name.startswith(("beit", "uniperceiver"))
    side = 384 if "large" in name and is_augreg else 224
    known = AUGREG if is_augreg else IMAGENET
    assert model.default_cfg == {"input_size": (3, side, side), **known}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_them(family):
    assert build(family).default_cfg.keys() == {"input_size", "mean", "std"}


def test_another_pre_training_may_be_stated():
    model = build("plain", pretrain_size=384, **AUGREG)
    assert model.default_cfg == {"input_size": (3, 384, 384), **AUGREG}
    model.default_cfg.clear()
    assert model.default_cfg["mean"] == AUGREG["mean"]


NO_NUMBERS = (
    *(["0.5"] * 3, [True] * 3, {0.1, 0.2, 0.3}, [[0.1], [0.2, 0.3]]),
    *(np.float32(0.5), np.full((3, 1), 0.5), torch.tensor(0.5), torch.full((3, 2), 0.5)),
)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (0.5, TypeError, "a number for each channel, got 0.5"),
        *((values, TypeError, "a number for each channel") for values in NO_NUMBERS),
        ((0.4,), ValueError, r"3 values, got \(0.4,\)"),
        ([0.4] * 4, ValueError, "3 values"),
    ],
)
@pytest.mark.parametrize("name", ["mean", "std"])
def test_it_has_a_number_for_each_channel(name, values, error, message):
    with pytest.raises(error, match=f"^{name}: expected {message}"):
        build("plain", **{name: values})


@pytest.mark.parametrize(
    "values",
    [np.full(3, 0.5), torch.full((3,), 0.5), list(torch.full((3,), 0.5)), [np.float32(0.5)] * 3],
    ids=["array", "tensor", "tensors", "scalars"],
)
def test_it_may_be_an_array(values):
    mean = build("plain", mean=values).default_cfg["mean"]
    assert mean == AUGREG["mean"]
    assert all(type(value) is float for value in mean)


def test_of_other_channels_nothing_is_known():
    assert build("plain", in_chans=1).default_cfg["mean"] is None
    assert build("plain", in_chans=1, mean=[0.4], std=[0.2]).default_cfg == {
        "input_size": (1, 64, 64),
        "mean": (0.4,),
        "std": (0.2,),
    }


class _Own(nn.Module):
    embed_dim, depth, patch_size, num_prefix_tokens = 24, 4, 16, 0

    def start(self, images):
        raise NotImplementedError


def test_a_users_backbone_says_it_or_nothing_is_known():
    backbone = _Own()
    options = {"task": "detection", "conv_inplane": 8}
    unknown = {"input_size": None, "mean": None, "std": None}
    assert ViTAdapter.around(backbone, **options).default_cfg == unknown
    backbone.default_cfg = {**AUGREG, "url": ""}
    assert ViTAdapter.around(backbone, **options).default_cfg == {**unknown, **AUGREG}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", {"input_size": (3, 224, 224), **AUGREG}),
        ("vit_small_patch14_dinov2", {"input_size": (3, 518, 518), **IMAGENET}),
        ("beit_base_patch16_224", {"input_size": (3, 224, 224), **AUGREG}),
        ("beitv2_base_patch16_224", {"input_size": (3, 224, 224), **IMAGENET}),
    ],
)
def test_timm_says_it_of_its_models(name, known):
    require_integration("timm")
    with torch.device("meta"):
        model = ViTAdapter.from_timm(name, task="detection", conv_inplane=8)
    assert model.default_cfg == known


def test_a_model_of_timms_class_alone_says_nothing():
    timm = require_integration("timm")
    vit = timm.models.vision_transformer.VisionTransformer(
        embed_dim=48, depth=4, num_heads=3, dynamic_img_size=True
    )
    assert ViTAdapter.from_timm(vit, task="detection").default_cfg["mean"] is None
