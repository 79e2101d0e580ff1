# SPDX-License-Identifier: Apache-2.0
"""Published files into adapters around timm's models, by timm's own conversion."""

from __future__ import annotations

import pytest
import torch

import vitadapter
from optional import require_integration
from vitadapter import ViTAdapter, load_checkpoint
from weights import augreg_shapes

WIDTH, DEPTH = 48, 4
SIZES = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": 3}
ADAPTER = {"task": "segmentation", "conv_inplane": 8, "adapter_heads": 3, "deform_ratio": 1.0}


@pytest.fixture(autouse=True)
def timm():
    return require_integration("timm")


def _model(name: str, **options) -> ViTAdapter:
    return ViTAdapter.from_timm(name, model_args=SIZES, **{**ADAPTER, **options})


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _file(*, patch: int = 16, registers: str | None = None, count: int = 4, grid: int | None = 37):
    """A file in the names of DINOv2, of DINOv3 where it has no grid of positions."""
    state = {
        "cls_token": _random(1, 1, WIDTH),
        "mask_token": _random(1, WIDTH),
        "patch_embed.proj.weight": _random(WIDTH, 3, patch, patch),
        "patch_embed.proj.bias": _random(WIDTH),
        "norm.weight": _random(WIDTH),
        "norm.bias": _random(WIDTH),
    }
    if grid is not None:
        state["pos_embed"] = _random(1, grid**2 + 1, WIDTH)
    if registers is not None:
        state[registers] = _random(1, count, WIDTH)
    for index in range(DEPTH):
        block = {
            **{f"norm{n}.{leaf}": _random(WIDTH) for n in (1, 2) for leaf in ("weight", "bias")},
            **{f"ls{n}.gamma": _random(WIDTH) for n in (1, 2)},
            "attn.qkv.weight": _random(3 * WIDTH, WIDTH),
            "attn.qkv.bias": _random(3 * WIDTH),
            "attn.proj.weight": _random(WIDTH, WIDTH),
            "attn.proj.bias": _random(WIDTH),
            "mlp.fc1.weight": _random(4 * WIDTH, WIDTH),
            "mlp.fc1.bias": _random(4 * WIDTH),
            "mlp.fc2.weight": _random(WIDTH, 4 * WIDTH),
            "mlp.fc2.bias": _random(WIDTH),
        }
        state |= {f"blocks.{index}.{key}": value for key, value in block.items()}
    return state


def _dinov3(biases: bool = False):
    state = _file(registers="storage_tokens", grid=None) | {"rope_embed.periods": _random(4)}
    for index in range(DEPTH):
        key = f"blocks.{index}.attn.qkv.bias"
        state[key + "_mask"] = torch.ones(3 * WIDTH)
        if not biases:
            state[key] *= 0
            state[key][WIDTH : 2 * WIDTH] = 1  # of the keys: no logit is closer to another by it
    return state


def test_dinov3_loads_completely():
    model, file = _model("vit_small_patch16_dinov3"), _dinov3()
    report = load_checkpoint(model, {"teacher": file}, strict="vit")
    vit = model.backbone.model
    assert torch.equal(vit.reg_token, file["storage_tokens"])
    assert torch.equal(vit.blocks[3].gamma_2, file["blocks.3.ls2.gamma"])
    assert torch.equal(vit.blocks[1].attn.qkv.weight, file["blocks.1.attn.qkv.weight"])
    assert torch.equal(vit.norm.weight, file["norm.weight"])
    assert report.missing == report.unexpected == report.resized == ()
    assert {key.split(".")[0] for key in report.fresh} == set(model.own_parts)


