# SPDX-License-Identifier: Apache-2.0
"""The adapter's attentions against dense attention with an explicit mask, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vitadapter.layers.attention import (
    CSwinAttention,
    DeformableAttention,
    DenseAttention,
    PaleAttention,
    build_attention,
)
from vitadapter.layers.attention.deformable import reference_points
from vitadapter_ops import MSDeformAttn

DIM, HEADS, BATCH = 24, 6, 2
GRID = [(6, 8)]  # stride 16: three groups of rows, four of columns
PYRAMID = [(12, 16), (6, 8), (3, 4)]
DIRECTIONS = pytest.mark.parametrize(
    ("query_shapes", "feat_shapes"),
    [(GRID, PYRAMID), (PYRAMID, GRID), ([(2, 2)], [(4, 4), (2, 2), (1, 1)])],
    ids=["injector", "extractor", "one-group"],
)


def _tokens(shapes) -> Tensor:
    return torch.randn(BATCH, sum(h * w for h, w in shapes), DIM, dtype=torch.float64)


def _groups(shapes, number: int, axis: int, interlaced: bool) -> Tensor:
    """The group of every token, from its row (axis 0) or column (axis 1)."""
    groups = []
    for shape in shapes:
        side = shape[axis]
        for position in ((i, j) for i in range(shape[0]) for j in range(shape[1])):
            line = position[axis]
            groups.append(line % number if interlaced else line // (side // number))
    return torch.tensor(groups)


def _masked_dense(
    layer, query: Tensor, feat: Tensor, mask_of_head: Callable[[int], Tensor]
) -> Tensor:
    """Softmax attention with the layer's projections; a head sees where its mask is True."""
    width = DIM // HEADS
    q, k, v = layer.q(query), layer.k(feat), layer.v(feat)
    outputs = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        logits = logits.masked_fill(~mask_of_head(head), -torch.inf)
        outputs.append(logits.softmax(-1) @ v[..., part])
    return layer.out(torch.cat(outputs, dim=-1))


@DIRECTIONS
@pytest.mark.parametrize(
    ("kind", "interlaced"), [(CSwinAttention, False), (PaleAttention, True)], ids=["cswin", "pale"]
)
def test_grouped_attention_is_dense_attention_inside_its_groups(
    kind, interlaced, query_shapes, feat_shapes
):
    layer = kind(DIM, HEADS, len(feat_shapes)).double()
    query, feat = _tokens(query_shapes), _tokens(feat_shapes)

    def mask(head: int) -> Tensor:
        axis = 0 if head < HEADS // 2 else 1
        number = min(shape[axis] for shape in (*query_shapes, *feat_shapes))
        of_query = _groups(query_shapes, number, axis, interlaced)
        of_key = _groups(feat_shapes, number, axis, interlaced)
        return of_query[:, None] == of_key[None, :]

    expected = _masked_dense(layer, query, feat, mask)
    torch.testing.assert_close(layer(query, query_shapes, feat, feat_shapes), expected)


def test_stripes_are_two_tokens_wide_at_stride_16_and_pales_interlace():
    stripes = _groups(GRID, 3, axis=0, interlaced=False).view(6, 8)
    pales = _groups(GRID, 3, axis=0, interlaced=True).view(6, 8)
    assert stripes[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert pales[:, 0].tolist() == [0, 1, 2, 0, 1, 2]


@DIRECTIONS
@pytest.mark.parametrize("naive", [False, True], ids=["fused", "naive"])
def test_dense_attention_sees_every_key(naive, query_shapes, feat_shapes):
    layer = DenseAttention(DIM, HEADS, len(feat_shapes), naive=naive).double()
    query, feat = _tokens(query_shapes), _tokens(feat_shapes)
    everything = torch.ones(query.shape[1], feat.shape[1], dtype=torch.bool)
    expected = _masked_dense(layer, query, feat, lambda head: everything)
    torch.testing.assert_close(layer(query, query_shapes, feat, feat_shapes), expected)


def _centres(shapes) -> Tensor:
    points = [((j + 0.5) / w, (i + 0.5) / h) for h, w in shapes for i in range(h) for j in range(w)]
    return torch.tensor(points)[None, :, None]


@pytest.mark.parametrize("shapes", [GRID, PYRAMID], ids=["grid", "pyramid"])
def test_reference_points_are_the_centres_of_the_query_tokens(shapes):
    points = reference_points(shapes, torch.device("cpu"))
    assert points.dtype == torch.float32
    torch.testing.assert_close(points, _centres(shapes))


@DIRECTIONS
def test_deformable_attention_samples_around_its_query(query_shapes, feat_shapes, randomise):
    layer = randomise(DeformableAttention(DIM, HEADS, len(feat_shapes), ratio=0.5)).double()
    query, feat = _tokens(query_shapes), _tokens(feat_shapes)
    points = reference_points(query_shapes, query.device)
    expected = MSDeformAttn.forward(layer, query, points, feat, feat_shapes)
    torch.testing.assert_close(layer(query, query_shapes, feat, feat_shapes), expected)


def test_deformable_attention_without_offsets_reads_the_map_at_the_query(randomise):
    layer = randomise(DeformableAttention(DIM, HEADS, 1)).double()
    with torch.no_grad():
        layer.sampling_offsets.weight.zero_()
        layer.sampling_offsets.bias.zero_()
    # On its own grid a query's reference point is the centre of its own pixel; with sides that are
    # powers of two it is exact in float32.
    grid = [(4, 8)]
    feat = _tokens(grid)
    expected = layer.output_proj(layer.value_proj(feat))
    torch.testing.assert_close(layer(_tokens(grid), grid, feat, grid), expected)


@pytest.mark.parametrize("name", ["dense", "cswin", "pale"])
def test_projected_attention_has_4_d_squared_plus_4_d_parameters(name):
    layer = build_attention(name, DIM, HEADS, 3)
    assert sum(p.numel() for p in layer.parameters()) == 4 * DIM**2 + 4 * DIM


def test_odd_number_of_heads_cannot_be_halved():
    with pytest.raises(ValueError, match=r"num_heads: expected an even number.*got 3"):
        CSwinAttention(DIM, 3, 1)


def test_levels_that_do_not_share_groups_are_refused():
    layer = PaleAttention(DIM, HEADS, 2).double()
    shapes = [(5, 8), (3, 4)]
    with pytest.raises(ValueError, match=r"multiples of the coarsest level \(3, 4\), got \(5, 8\)"):
        layer(_tokens(GRID), GRID, _tokens(shapes), shapes)
