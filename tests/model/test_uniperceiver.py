# SPDX-License-Identifier: Apache-2.0
"""Uni-Perceiver's image encoder against definitions written out by hand, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitadapter
from vitadapter.backbones.uniperceiver import Attention, Layer, UniPerceiver

DIM, HEADS = 12, 3


def _expected(attention: Attention, x: Tensor) -> Tensor:
    """Attention of tokens [N, D] before the output projection."""
    qkv = x @ attention.in_proj.weight.T + attention.in_proj.bias
    width = DIM // HEADS
    outputs = []
    for head in range(HEADS):
        q, k, v = (part[:, head * width : (head + 1) * width] for part in qkv.chunk(3, dim=-1))
        outputs.append((q @ k.T / math.sqrt(width)).softmax(-1) @ v)
    return torch.cat(outputs, dim=-1)


def test_windows_are_padded_with_zero_tokens_before_the_projection(randomise):
    side, (h, w) = 2, (3, 5)
    attention = randomise(Attention(DIM, HEADS, side)).double()
    grid = torch.randn(h, w, DIM, dtype=torch.float64)
    padded = F.pad(grid, (0, 0, 0, 1, 0, 1))
    expected = torch.empty_like(padded)
    for top in range(0, h, side):
        for left in range(0, w, side):
            window = padded[top : top + side, left : left + side].flatten(0, 1)
            out = _expected(attention, window).unflatten(0, (side, side))
            expected[top : top + side, left : left + side] = out
    expected = attention.out_proj(expected[:h, :w].flatten(0, 1))
    torch.testing.assert_close(attention(grid.flatten(0, 1)[None], (h, w))[0], expected)


def test_layer_is_prenorm_with_torchs_epsilon(randomise):
    layer = randomise(Layer(DIM, HEADS, 4.0, 0.0, None)).double()
    x = 1e-2 * torch.randn(1, 20, DIM, dtype=torch.float64)  # small: the epsilon shows

    def norm(module, y):
        return F.layer_norm(y, (DIM,), module.weight, module.bias, 1e-5)

    attended = layer.self_attn.out_proj(_expected(layer.self_attn, norm(layer.norm1, x)[0]))
    y = x + layer.gamma_1 * attended
    expected = y + layer.gamma_2 * layer.linear2(F.gelu(layer.linear1(norm(layer.norm2, y))))
    torch.testing.assert_close(layer(x, (4, 5)), expected)


def test_branches_start_switched_off():
    layer = Layer(DIM, HEADS, 4.0, 0.0, None)
    x = torch.randn(1, 20, DIM)
    assert torch.equal(layer(x, (4, 5)), x)


def test_tokens_are_normalised_patches_with_positions_in_space_and_time(randomise):
    model = randomise(
        UniPerceiver(
            embed_dim=DIM,
            depth=1,
            num_heads=HEADS,
            mlp_ratio=4.0,
            patch_size=16,
            pretrain_size=64,
            drop_path_rate=0.0,
            window_size=14,
            global_blocks={0},
        )
    ).double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    tokens, shape, _ = model.start(images)
    embed = model.visual_embed.patch_embed
    assert shape == (4, 4)
    patch = images[0, :, 16:32, 48:64].flatten()
    token = embed.proj.weight.flatten(1) @ patch + embed.proj.bias
    token = token + embed.spatial_pos_embed.weight[7] + embed.temporal_pos_embed.weight[0]
    norm = model.visual_embed.embeddings_norm
    expected = F.layer_norm(token, (DIM,), norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(tokens[0, 7], expected)


@pytest.mark.parametrize(("name", "depth"), [("base", 12), ("large", 24)])
def test_adapter_norms_have_the_same_epsilon_and_keys_are_the_released_ones(name, depth):
    with torch.device("meta"):
        model = vitadapter.create_model(f"uniperceiver_adapter_{name}", task="detection")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}
    keys = set(model.state_dict())
    for part in (
        *("self_attn.in_proj.weight", "self_attn.out_proj.bias", "linear1.weight", "linear2.bias"),
        *("norm1.weight", "norm2.bias", "gamma_1", "gamma_2"),
    ):
        assert f"layers.{depth - 1}.{part}" in keys
    embed = {key for key in keys if key.startswith("visual_embed.")}
    assert embed == {
        *(f"visual_embed.embeddings_norm.{name}" for name in ("weight", "bias")),
        *(f"visual_embed.patch_embed.proj.{name}" for name in ("weight", "bias")),
        "visual_embed.patch_embed.spatial_pos_embed.weight",
        "visual_embed.patch_embed.temporal_pos_embed.weight",
    }