def test_biases_of_dinov3_that_have_an_effect_are_not_dropped_silently(capsys):
    file = _dinov3(biases=True)
    report = load_checkpoint(_model("vit_small_patch16_dinov3"), file)
    assert report.missing == ()
    assert report.unexpected == tuple(
        f"backbone.model.blocks.{index}.attn.qkv.bias" for index in range(DEPTH)
    )
    model = _model("vit_small_patch16_dinov3_qkvb")
    load_checkpoint(model, file, strict="vit")
    query, _, value = file["blocks.2.attn.qkv.bias"].chunk(3)
    assert torch.equal(model.backbone.model.blocks[2].attn.q_bias, query)
    assert torch.equal(model.backbone.model.blocks[2].attn.v_bias, value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stripped", [False, True], ids=["whole", "without mask token"])
@pytest.mark.parametrize(("side", "size"), [(37, None), (16, 224)])
def test_dinov2_with_registers(stripped, side, size):
    model = _model("vit_small_patch14_reg4_dinov2", img_size=size)
    file = _file(patch=14, registers="register_tokens")
    if stripped:
        del file["mask_token"]
    load_checkpoint(model, file, strict="vit")
    vit = model.backbone.model
    # Registers have no position; timm adds the class token's to it.
    assert torch.equal(vit.cls_token, file["cls_token"] + file["pos_embed"][:, :1])
    assert torch.equal(vit.reg_token, file["register_tokens"])
    assert torch.equal(vit.blocks[0].ls1.gamma, file["blocks.0.ls1.gamma"])
    assert vit.pos_embed.shape == (1, side**2, WIDTH)
    if size is None:
        assert torch.equal(vit.pos_embed, file["pos_embed"][:, 1:])
    assert file.keys() >= {"register_tokens", "cls_token", "pos_embed"}  # as it was


def test_a_lost_key_that_timm_needs_is_named():
    file = _file(patch=14, registers="register_tokens")
    del file["cls_token"]
    with pytest.raises(ValueError, match=r"file that timm converts .* fails: KeyError: 'cls_tok"):
        load_checkpoint(_model("vit_small_patch14_reg4_dinov2"), file)


def test_dinov2_at_another_size_is_resized_as_timm_does():
    layers = require_integration("timm.layers")
    model = _model("vit_small_patch14_dinov2", img_size=224)
    file = _file(patch=14)
    report = load_checkpoint(model, file, strict="vit")
    expected = layers.resample_abs_pos_embed(file["pos_embed"], new_size=(16, 16))
    assert torch.equal(model.backbone.model.pos_embed, expected)
    assert report.resized == ("backbone.model.pos_embed",)


def test_patches_of_another_size_are_resized():
    model = _model("vit_small_patch16_224.dino")
    file = {key: value for key, value in _file(patch=14, grid=16).items() if ".ls" not in key}
    report = load_checkpoint(model, file, strict="vit")
    assert set(report.resized) == {
        *("backbone.model.patch_embed.proj.weight", "backbone.model.pos_embed"),
    }


def test_chunked_blocks_of_dinov2s_training():
    model = _model("vit_small_patch14_dinov2")
    file = _file(patch=14)
    chunks = {key.replace("blocks.", "blocks.0."): value for key, value in file.items()}
    heads = {"dino_head.last_layer.weight": _random(2)}
    teacher = {f"backbone.{key}": value for key, value in chunks.items()} | heads
    report = load_checkpoint(model, {"teacher": teacher}, strict="vit")
    assert torch.equal(model.backbone.model.blocks[2].norm1.bias, file["blocks.2.norm1.bias"])
    assert report.ignored == ("dino_head.last_layer.weight",)


def test_unused_heads_are_ignored(timm):
    model = _model("vit_tiny_patch16_224")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SIZES)
    report = load_checkpoint(model, vit.state_dict(), strict="vit")
    assert report.ignored == ("backbone.model.head.bias", "backbone.model.head.weight")


def test_an_own_file_of_another_image_size_is_resized():
    state = _model("vit_tiny_patch16_224", img_size=256).state_dict()
    model = _model("vit_tiny_patch16_224")
    report = load_checkpoint(model, state, strict=True)
    assert report.resized == ("backbone.model.pos_embed",)
    assert torch.equal(model.interactions[1].extractor.attn.value_proj.weight, state[
        "interactions.1.extractor.attn.value_proj.weight"])  # fmt: skip


def test_an_adapter_whose_vit_has_other_names_under_backbone():
    """As DINOv3's own: its segmentor is a list of two, of which the adapter is the first."""
    model, file = _model("vit_small_patch16_dinov3"), _dinov3()
    adapter = {
        key: torch.randn_like(value)
        for key, value in model.state_dict().items()
        if not key.startswith("backbone.") and value.is_floating_point()
    }
    whole = adapter | {f"backbone.{key}": value for key, value in file.items()}
    front = "segmentation_model.0."
    report = load_checkpoint(
        model,
        {
            "model": {front + key: v for key, v in whole.items()}
            | {"segmentation_model.1.x": _random(1)}
        },
        strict=True,
    )
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in adapter.items())
    assert torch.equal(model.backbone.model.reg_token, file["storage_tokens"])
    assert report.ignored == ("segmentation_model.1.x",)
    # Without its ViT, which is frozen and published apart.
    report = load_checkpoint(model, {front + key: value for key, value in adapter.items()})
    assert {key.split(".")[0] for key in report.missing} == {"backbone"}
    assert report.fresh == ()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_grid_that_is_not_square_is_refused(name):
    model = _model(name)
    file = {key: value for key, value in model.backbone.model.state_dict().items()}
    front = file["pos_embed"].shape[1] - 14**2 if "tiny" in name else 0
    file["pos_embed"] = _random(1, 16 * 12 + front, WIDTH)
    with pytest.raises(ValueError, match="pos_embed: expected a square grid after"):
        load_checkpoint(model, file)
    with pytest.raises(ValueError, match=r"grid: expected None for a model around another ViT"):
        load_checkpoint(model, file, grid=(16, 12))


