# SPDX-License-Identifier: Apache-2.0
"""load_checkpoint on files made here, in the layouts that published files have."""

from __future__ import annotations

import argparse
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vitadapter
from vitadapter import load_checkpoint
from vitadapter_ops.testing import tolerances
from weights import augreg_shapes, is_loaded, values

SMALL = {"embed_dim": 48, "depth": 4, "conv_inplane": 8}


def _model(name="vit_adapter_tiny", task="segmentation", **overrides):
    sizes = {"pretrain_size": 64} if name.startswith("vit") else {}
    return vitadapter.create_model(name, task=task, **{**SMALL, **sizes, **overrides}).eval()


def _vit_part(state):
    """What a pre-trained file has of a model with an adapter."""
    stems = ("patch_embed", "pos_embed", "blocks", "layers", "visual_embed", "cls_token")
    return {k: v for k, v in state.items() if k.startswith(stems)}


def _save(tmp_path, contents, name="model.pth"):
    path = tmp_path / name
    torch.save(contents, path)
    return path


def test_released_segmentor_gives_its_backbone(tmp_path):
    model = _model()
    state = values(model)
    file = {f"backbone.{key}": value for key, value in state.items()}
    file |= {"decode_head.conv_seg.weight": torch.zeros(3), "auxiliary_head.x": torch.zeros(1)}
    path = _save(tmp_path, {"meta": {"epoch": 1}, "state_dict": file, "optimizer": {"lr": 0.1}})
    report = load_checkpoint(model, path, strict=True)
    assert is_loaded(model, state)
    assert report.missing == report.unexpected == report.resized == ()
    assert report.ignored == ("auxiliary_head.x", "decode_head.conv_seg.weight")


def test_create_model_loads_a_checkpoint(tmp_path):
    state = values(_model())
    path = _save(tmp_path, {"state_dict": {f"module.backbone.{k}": v for k, v in state.items()}})
    assert is_loaded(_model(checkpoint=path), state)


@pytest.mark.parametrize("layout", ["mmcv", "timm", "deit"])
@pytest.mark.parametrize("ema", [False, True], ids=["last", "average"])
def test_averaged_weights_are_taken_when_asked_for(tmp_path, layout, ema):
    model = _model()
    last, average = values(model), values(model)
    if layout == "mmcv":  # averages lie beside the weights, their dots replaced
        file = {f"backbone.{key}": value for key, value in last.items()}
        for key, value in average.items():
            file["ema_" + f"backbone.{key}".replace(".", "_")] = value
        contents = {"state_dict": file}
    else:
        names = {
            "timm": ("state_dict", "state_dict_ema"),
            "deit": ("model", "model_ema"),
        }[layout]
        contents = {
            names[0]: last,
            names[1]: {f"module.{key}": value for key, value in average.items()},
        }
    report = load_checkpoint(model, _save(tmp_path, contents), ema=ema, strict=True)
    assert is_loaded(model, average if ema else last)
    assert len(report.ignored) == (len(average) if layout == "mmcv" else 0)


@pytest.mark.parametrize("last_step", ["ema_state_dict", "current_model_state"])
@pytest.mark.parametrize("ema", [False, True])
def test_averages_that_were_swapped_into_state_dict_are_taken_in_any_case(last_step, ema):
    model = _model()
    last, average = values(model), values(model)
    last = {f"module.backbone.{key}": value for key, value in last.items()}
    contents = {
        "state_dict": {f"backbone.{key}": value for key, value in average.items()},
        last_step: {**last, "steps": torch.tensor(7)},
    }
    load_checkpoint(model, contents, ema=ema, strict=True)
    assert is_loaded(model, average)


def _pretrained_vit(model, grid: int, extra: int = 1):
    state = _vit_part(values(model))
    state["pos_embed"] = torch.randn(1, grid**2 + extra, 48)
    return state


