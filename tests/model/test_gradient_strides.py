# SPDX-License-Identifier: Apache-2.0
"""Gradients lie in memory as their parameters do; DistributedDataParallel warns of others."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, build
from optional import require_integration
from vitadapter import ViTAdapter


def _others(model, images):
    """Names of the parameters whose gradients have other strides."""
    sum(m.sin().sum() for m in model(images)).backward()
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.stride() != parameter.stride()
    ]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_have_the_strides_of_their_parameters(family, batch):
    assert _others(build(family), torch.randn(batch, 3, 64, 64)) == []


@pytest.mark.parametrize("batch", [1, 2])
def test_the_gradient_of_timms_class_token_has_its_strides(batch):
    require_integration("timm")
    model = ViTAdapter.from_timm(
        "beit_base_patch16_224",
        task="segmentation",
        img_size=64,
        model_args={"depth": 4, "embed_dim": 96, "num_heads": 3},
        conv_inplane=8,
    )
    assert "backbone.model.cls_token" not in _others(model, torch.randn(batch, 3, 64, 64))
