# SPDX-License-Identifier: Apache-2.0
"""Position embeddings whose grid is not square, or has other entries before it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from families import build
from optional import require_integration
from vitadapter import ViTAdapter, load_checkpoint, resize


def _smooth(h: int, w: int, front: int = 1, width: int = 32) -> torch.Tensor:
    """Entries as training leaves them: each place is like its neighbours, with some noise."""
    coarse = torch.randn(1, width, 4, 4)
    grid = F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=True)
    tokens = grid.flatten(2).transpose(1, 2) + 0.05 * torch.randn(1, h * w, width)
    return torch.cat((torch.randn(1, front, width), tokens), dim=1)


def _expected(tokens: torch.Tensor, h: int, w: int, side: int) -> torch.Tensor:
    grid = tokens[:, -h * w :].transpose(1, 2).reshape(1, -1, h, w)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


# Pose 16x12, re-identification 16x8, audio 12x101 with two tokens.
@pytest.mark.parametrize("entries", [193, 192, 129, 128, 1214, 14 * 14 + 3, 7, 8])
def test_entries_that_are_no_square_and_known_tokens_are_refused(entries):
    with pytest.raises(
        ValueError, match=rf"pos_embed: expected a square grid .*got {entries} entr"
    ):
        resize.position_embedding(torch.randn(1, entries, 4), 197, prefix=1)


@pytest.mark.parametrize(("h", "w", "front"), [(16, 12, 1), (16, 8, 1), (16, 12, 0), (12, 101, 2)])
def test_a_known_grid_is_resized(h, w, front):
    tokens = _smooth(h, w, front)
    got = resize.position_embedding(tokens, 197, prefix=1, grid=(h, w))
    torch.testing.assert_close(got[:, 1:], _expected(tokens, h, w, 14))
    assert torch.equal(got[:, :1], tokens[:, :1] if front else torch.zeros(1, 1, 32))


@pytest.mark.parametrize("grid", [(16, 13), (12, 12), (0, 5), (-16, -12)])
def test_a_grid_that_the_entries_do_not_have_is_refused(grid):
    with pytest.raises(
        ValueError, match=r"grid: expected rows x columns that give the 193 entries"
    ):
        resize.position_embedding(torch.randn(1, 193, 4), 197, prefix=1, grid=grid)


# As many entries as a square grid has: 144, 256, 576.
@pytest.mark.parametrize(("h", "w"), [(16, 9), (9, 16), (8, 32), (32, 18)])
@pytest.mark.parametrize("front", [0, 1, 2])
def test_a_grid_with_a_squares_number_of_entries_is_known_by_its_values(h, w, front):
    tokens = _smooth(h, w, front)
    with pytest.raises(
        ValueError, match=rf"pos_embed: .* values that look like one of {h} x {w}; say"
    ):
        resize.position_embedding(tokens, 197, prefix=1)
    got = resize.position_embedding(tokens, 197, prefix=1, grid=(h, w))
    torch.testing.assert_close(got[:, 1:], _expected(tokens, h, w, 14))


def _squares(entries: int) -> bool:
    return any(math.isqrt(entries - front) ** 2 == entries - front for front in (0, 1, 2))


# 13 x 15 and a class token are 196 = 14 x 14; 10 x 17 after none, 13 x 13 after one.
SHAPES = [
    (h, w, front)
    for h in range(6, 41)
    for w in range(6, 41)
    for front in (0, 1, 2)
    if h != w and max(h, w) <= 4 * min(h, w) and _squares(h * w + front)
]


@pytest.mark.parametrize("h", sorted({h for h, _, _ in SHAPES}))
def test_no_other_grid_is_silently_read_as_a_square(h):
    torch.manual_seed(h)
    for shape in (shape for shape in SHAPES if shape[0] == h):
        with pytest.raises(ValueError, match=r"pos_embed: .* got values that look like one of"):
            resize.position_embedding(_smooth(*shape), 197, prefix=1)


@pytest.mark.parametrize("front", [0, 1, 2])
@pytest.mark.parametrize("values", ["trained", "fresh", "zero"])
def test_squares_after_tokens_are_taken(front, values):
    torch.manual_seed(front)
    for side in range(6, 41):
        tokens = _smooth(side, side, front)
        if values == "fresh":
            torch.nn.init.trunc_normal_(tokens, std=0.02)
        elif values == "zero":
            tokens.zero_()
        got = resize.position_embedding(tokens, 26, prefix=1)
        torch.testing.assert_close(got[:, 1:], _expected(tokens, side, side, 5))


@pytest.mark.parametrize("front", [0, 1, 2])
@pytest.mark.parametrize(
    ("grid", "true"), [((9, 16), (16, 9)), ((12, 12), (16, 9)), ((16, 9), (12, 12))]
)
def test_a_given_grid_that_the_values_contradict_is_refused(front, grid, true):
    text = rf"grid: expected a grid of {grid[0]} x {grid[1]} .* one of {true[0]} x {true[1]}"
    with pytest.raises(ValueError, match=text):
        resize.position_embedding(_smooth(*true, front), 197, prefix=1, grid=grid)
    fresh = torch.randn(1, 144 + front, 32)
    got = resize.position_embedding(fresh, 197, prefix=1, grid=grid)
    torch.testing.assert_close(got[:, 1:], _expected(fresh, *grid, 14))


@pytest.mark.parametrize("side", [4, 6, 12, 14, 16, 24, 32])
@pytest.mark.parametrize("values", ["trained", "fresh", "zero", "sines"])
def test_square_grids_are_taken(side, values):
    if values == "sines":
        angles = torch.arange(side)[:, None] / 10000 ** (torch.arange(16) / 16)
        waves = torch.cat((angles.sin(), angles.cos()), dim=1)
        rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
        tokens = torch.cat((rows, columns), dim=-1).reshape(1, side**2, 64)
    else:
        tokens = _smooth(side, side, 0)
    if values == "fresh":
        tokens = 0.02 * torch.randn_like(tokens)
    elif values == "zero":
        tokens = torch.zeros_like(tokens)
    got = resize.position_embedding(tokens, 197, prefix=1)
    torch.testing.assert_close(got[:, 1:], _expected(tokens, side, side, 14))


def test_load_checkpoint_refuses_or_is_told_the_grid():
    model = build("plain")  # a grid of 4 x 4
    state = {**model.state_dict(), "pos_embed": _smooth(16, 12)}
    with pytest.raises(ValueError, match=r"got 193 entries.*grid=\(rows, columns\)"):
        load_checkpoint(model, state)
    assert load_checkpoint(model, state, grid=(16, 12)).resized == ("pos_embed",)
    torch.testing.assert_close(
        model.pos_embed.data[:, 1:], _expected(state["pos_embed"], 16, 12, 4)
    )
    # As many entries as the model has, in another grid.
    state["pos_embed"] = _smooth(8, 2)
    with pytest.raises(
        ValueError, match=r"pos_embed: expected a grid of 4 x 4 .* like one of 8 x 2"
    ):
        load_checkpoint(model, state)
    assert load_checkpoint(model, state, grid=(8, 2)).resized == ("pos_embed",)
    torch.testing.assert_close(model.pos_embed.data[:, 1:], _expected(state["pos_embed"], 8, 2, 4))


def test_entries_of_registers_are_taken_where_the_file_has_registers():
    model = build("plain")
    state = {**model.state_dict(), "pos_embed": _smooth(6, 6, front=5)}
    with pytest.raises(ValueError, match="got 41 entries"):
        load_checkpoint(model, state)
    load_checkpoint(model, {**state, "reg_token": torch.zeros(1, 4, 32)})
    torch.testing.assert_close(model.pos_embed.data[:, 1:], _expected(state["pos_embed"], 6, 6, 4))


def test_the_files_tokens_tell_what_is_before_the_grid():
    model = build("plain")
    state = {**model.state_dict(), "cls_token": torch.zeros(1, 1, 32)}
    # 196 entries of which nothing tells the order: 14 x 14, or 13 x 15 after the class token.
    fresh = {**state, "pos_embed": torch.randn(1, 196, 32)}
    with pytest.raises(ValueError, match=r"like one of (13 x 15|15 x 13|39 x 5|5 x 39) after 1"):
        load_checkpoint(model, fresh)
    load_checkpoint(model, fresh, grid=(14, 14))
    load_checkpoint(model, {**state, "pos_embed": _smooth(14, 14, 0)})
    # 171 entries: 13 x 13 after two. With one class token, 10 x 17.
    fresh["pos_embed"] = torch.randn(1, 171, 32)
    with pytest.raises(ValueError, match="expected a square grid after 0, 1 entries"):
        load_checkpoint(model, fresh)
    load_checkpoint(model, {**fresh, "dist_token": torch.zeros(1, 1, 32)})


@pytest.mark.parametrize(
    ("grid", "error"),
    [(24, TypeError), ("24x32", TypeError), ((24.0, 32.0), TypeError), ((24, 32, 1), ValueError)],
)
def test_a_grid_that_is_no_pair_of_integers_is_refused(grid, error):
    model = build("plain")
    with pytest.raises(error, match=r"grid: expected .*\(rows, columns\), got"):
        load_checkpoint(model, model.state_dict(), grid=grid)


@pytest.mark.parametrize("shape", [(17, 32), (2, 17, 32), (17 * 32,), (1, 4, 4, 32)])
def test_positions_of_another_rank_are_named(shape):
    model = build("plain")
    state = {**model.state_dict(), "pos_embed": torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"pos_embed: expected .* got shape \[{shape[0]}"):
        load_checkpoint(model, state)


def test_positions_of_uniperceiver_have_no_entries_before_them():
    model = build("uniperceiver")
    key = "visual_embed.patch_embed.spatial_pos_embed.weight"
    state = {**model.state_dict(), key: torch.randn(6 * 6 + 1, 32)}
    with pytest.raises(
        ValueError, match=r"expected a square grid after 0 entries .* got 37 entries"
    ):
        load_checkpoint(model, state)
    state[key] = _smooth(9, 4, 0)[0]
    load_checkpoint(model, state, grid=(9, 4))
    got = model.visual_embed.patch_embed.spatial_pos_embed.weight.data
    torch.testing.assert_close(got, _expected(state[key][None], 9, 4, 4)[0])


def test_a_grid_for_a_file_without_positions_is_refused():
    model = build("beit")
    with pytest.raises(ValueError, match="grid: expected a file with a position embedding"):
        load_checkpoint(model, model.state_dict(), grid=(16, 12))


def test_bias_tables_of_windows_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match=r"expected \(2 n - 1\)\^2 rows .*got 217"):
        resize.bias_table(torch.randn(31 * 7, 2), 49)
    table = _smooth(9, 25, 0)[0]  # of windows of 5 x 13: as many rows as for 8 x 8
    with pytest.raises(ValueError, match=r"relative_position_bias_table: .* like one of 9 x 25"):
        resize.bias_table(table, 49)
    assert resize.bias_table(_smooth(15, 15, 0)[0], 49).shape == (49, 32)


def test_timms_grid_is_the_models_own():
    require_integration("timm")
    sizes = {"depth": 4, "embed_dim": 96, "num_heads": 3}
    model = ViTAdapter.from_timm(
        "deit_tiny_patch16_224",
        task="detection",
        img_size=(256, 144),
        model_args=sizes,
        conv_inplane=8,
    ).eval()
    vit = model.backbone.model
    own = {k: v.clone() for k, v in vit.state_dict().items()}
    own["pos_embed"] = _smooth(16, 9, width=96)
    square = {**own, "pos_embed": _smooth(12, 12, width=96)}
    with pytest.raises(ValueError, match=r"pos_embed: expected a grid of 16 x 9 .* of 12 x 12"):
        load_checkpoint(model, square)
    load_checkpoint(model, own)
    load_checkpoint(model, model.state_dict(), strict=True)
    images = torch.randn(1, 3, 256, 144)
    with torch.no_grad():
        tokens, shape, _ = model.start(images)
        assert shape == (16, 9)
        assert torch.equal(tokens, vit.norm_pre(vit._pos_embed(vit.patch_embed(images))))
        torch.testing.assert_close(
            tokens[:, 1:],
            vit.patch_embed(images).flatten(1, 2) + own["pos_embed"][:, 1:],
        )
