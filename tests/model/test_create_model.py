# SPDX-License-Identifier: Apache-2.0
"""create_model: names, overrides, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import vitadapter
from vitadapter import registry
from vitadapter.adapter import BEiTAdapter
from vitadapter.config import ModelConfig

SIZES = ("tiny", "small", "base", "large")


def test_list_models_names_every_published_model():
    expected = {f"vit_adapter_{size}" for size in SIZES}
    expected |= {f"{name}_{size}" for name in ("vit", "vitdet") for size in SIZES}
    expected |= {"vit_adapter_base_light", "vit_adapter_large_light", "beit_base", "beit_large"}
    expected |= {
        f"{name}_adapter_{size}" for name in ("beit", "uniperceiver") for size in ("base", "large")
    }
    assert set(vitadapter.list_models()) == expected


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("name", vitadapter.list_models())
def test_every_model_gives_four_maps(name, task):
    with torch.device("meta"):
        model = vitadapter.create_model(name, task=task).eval()
        maps = model(torch.empty(1, 3, 512, 512))
    assert [tuple(m.shape) for m in maps] == [
        (1, model.embed_dim, 512 // stride, 512 // stride) for stride in model.strides
    ]


@pytest.mark.parametrize(
    ("name", "rate", "grid"),
    [
        ("vit_adapter_tiny", 0.1, 14),
        ("vit_adapter_small", 0.2, 14),
        ("vit_adapter_base", 0.3, 14),
        ("vit_adapter_large", 0.4, 24),
        ("vit_small", 0.1, 14),
        ("vitdet_large", 0.4, 24),
    ],
)
def test_defaults_are_the_published_ones(name, rate, grid):
    with torch.device("meta"):
        model = vitadapter.create_model(name, task="detection")
    assert model.config.drop_path_rate == rate
    assert model.pretrain_grid == grid
    assert model.strides == (4, 8, 16, 32)


def test_pretrain_size_sets_the_position_grid(build):
    assert build(pretrain_size=96).pos_embed.shape == (1, 37, 48)


def test_overrides_reach_the_layers(build):
    model = build(n_points=2, deform_ratio=0.5, cffn_ratio=0.5, conv_inplane=4)
    extractor = model.interactions[0].extractor
    assert extractor.attn.n_points == 2
    assert extractor.attn.value_proj.out_features == 24
    assert extractor.ffn.fc1.out_features == 24
    assert model.spm.stem[0].out_channels == 4


def test_light_variant_runs(build):
    model = build(
        num_interactions=1, with_cffn=False, use_extra_extractor=False, add_vit_feature=False
    )
    maps = model(torch.randn(2, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]
    assert not any("ffn" in key or "extra_" in key for key in model.state_dict())


def test_light_models_leave_out_what_was_published():
    with torch.device("meta"):
        base = vitadapter.create_model("vit_adapter_base_light", task="segmentation")
        large = vitadapter.create_model("vit_adapter_large_light", task="segmentation")
    assert len(base.interactions) == 1
    assert base.interactions[0].extractor.ffn is None
    assert not base.config.add_vit_feature
    assert len(large.interactions) == 4
    assert large.interactions[0].extractor.attn.value_proj.out_features == 256
    for model in (base, large):
        assert not any("extra_extractors" in key for key in model.state_dict())


@pytest.mark.parametrize("components", ["spm", "spm+injector", "spm+extractor"])
def test_components_leave_out_parts(build, components):
    model = build("detection", components=components, embed_dim=96)
    keys = "\n".join(model.state_dict())
    assert ("injector" in keys) == ("injector" in components)
    assert ("extractor" in keys) == ("extractor" in components)
    assert "spm.fc1" in keys
    maps = model(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    sum(m.square().mean() for m in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_no_interaction_is_the_plain_vit():
    with torch.device("meta"):
        none = vitadapter.create_model("vit_adapter_small", task="detection", num_interactions=0)
        plain = vitadapter.create_model("vit_small", task="detection")
    assert list(none.state_dict()) == list(plain.state_dict())


def test_feature_rule_frees_segmentation_from_four_interactions(build):
    assert len(build(num_interactions=2, feature_rule="new")(torch.randn(2, 3, 32, 32))) == 4


def test_interactions_may_have_unequal_shares(build):
    model = build("detection", interaction_indexes=[[0, 0], [1, 3]])
    assert [len(blocks) for blocks in model.config.ranges] == [1, 3]
    assert len(model(torch.randn(2, 3, 32, 32))) == 4


def test_a_plain_vit_needs_no_adapter_heads_that_divide_its_width():
    sizes = {"embed_dim": 64, "num_heads": 2, "pretrain_size": 64}
    model = vitadapter.create_model("vit_tiny", task="detection", depth=4, **sizes)
    assert len(model(torch.randn(1, 3, 64, 64))) == 4
    with pytest.raises(ValueError, match="adapter_heads: expected a divisor of embed_dim = 64"):
        vitadapter.create_model("vit_adapter_tiny", task="detection", depth=4, **sizes)


def test_naive_attention_gives_the_same_maps(build):
    fused = build(attention="dense").double().eval()
    naive = build(attention="dense", naive_attention=True).double().eval()
    naive.load_state_dict(fused.state_dict())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(fused(images), naive(images), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_interactions", [1, 2, 4])
def test_detection_takes_any_divisor_of_the_depth(build, num_interactions):
    model = build("detection", num_interactions=num_interactions)
    assert len(model.interactions) == num_interactions
    assert len(model(torch.randn(2, 3, 32, 32))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "global"}, "attention: expected one of deformable, dense, cswin, pale"),
        ({"task": "depth"}, "task: expected one of detection, segmentation, got 'depth'"),
        ({"colour": 1}, "^colour: expected one of .*got colour=1; options: .*cffn_ratio.*with_cp"),
        ({"drop_path": 0.1}, "^drop_path: .*got drop_path=0.1; did you mean drop_path_rate?"),
        ({"num_interactions": 3}, "num_interactions: expected 0 or a divisor of depth = 4, got 3"),
        ({"num_interactions": 2}, "num_interactions: expected 4 for segmentation.*got 2"),
        ({"naive_attention": True}, 'naive_attention: expected attention="dense".*"deformable"'),
        ({"num_heads": 5}, "num_heads: expected a divisor of embed_dim = 48, got 5"),
        ({"pretrain_size": 100}, "pretrain_size: expected a multiple of the patch size 16"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: expected 0 <= rate < 1, got 1.0"),
        ({"components": "injector"}, "components: expected one of full, .*got 'injector'"),
        ({"feature_rule": "both"}, "feature_rule: expected one of new, old, got 'both'"),
        ({"interaction_indexes": [[0, 1]]}, r"interaction_indexes: .*0 to 3 .*got \[\[0, 1\]\]"),
        (
            {"patch_size": 14, "pretrain_size": 56},
            "patch_size: expected 16 .*got 14; ViTAdapter.from_timm",
        ),
        ({"img_size": 512}, "img_size: expected None, .*any size.*got 512"),
        ({"injector_init": math.nan}, "injector_init: expected a finite number, got nan"),
        ({"n_points": 0}, "n_points: expected a positive number, got 0"),
        ({"in_chans": 0}, "in_chans: expected a positive number, got 0"),
        (
            {"adapter_heads": 5},
            "adapter_heads: expected a divisor of embed_dim = 48 and of .*got 5",
        ),
        ({"deform_ratio": 0.3}, r"adapter_heads: .* int\(deform_ratio \* embed_dim\) = 14, got 6"),
        ({"adapter_heads": 5, "attention": "dense"}, "of embed_dim = 48, got 5"),
        ({"num_interactions": 5}, "num_interactions: expected 0 or a divisor of depth = 4, got 5"),
        ({"num_interactions": -1}, "num_interactions: expected at most one .* 4 blocks.*got -1"),
        ({"task": "detection", "depth": 6, "num_interactions": 2}, "depth: expected a multiple"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_by_name(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"name: expected one of vit_adapter_tiny.*got 'resnet'"):
        vitadapter.create_model("resnet", task="detection")


@pytest.mark.parametrize("img_size", [16, 500])
def test_image_size_that_beit_cannot_serve_says_which_are_possible(img_size):
    with pytest.raises(ValueError, match=rf"img_size: expected a multiple of 32 .*got {img_size}"):
        vitadapter.create_model("beit_adapter_base", task="segmentation", img_size=img_size)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("conv_inplane", 8.0), ("conv_inplane", "8"), ("embed_dim", 48.0), ("num_heads", "3")),
        *(("window_size", 2.5), ("n_points", True), ("pretrain_size", (64, 64))),
        *(("img_size", (512, 512)), ("num_interactions", 2.0), ("cffn_ratio", "1")),
        *(("freeze_backbone", "yes"), ("use_extra_extractor", 0), ("feature_rule", 1)),
    ],
)
def test_values_of_other_types_are_refused(build, name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected (int|float|bool|str).*, got "):
        build(**{name: value})


def test_a_name_of_another_type_is_refused():
    for name in (["vit_adapter_tiny"], None):
        with pytest.raises(TypeError, match=r"^name: expected str, got "):
            vitadapter.create_model(name, task="detection")


def test_numbers_of_numpy_are_numbers(build):
    model = build(conv_inplane=np.int64(8), cffn_ratio=np.float32(0.5), deform_ratio=1)
    assert model.config.conv_inplane == 8


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(ModelConfig) if field.type == "float"]
)
def test_an_integer_is_a_number(build, name):
    value = int(name not in ("injector_init", "drop_path_rate"))
    build(**{name: value})(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"cffn_ratio": 0.001}, "cffn_ratio: expected a hidden width of at least 1, got 0.001 of"),
        ({"mlp_ratio": 0.001}, "mlp_ratio: expected a hidden width of at least 1"),
        ({"interaction_indexes": [0, 1, 2, 3]}, r"interaction_indexes: .*, got \[0, 1, 2, 3\]"),
        ({"interaction_indexes": 4}, "interaction_indexes: expected pairs"),
        ({"interaction_indexes": [(0, 1.0), (2, 3)]}, "^interaction_indexes: expected pairs"),
        ({"interaction_indexes": [(0.0, 1), (2, 3)]}, "^interaction_indexes: expected pairs"),
        ({"cffn_ratio": math.inf}, "^cffn_ratio: expected a positive number, got inf"),
        ({"family": "beit"}, "^family: expected one of the options below"),
    ],
)
def test_values_that_make_no_model_are_refused(build, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(**overrides)


def test_a_family_is_registered_once_with_the_adapter_and_without():
    assert registry.families() == ["plain_vit", "beit", "uniperceiver"]
    assert registry.builder_of("beit", adapter=True) is BEiTAdapter
    assert registry.builder_of("uniperceiver", adapter=False) is None
    with pytest.raises(ValueError, match="one that nothing builds yet, got 'beit'"):
        registry.builds("beit", adapter=True)(BEiTAdapter)
