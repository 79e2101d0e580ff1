# SPDX-License-Identifier: Apache-2.0
"""create_model: names, overrides, and errors that say what to do."""

from __future__ import annotations

import pytest
import torch

import vitadapter


def test_list_models_names_the_four_published_sizes():
    sizes = ("tiny", "small", "base", "large")
    assert vitadapter.list_models() == [f"vit_adapter_{size}" for size in sizes]


@pytest.mark.parametrize(
    ("name", "rate", "grid"),
    [
        ("vit_adapter_tiny", 0.1, 14),
        ("vit_adapter_small", 0.2, 14),
        ("vit_adapter_base", 0.3, 14),
        ("vit_adapter_large", 0.4, 24),
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
        ({"colour": 1}, "overrides: .*cffn_ratio.*with_cp.*got colour"),
        ({"num_interactions": 3}, "num_interactions: expected a divisor of depth = 4, got 3"),
        ({"num_interactions": 2}, "num_interactions: expected 4 for segmentation.*got 2"),
        ({"naive_attention": True}, 'naive_attention: expected attention="dense".*"deformable"'),
        ({"num_heads": 5}, "num_heads: expected a divisor of embed_dim = 48, got 5"),
        ({"pretrain_size": 100}, "pretrain_size: expected a multiple of the patch size 16"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: expected 0 <= rate < 1, got 1.0"),
        ({"n_points": 0}, "n_points: expected a positive number, got 0"),
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