def test_deit_file_reports_what_it_lacks_and_what_was_not_needed(tmp_path):
    model = _model()
    state = {k: v for k, v in _pretrained_vit(model, 4).items() if "gamma" not in k}
    others = {"cls_token": torch.zeros(1, 1, 48), "norm.weight": torch.zeros(48)}
    others |= {"head.weight": torch.zeros(10, 48)}
    file = {"model": {**state, **others}, "args": argparse.Namespace(lr=0.1)}
    report = load_checkpoint(model, _save(tmp_path, file))
    assert is_loaded(model, state)
    assert set(report.ignored) == set(others)
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    assert set(report.fresh) == model.state_dict().keys() - state.keys() - counters
    assert "blocks.0.gamma1" in report.fresh
    assert torch.equal(model.blocks[0].gamma1, torch.ones(48))
    assert report.missing == report.unexpected == ()


@pytest.mark.parametrize("extra", [0, 1, 2], ids=["no class token", "class token", "distilled"])
def test_position_grid_is_resized_bicubically(extra):
    model = _model()
    state = _pretrained_vit(model, 6, extra)
    report = load_checkpoint(model, state)
    grid = state["pos_embed"][:, extra:].transpose(1, 2).reshape(1, 48, 6, 6)
    grid = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2))
    first = state["pos_embed"][:, :1] if extra else torch.zeros(1, 1, 48)
    assert torch.equal(model.pos_embed[:, :1], first)
    assert report.resized == ("pos_embed",)


