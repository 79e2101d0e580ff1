# SPDX-License-Identifier: Apache-2.0
"""The ViT part against definitions written out by hand, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitadapter.backbones.plain_vit import Attention, Block, PlainViT


def _vit(**overrides) -> PlainViT:
    arguments = {
        "embed_dim": 12,
        "depth": 4,
        "num_heads": 3,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "pretrain_size": 64,
        "drop_path_rate": 0.3,
        "layer_scale": True,
        "window_size": 14,
        "global_blocks": {3},
    }
    return PlainViT(**{**arguments, **overrides})


def _softmax_attention(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention of tokens [N, 3D], head by head."""
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv.chunk(3, dim=-1))
    outputs = []
    for head in range(heads):
        logits = q[:, head] @ k[:, head].T / math.sqrt(q.shape[-1])
        outputs.append(logits.softmax(-1) @ v[:, head])
    return torch.cat(outputs, dim=-1)


def test_global_attention_is_softmax_over_all_tokens():
    attention = Attention(12, 3).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    expected = attention.proj(
        torch.stack([_softmax_attention(tokens, 3) for tokens in attention.qkv(x)])
    )
    torch.testing.assert_close(attention(x, (4, 5)), expected)


@pytest.mark.parametrize("shape", [(4, 4), (2, 6), (3, 5), (1, 1)])
def test_windows_are_padded_with_zero_keys_after_qkv(shape):
    side, (h, w) = 2, shape
    attention = Attention(12, 3, window_size=side).double()
    x = torch.randn(2, h * w, 12, dtype=torch.float64)

    qkv = attention.qkv(x).unflatten(1, shape)
    expected = torch.empty(2, h, w, 12, dtype=torch.float64)
    for image in range(2):
        for top in range(0, h, side):
            for left in range(0, w, side):
                inside = qkv[image, top : top + side, left : left + side]
                rows, columns = inside.shape[:2]
                window = torch.zeros(side, side, 36, dtype=torch.float64)
                window[:rows, :columns] = inside
                out = _softmax_attention(window.flatten(0, 1), 3).unflatten(0, (side, side))
                expected[image, top : top + side, left : left + side] = out[:rows, :columns]
    torch.testing.assert_close(attention(x, shape), attention.proj(expected.flatten(1, 2)))


def test_block_is_prenorm_with_layer_scale(randomise):
    block = randomise(Block(12, 3)).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    norm1 = F.layer_norm(x, (12,), block.norm1.weight, block.norm1.bias, 1e-6)
    y = x + block.gamma1 * block.attn(norm1, (4, 5))
    norm2 = F.layer_norm(y, (12,), block.norm2.weight, block.norm2.bias, 1e-6)
    hidden = norm2 @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = y + block.gamma2 * (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    torch.testing.assert_close(block(x, (4, 5)), expected)


def _cubic_matrix(inputs: int, outputs: int) -> Tensor:
    """Rows of bicubic weights (a = -0.75), pixel centres at (i + 0.5) / n, edges repeated."""
    a = -0.75

    def kernel(t: float) -> float:
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
    for row in range(outputs):
        centre = (row + 0.5) * inputs / outputs - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(tap, 0), inputs - 1)] += kernel(centre - tap)
    return matrix


@pytest.mark.parametrize("shape", [(4, 4), (2, 6), (7, 3)])
def test_position_grid_is_resized_bicubically_without_the_class_entry(shape):
    vit = _vit().double()
    grid = vit.pos_embed[0, 1:].unflatten(0, (4, 4))
    rows, columns = _cubic_matrix(4, shape[0]), _cubic_matrix(4, shape[1])
    expected = torch.einsum("yi,xj,ijd->yxd", rows, columns, grid)
    torch.testing.assert_close(vit.position_tokens(shape), expected.flatten(0, 1)[None])


def test_tokens_are_projected_patches_plus_positions():
    vit = _vit().double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    tokens, shape = vit.tokenize(images)
    assert shape == (2, 3)
    patch = images[1, :, 16:32, 32:48].flatten()
    projected = vit.patch_embed.proj.weight.flatten(1) @ patch + vit.patch_embed.proj.bias
    torch.testing.assert_close(tokens[1, 5], projected + vit.position_tokens(shape)[0, 5])


def test_drop_path_rises_linearly_over_the_blocks():
    rates = [block.drop_path.rate for block in _vit().blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_layer_scale_starts_at_one_and_can_be_left_out():
    block = _vit().blocks[0]
    assert torch.equal(block.gamma1, torch.ones(12))
    assert torch.equal(block.gamma2, torch.ones(12))
    assert not any("gamma" in key for key in _vit(layer_scale=False).state_dict())


def test_initial_weights_are_truncated_normal():
    vit = _vit(embed_dim=96)
    for weight in (vit.patch_embed.proj.weight, vit.blocks[0].mlp.fc1.weight, vit.pos_embed):
        # 1536 or more samples: the standard deviation is within 6 % of 0.02 (three sigma).
        assert weight.std().item() == pytest.approx(0.02, rel=0.06)
    assert not vit.blocks[0].attn.qkv.bias.any()
