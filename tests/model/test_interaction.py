# SPDX-License-Identifier: Apache-2.0
"""Injector, extractor and ConvFFN against their equations."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from vitadapter.layers.attention import build_attention
from vitadapter.layers.drop_path import DropPath
from vitadapter.layers.interaction import ConvFFN, Extractor, Injector, to_maps, to_tokens

DIM = 24
GRID = [(4, 6)]
PYRAMID = [(8, 12), (4, 6), (2, 3)]
DENSE = functools.partial(build_attention, "dense", DIM, 6)


def _tokens(shapes, batch: int = 2):
    return torch.randn(batch, sum(h * w for h, w in shapes), DIM, dtype=torch.float64)


def _norm(layer: nn.LayerNorm, x):
    return F.layer_norm(x, (DIM,), layer.weight, layer.bias, 1e-6)


def test_injector_adds_scaled_attention_to_the_vit_tokens(randomise):
    injector = randomise(Injector(DIM, DENSE)).double()
    x, c = _tokens(GRID), _tokens(PYRAMID)
    attended = injector.attn(
        _norm(injector.query_norm, x), GRID, _norm(injector.feat_norm, c), PYRAMID
    )
    torch.testing.assert_close(injector(x, GRID, c, PYRAMID), x + injector.gamma * attended)


def test_fresh_injector_is_the_identity():
    x, c = _tokens(GRID).float(), _tokens(PYRAMID).float()
    assert torch.equal(Injector(DIM, DENSE)(x, GRID, c, PYRAMID), x)


def test_extractor_adds_attention_then_conv_ffn(randomise):
    extractor = randomise(Extractor(DIM, DENSE, cffn_hidden=6)).double()
    c, x = _tokens(PYRAMID), _tokens(GRID)
    query, feat = _norm(extractor.query_norm, c), _norm(extractor.feat_norm, x)
    attended = c + extractor.attn(query, PYRAMID, feat, GRID)
    expected = attended + extractor.ffn(_norm(extractor.ffn_norm, attended), PYRAMID)
    torch.testing.assert_close(extractor(c, PYRAMID, x, GRID), expected)


def test_conv_ffn_shares_its_convolution_over_the_levels(randomise):
    ffn = randomise(ConvFFN(DIM, 6)).double()
    c = _tokens(PYRAMID)
    hidden = c @ ffn.fc1.weight.T + ffn.fc1.bias
    conv = ffn.dwconv.dwconv
    levels, start = [], 0
    for h, w in PYRAMID:
        level = hidden[:, start : start + h * w].transpose(1, 2).reshape(2, 6, h, w)
        level = F.conv2d(level, conv.weight, conv.bias, padding=1, groups=6)
        levels.append(level.reshape(2, 6, h * w).transpose(1, 2))
        start += h * w
    expected = F.gelu(torch.cat(levels, dim=1)) @ ffn.fc2.weight.T + ffn.fc2.bias
    torch.testing.assert_close(ffn(c, PYRAMID), expected)


def test_drop_path_drops_the_ffn_and_never_the_attention(randomise):
    extractor = randomise(Extractor(DIM, DENSE, cffn_hidden=6, drop_path=0.5)).double().train()
    c, x = _tokens(PYRAMID, batch=16), _tokens(GRID, batch=16)
    query, feat = _norm(extractor.query_norm, c), _norm(extractor.feat_norm, x)
    attended = c + extractor.attn(query, PYRAMID, feat, GRID)
    kept = attended + extractor.ffn(_norm(extractor.ffn_norm, attended), PYRAMID) / 0.5
    got = extractor(c, PYRAMID, x, GRID)
    is_dropped = [torch.allclose(a, b) for a, b in zip(got, attended, strict=True)]
    is_kept = [torch.allclose(a, b) for a, b in zip(got, kept, strict=True)]
    assert [a != b for a, b in zip(is_dropped, is_kept, strict=True)] == [True] * 16
    assert 0 < sum(is_dropped) < 16


def test_drop_path_does_nothing_in_inference():
    x = torch.randn(4, 3)
    assert DropPath(0.5).eval()(x) is x


def test_tokens_and_maps_are_inverse():
    tokens = _tokens(PYRAMID)
    maps = to_maps(tokens, PYRAMID)
    assert [tuple(level.shape) for level in maps] == [(2, DIM, h, w) for h, w in PYRAMID]
    assert torch.equal(to_tokens(maps), tokens)
    assert torch.equal(maps[1][:, :, 1, 2], tokens[:, 8 * 12 + 1 * 6 + 2])