def test_dinov2_names_and_patches_of_14_pixels():
    model = _model()
    state = _pretrained_vit(model, 4)
    projection = torch.randn(48, 3, 14, 14)
    file = {"mask_token": torch.zeros(1, 48), "cls_token": torch.zeros(1, 1, 48)}
    for key, value in state.items():
        for index in ("1", "2"):
            key = key.replace(f"gamma{index}", f"ls{index}.gamma")
        # Large models were saved in chunks of blocks.
        file[key.replace("blocks.", "blocks.0.") if key.startswith("blocks.") else key] = value
    file["patch_embed.proj.weight"] = projection
    report = load_checkpoint(model, file)
    assert is_loaded(model, {k: v for k, v in state.items() if k != "patch_embed.proj.weight"})
    expected = F.interpolate(projection, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    assert set(report.ignored) == {"mask_token", "cls_token"}


def test_augreg_npz_is_transposed_as_jax_lays_it_out(tmp_path):
    model, heads, width = _model(), 3, 16
    rng = np.random.default_rng(0)
    shapes = augreg_shapes(width=48, heads=heads, depth=4, entries=17)
    arrays = {key: rng.standard_normal(shape).astype("f") for key, shape in shapes.items()}
    np.savez(tmp_path / "augreg.npz", **arrays)
    report = load_checkpoint(model, tmp_path / "augreg.npz")

    block, x = model.blocks[2], rng.standard_normal(48).astype("f")
    source = {k.split("encoderblock_2/")[1]: v for k, v in arrays.items() if "block_2/" in k}
    attention = "MultiHeadDotProductAttention_1"
    expected = np.concatenate(
        [
            (np.einsum("i,ihd->hd", x, source[f"{attention}/{part}/kernel"])
             + source[f"{attention}/{part}/bias"]).ravel()
            for part in ("query", "key", "value")
        ]
    )  # fmt: skip
    with torch.no_grad():
        got = block.attn.qkv(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(got, expected, **tolerances.CLOSE_MODELS)
        y = rng.standard_normal((heads, width)).astype("f")
        expected = np.einsum("hd,hdo->o", y, source[f"{attention}/out/kernel"])
        got = block.attn.proj(torch.from_numpy(y.ravel())) - block.attn.proj.bias
        np.testing.assert_allclose(got.numpy(), expected, **tolerances.CLOSE_MODELS)
        expected = x @ source["MlpBlock_3/Dense_0/kernel"] + source["MlpBlock_3/Dense_0/bias"]
        got = block.mlp.fc1(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(got, expected, **tolerances.CLOSE_MODELS)
    assert model.patch_embed.proj.weight[5, 2, 3, 4] == arrays["embedding/kernel"][3, 4, 2, 5]
    assert torch.equal(model.blocks[1].norm2.weight.data, torch.from_numpy(
        arrays["Transformer/encoderblock_1/LayerNorm_2/scale"]))  # fmt: skip
    assert report.unexpected == ()
    assert set(report.ignored) == {
        *("cls_token", "norm.weight", "norm.bias", "head.kernel", "head.bias"),
        *("pre_logits.kernel", "pre_logits.bias"),
    }


def _tables(depth: int, side: int, extra: int = 3):
    return [torch.randn((2 * side - 1) ** 2 + extra, 12) for _ in range(depth)]


def _pretrained_beit(model, tables, shared=False):
    state = {k: v for k, v in _vit_part(values(model)).items() if "relative_position_bias" not in k}
    state["cls_token"] = torch.randn(1, 1, 48)
    if shared:
        state["rel_pos_bias.relative_position_bias_table"] = tables[0]
    for index, table in enumerate([] if shared else tables):
        state[f"blocks.{index}.attn.relative_position_bias_table"] = table
        state[f"blocks.{index}.attn.relative_position_index"] = torch.zeros(2, 2)
    return state


def _piecewise_cubic(positions, values, points):
    """Interpolating cubic spline without knots at the second and last but one position."""

    def basis(x):
        columns = [x**power for power in range(4)]
        columns += [(x - knot).clip(0) ** 3 for knot in positions[2:-2]]
        return np.stack(columns, axis=-1)

    scale = positions[-1]
    positions, points = positions / scale, points / scale
    return basis(points) @ np.linalg.solve(basis(positions), values)


def _positions(side: int, target: int):
    """Distances that grow by a constant factor from 1 and reach target // 2."""
    half, low, high = side // 2, 1.01, 1.5
    for _ in range(19):  # 0.49 / 2^19 < 1e-6
        q = (low + high) / 2
        if sum(q**k for k in range(half)) > target // 2:
            high = q
        else:
            low = q
    reach = [sum(q**k for k in range(n + 1)) for n in range(half)]
    return np.array([-r for r in reversed(reach)] + [0] + reach)


def _resized(table, side: int, target: int):
    positions = _positions(side, target)
    points = np.arange(target) - target // 2
    points = points.clip(positions[0], positions[-1])
    square = table[: side**2].double().numpy().reshape(side, side, -1)
    rows = _piecewise_cubic(positions, square.reshape(side, -1), points)
    rows = rows.reshape(target, side, -1).swapaxes(0, 1).reshape(side, -1)
    columns = _piecewise_cubic(positions, rows, points).reshape(target, target, -1)
    return torch.from_numpy(columns.swapaxes(0, 1).reshape(target**2, -1)).float()


@pytest.mark.parametrize("shared", [False, True], ids=["per block", "shared"])
def test_beit_tables_are_resized_for_a_segmentation_crop(shared):
    model = _model("beit_adapter_base", img_size=96)
    tables = _tables(4, 4)
    report = load_checkpoint(model, _pretrained_beit(model, tables, shared))
    for block, table in zip(model.blocks, [tables[0]] * 4 if shared else tables, strict=True):
        got = block.attn.relative_position_bias_table.data
        torch.testing.assert_close(got[:121], _resized(table, 7, 11), **tolerances.CLOSE_SUMS)
        assert torch.equal(got[121:], table[-3:])
    assert len(report.resized) == 4
    assert not report.unexpected


def test_beit_tables_lose_the_class_token_for_detection():
    model = _model("beit_adapter_base", task="detection", window_size=4)
    tables = _tables(4, 4)
    report = load_checkpoint(model, _pretrained_beit(model, tables))
    # Every block is the last of its quarter here, so every window is 16 wide.
    for block, table in zip(model.blocks, tables, strict=True):
        got = block.attn.relative_position_bias_table.data
        torch.testing.assert_close(got, _resized(table, 7, 31), **tolerances.CLOSE_SUMS)
    assert "cls_token" in report.ignored
    model = _model("beit_adapter_base", task="detection", window_size=4, depth=8)
    tables = _tables(8, 4)
    load_checkpoint(model, _pretrained_beit(model, tables))
    assert torch.equal(model.blocks[0].attn.relative_position_bias_table, tables[0][:49])


def test_released_beit_adapter_loads_unchanged():
    model = _model("beit_adapter_base", img_size=64)
    state = values(model)
    file = {f"backbone.{key}": value for key, value in state.items()}
    file["backbone.blocks.0.attn.relative_position_index"] = torch.zeros(2, 2)
    report = load_checkpoint(model, {"state_dict": file}, strict=True)
    assert is_loaded(model, state)
    assert report.ignored == ("blocks.0.attn.relative_position_index",)


def test_uniperceiver_names_are_translated():
    model = _model("uniperceiver_adapter_base")
    state = _vit_part(values(model))
    file = {"fused_encoder.token_embed.weight": torch.zeros(1), "loss_prepare.bias": torch.zeros(1)}
    for key, value in state.items():
        key = key.replace("visual_embed.patch_embed.proj.", "visual_embed.embeddings.")
        key = key.replace("visual_embed.patch_embed.", "visual_embed.embeddings_st_pos.")
        key = key.replace("visual_embed.", "video_embed.").replace("in_proj.", "in_proj_")
        file[f"fused_encoder.{key}"] = value
    position = "fused_encoder.video_embed.embeddings_st_pos.spatial_pos_embed.weight"
    file[position] = torch.randn(12 * 12, 48)
    report = load_checkpoint(model, {"model": file})
    grid = file[position].t().reshape(1, 48, 12, 12)
    grid = F.interpolate(grid, size=(14, 14), mode="bicubic", align_corners=False)
    state["visual_embed.patch_embed.spatial_pos_embed.weight"] = grid.flatten(2)[0].t()
    own = model.state_dict()
    for key, value in state.items():
        torch.testing.assert_close(own[key], value)
    assert report.unexpected == ()
    assert set(report.ignored) == {"token_embed.weight", "loss_prepare.bias"}


def test_unknown_keys_are_reported_and_logged(caplog):
    model = _model()
    state = {**values(model), "blocks.0.attn.surprise": torch.zeros(1)}
    del state["up.bias"]
    with caplog.at_level(logging.WARNING, "vitadapter"):
        report = load_checkpoint(model, state)
    assert report.missing == ("up.bias",)
    assert report.unexpected == ("blocks.0.attn.surprise",)
    assert "up.bias" in caplog.text
    assert "surprise" in caplog.text
    with pytest.raises(ValueError, match=r"exactly the model's keys, got\nmissing \(1\): up.bias"):
        load_checkpoint(model, state, strict=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: values(_model(embed_dim=96)),
            "looks like a plain ViT of width 96 and depth 4",
        ),
        (lambda: values(_model(depth=8)), "looks like a plain ViT of width 48 and depth 8"),
        (
            lambda: values(_model("beit_adapter_base", img_size=64)),
            "looks like BEiT of width 48 and depth 4 with an adapter of 4 interactions",
        ),
        (
            lambda: values(_model("uniperceiver_adapter_base")),
            "looks like Uni-Perceiver of width",
        ),
        (
            lambda: values(_model(num_interactions=2, feature_rule="new")),
            "expected a plain ViT .* 4 interactions, got .* with an adapter of 2 interactions",
        ),
        (lambda: {"layers.0.blocks.0.attn.qkv.weight": torch.zeros(1)}, "a Swin Transformer"),
        (lambda: {"layer1.0.conv1.weight": torch.zeros(1)}, "looks like a ResNet"),
        (lambda: {"stages.0.0.dwconv.weight": torch.zeros(1)}, "looks like a ConvNeXt"),
        (lambda: {"foo.bar": torch.zeros(1)}, "no vision transformer .* with keys foo.bar"),
        (lambda: values(_model(deform_ratio=0.5)), r"shapes differ \(.*value_proj"),
        (
            lambda: {"state_dict": {}, "epoch": 3},
            "expected a state_dict, or .* with one, got state_dict",
        ),
    ],
    ids=[
        *("width", "depth", "family", "multi-modal", "interactions", "swin", "resnet"),
        *("convnext", "unknown", "shapes", "empty"),
    ],
)
def test_other_architectures_are_refused_and_named(make, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(_model(), make())
