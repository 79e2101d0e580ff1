# SPDX-License-Identifier: Apache-2.0
"""Fresh weights follow the published rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vitadapter_ops import MSDeformAttn


def _has_std(weight, expected: float) -> bool:
    """Five sigma of the estimate: the relative error of a standard deviation is 1/sqrt(2 n)."""
    return abs(weight.std().item() / expected - 1) < 5 / math.sqrt(2 * weight.numel())


@pytest.fixture
def model(build):
    return build(embed_dim=96, conv_inplane=16, drop_path_rate=0.1)


def test_adapter_convolutions_are_normal_with_fan_out(model):
    parts = [*model.spm.modules(), *model.interactions.modules(), model.up]
    convs = [m for m in parts if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convs) == 3 + 3 + 4 + 6 + 1
    for conv in convs:
        fan_out = conv.kernel_size[0] ** 2 * conv.out_channels / conv.groups
        assert _has_std(conv.weight, math.sqrt(2 / fan_out))
        assert conv.bias is None or not conv.bias.any()


def test_adapter_linears_are_truncated_normal(model):
    ffn = model.interactions[0].extractor.ffn
    for linear in (ffn.fc1, ffn.fc2):
        assert _has_std(linear.weight, 0.02)
        assert not linear.bias.any()


def test_projected_attention_is_initialised_like_other_linears(build):
    attn = build(attention="cswin").interactions[0].injector.attn
    for linear in (attn.q, attn.k, attn.v, attn.out):
        assert _has_std(linear.weight, 0.02)
        assert not linear.bias.any()


def test_norms_start_as_identities(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()


def test_level_embedding_is_standard_normal(model):
    assert _has_std(model.level_embed, 1.0)


def test_injectors_start_at_the_configured_gamma(model, build):
    assert not any(interaction.injector.gamma.any() for interaction in model.interactions)
    gamma = build(injector_init=1e-6).interactions[0].injector.gamma
    assert torch.equal(gamma, torch.full((48,), 1e-6))


def test_deformable_attention_keeps_its_own_initialisation(model):
    layers = [m for m in model.modules() if isinstance(m, MSDeformAttn)]
    assert len(layers) == 4 + 6
    for layer in layers:
        assert not layer.sampling_offsets.weight.any()
        assert not layer.attention_weights.weight.any()
        offsets = layer.sampling_offsets.bias.view(6, layer.n_levels, 4, 2)
        for head in range(6):
            angle = 2 * math.pi * head / 6
            direction = torch.tensor([math.cos(angle), math.sin(angle)])
            direction /= direction.abs().max()
            for point in range(4):
                expected = (direction * (point + 1)).expand(layer.n_levels, 2)
                torch.testing.assert_close(offsets[head, :, point], expected)
        bound = math.sqrt(6 / sum(layer.value_proj.weight.shape))  # Xavier, uniform
        assert 0.9 * bound < layer.value_proj.weight.abs().max().item() <= bound
        assert not layer.output_proj.bias.any()