def test_files_of_create_model_and_of_from_timm_are_told_apart():
    around = _model("vit_tiny_patch16_224")
    published = vitadapter.create_model("vit_adapter_tiny", **SIZES, **ADAPTER)
    with pytest.raises(ValueError, match=r"a model of create_model, .*; build .* by create_model"):
        load_checkpoint(around, published.state_dict())
    with pytest.raises(ValueError, match=r"an adapter around another ViT, .*from_timm or around"):
        load_checkpoint(published, around.state_dict())


def test_augregs_npz_names_load_into_timms_model(timm):
    model = _model("vit_tiny_patch16_224.augreg_in21k")
    shapes = augreg_shapes(width=WIDTH, heads=3, depth=DEPTH, entries=197)
    state = {key: _random(*shape) for key, shape in shapes.items()}
    load_checkpoint(model, state, strict="vit")
    vit = model.backbone.model
    assert torch.equal(vit.cls_token, state["cls"])
    assert torch.equal(vit.norm.weight, state["Transformer/encoder_norm/scale"])
    assert torch.equal(
        vit.blocks[3].mlp.fc1.weight.T,
        state["Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel"],
    )


@pytest.mark.parametrize("depth", [4, 24])  # the adapter has more keys, and the ViT
def test_a_vit_with_more_keys_than_its_adapter_takes_nothing_from_it(depth):
    build = {"model_args": {**SIZES, "depth": depth}, **ADAPTER, "components": "spm+extractor"}
    model = ViTAdapter.from_timm("vit_small_patch16_dinov3", **build)
    file = {
        key.replace("backbone.model.", "backbone."): torch.randn_like(value)
        for key, value in model.state_dict().items()
        if value.is_floating_point()
    }
    load_checkpoint(model, file, strict=True)
    own = {k.replace("backbone.model.", "backbone."): v for k, v in model.state_dict().items()}
    assert all(torch.equal(own[key], value) for key, value in file.items())


def test_prefix_tokens_that_the_model_does_not_run_are_unexpected():
    model = _model("deit3_small_patch16_224")
    file = {k: v for k, v in _file(grid=None).items() if k != "mask_token"}
    file |= {"pos_embed": _random(1, 14**2, WIDTH), "reg_token": _random(1, 4, WIDTH)}
    assert load_checkpoint(model, file).unexpected == ("backbone.model.reg_token",)
    with pytest.raises(ValueError, match=r"unexpected \(1\): backbone.model.reg_token"):
        load_checkpoint(model, file, strict="vit")


def test_deit_3s_own_names_load():
    model = _model("deit3_small_patch16_224")
    file = {k: v for k, v in _file(grid=None).items() if k != "mask_token"}
    file["pos_embed"] = _random(1, 14**2, WIDTH)
    own = {key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v
           for key, v in file.items()}  # fmt: skip
    load_checkpoint(model, own, strict="vit")
    assert torch.equal(model.backbone.model.blocks[2].ls2.gamma, file["blocks.2.ls2.gamma"])


def test_other_depths_and_failing_conversions_are_refused():
    file = {k: v for k, v in _file(grid=14).items() if ".ls" not in k}
    deeper = ViTAdapter.from_timm(
        "vit_tiny_patch16_224", model_args={**SIZES, "depth": 8}, **ADAPTER
    )
    with pytest.raises(ValueError, match="of 8 blocks, got 4"):
        load_checkpoint(deeper, file)
    with pytest.raises(ValueError, match="timm converts for Beit, got one with which it fails"):
        load_checkpoint(_model("beitv2_base_patch16_224"), file)
    two = _model("vit_tiny_patch16_224", num_interactions=2, feature_rule="new")
    with pytest.raises(ValueError, match="of 4 interactions, got 2"):
        load_checkpoint(_model("vit_tiny_patch16_224"), two.state_dict())


def test_the_vit_may_be_compiled():
    model = _model("vit_tiny_patch16_224")
    file = {k: v for k, v in _file(grid=14).items() if ".ls" not in k}
    model.backbone.model = torch.compile(model.backbone.model)
    load_checkpoint(model, file, strict="vit")
    assert torch.equal(model.backbone.model.blocks[0].norm1.weight, file["blocks.0.norm1.weight"])
