# SPDX-License-Identifier: Apache-2.0
"""A batch of no images, as a process gets that has none of the last ones."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, build
from optional import require_integration
from vitadapter import ViTAdapter
from vitadapter.layers.attention import ATTENTIONS

MODELS = [(family, {}) for family in FAMILIES]
MODELS += [("plain", {"attention": attention}) for attention in list(ATTENTIONS)[1:]]
TIMM = ["deit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch14_reg4_dinov2"]
TIMM += ["vit_small_patch16_dinov3", "vit_relpos_base_patch16_cls_224"]


def _check(model, side: int, training: bool) -> None:
    model.train(training)
    before = {name: each.clone() for name, each in model.named_buffers()}
    images = torch.empty(0, 3, side, side)
    with torch.no_grad():
        shapes = [(0, model.embed_dim, -(-side // s), -(-side // s)) for s in model.strides]
        assert [tuple(m.shape) for m in model(images)] == shapes
    sum(m.sum() for m in model(images)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Not None: other processes wait for it.
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    for name, each in model.named_buffers():
        # torch's batch norm counts the batch and learns nothing from it.
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(each, before[name]), name


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("family", "options"), MODELS, ids=str)
def test_no_images_give_no_maps_and_gradients_of_zero(family, options, training):
    _check(build(family, **options), 64, training)


@pytest.mark.parametrize("side", [64, 70])
def test_no_images_with_recomputed_activations(side):
    _check(build("plain", with_cp=True), side, training=True)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", TIMM)
def test_no_images_through_a_vit_of_timm(name, training):
    require_integration("timm")
    sizes = {"depth": 4} if "small" in name else {"depth": 4, "embed_dim": 96, "num_heads": 3}
    model = ViTAdapter.from_timm(name, task="segmentation", model_args=sizes, conv_inplane=8)
    _check(model, 224, training)
