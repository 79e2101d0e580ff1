# SPDX-License-Identifier: Apache-2.0
"""The whole model: shapes, rules of the published system, training, compilation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from optional import sweep
from vitadapter import create_model
from vitadapter.layers.attention import ATTENTIONS

STRIDES = (4, 8, 16, 32)
BATCH_NORM_EPS = 1e-5


def _images(height: int = 64, width: int = 96, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("size", [(64, 96), (70, 101), (33, 200), (16, 16)], ids=str)
def test_maps_have_strides_4_to_32_for_any_image_size(build, attention, task, size):
    model = build(task, attention=attention).eval()
    with torch.no_grad():
        maps = model(_images(*size))
    expected = [(2, 48, math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in STRIDES]
    assert [tuple(m.shape) for m in maps] == expected
    assert all(m.isfinite().all() for m in maps)


def test_odd_sizes_are_padded_with_zeros_at_the_bottom_and_right_and_cropped(build):
    model = build().eval()
    images = _images(70, 101)
    padded = torch.zeros(2, 3, 96, 128)
    padded[:, :, :70, :101] = images
    with torch.no_grad():
        for got, full, stride in zip(model(images), model(padded), STRIDES, strict=True):
            assert torch.equal(got, full[:, :, : math.ceil(70 / stride), : math.ceil(101 / stride)])


@pytest.mark.parametrize("size", [(64, 96), (70, 33)], ids=["whole", "cropped"])
@pytest.mark.parametrize("num_interactions", [4, 0], ids=["adapter", "baseline"])
def test_maps_of_training_are_no_views(build, num_interactions, size):
    # The baselines' group norms need 32 channels.
    maps = build(num_interactions=num_interactions, embed_dim=96)(torch.randn(2, 3, *size))
    assert not any(m._is_view() for m in maps)


def test_batch_entries_do_not_see_each_other(build, randomise):
    model = randomise(build("detection")).double().eval()
    images = _images().double()
    with torch.no_grad():
        together = model(images)
        alone = model(images[1:])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b)


def _interaction_outputs(model, images):
    """Maps of `model`, and ViT tokens and pyramid tokens after every interaction."""
    vit, pyramid = [], []
    handles = [
        interaction.register_forward_hook(
            lambda module, args, out: (vit.append(out[0]), pyramid.append(out[1]), None)[-1]
        )
        for interaction in model.interactions
    ]
    with torch.no_grad():
        maps = model(images)
    for handle in handles:
        handle.remove()
    return maps, vit, pyramid


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_fresh_injectors_leave_the_vit_unchanged(build, task):
    model = build(task).eval()
    images = _images()
    _, vit, _ = _interaction_outputs(model, images)
    with torch.no_grad():
        x, shape = model.tokenize(images)
        for block, after in zip(model.blocks, vit, strict=True):
            x = block(x, shape)
            assert torch.equal(after, x)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_output_pyramid_follows_the_published_rule(build, randomise, task):
    model = randomise(build(task)).double().eval()
    images = _images().double()
    maps, vit, pyramid = _interaction_outputs(model, images)

    def as_map(tokens, h, w):
        return tokens.transpose(1, 2).reshape(2, 48, h, w)

    with torch.no_grad():
        c1 = model.spm(images)[0]
        c = pyramid[-1]
        c2, c3, c4 = as_map(c[:, :96], 8, 12), as_map(c[:, 96:120], 4, 6), as_map(c[:, 120:], 2, 3)
        c1 = c1 + F.conv_transpose2d(c2, model.up.weight, model.up.bias, stride=2)
        tokens = [vit[-1]] * 4 if task == "detection" else vit
        for index, (m, factor) in enumerate(zip((c1, c2, c3, c4), (4, 2, 1, 0.5), strict=True)):
            feature = as_map(tokens[index], 4, 6)
            resized = F.interpolate(
                feature, scale_factor=factor, mode="bilinear", align_corners=False
            )
            norm = getattr(model, f"norm{index + 1}")
            expected = (m + resized) / math.sqrt(1 + BATCH_NORM_EPS)
            expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
            torch.testing.assert_close(maps[index], expected)


def test_pyramid_starts_as_spatial_prior_plus_level_embedding(build, randomise):
    model = randomise(build()).eval()
    images = _images()
    seen = []
    model.interactions[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        model(images)
        levels = model.spm(images)[1:]
    parts = [
        level.flatten(2).transpose(1, 2) + model.level_embed[index]
        for index, level in enumerate(levels)
    ]
    torch.testing.assert_close(seen[0], torch.cat(parts, dim=1))


def test_extra_extractors_run_on_the_last_interaction_only(build):
    counts = [len(interaction.extra_extractors) for interaction in build().interactions]
    assert counts == [0, 0, 0, 2]


def test_every_extractor_drops_with_the_full_rate(build):
    model = build(drop_path_rate=0.3)
    extractors = [
        extractor
        for interaction in model.interactions
        for extractor in (interaction.extractor, *interaction.extra_extractors)
    ]
    assert [extractor.drop_path.rate for extractor in extractors] == [0.3] * 6


@pytest.mark.parametrize(
    ("name", "task", "global_blocks"),
    [
        ("tiny", "detection", [2, 5, 8, 11]),
        ("large", "detection", [5, 11, 17, 23]),
        ("small", "segmentation", list(range(12))),
    ],
)
def test_global_blocks_are_the_published_ones(name, task, global_blocks):
    with torch.device("meta"):
        model = create_model(f"vit_adapter_{name}", task=task)
    windows = [block.attn.window_size for block in model.blocks]
    assert [j for j, window in enumerate(windows) if window is None] == global_blocks
    assert {window for window in windows if window is not None} <= {14}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_parameter_gets_a_finite_gradient(build, randomise, attention):
    model = randomise(build("detection", attention=attention))
    sum(m.square().mean() for m in model(_images(70, 101))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A key's bias shifts all logits of a query alike, and softmax ignores that.
        if not name.endswith("attn.k.bias"):
            assert parameter.grad.any(), name
    # The class token's position is kept for published weights only.
    assert not model.pos_embed.grad[:, 0].any()


def test_activation_checkpointing_changes_no_gradient(build, randomise):
    plain = randomise(build("detection")).double()
    saving = build("detection", with_cp=True).double()
    saving.load_state_dict(plain.state_dict())
    images = _images().double()
    for model in (plain, saving):
        sum(m.square().mean() for m in model(images)).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_batch_norms_convert_to_sync_batch_norm_with_the_same_keys(build):
    model = build()
    keys = list(model.state_dict())
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(converted.state_dict()) == keys
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in converted.modules()) == norms == 10


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_autocast_runs_forward_and_backward(build, attention):
    model = build(attention=attention)
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(_images())
    sum(m.float().square().mean() for m in maps).backward()
    assert all(m.isfinite().all() for m in maps)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_maps_keep_the_dtype_of_a_converted_model(build, dtype):
    model = build("detection").to(dtype).eval()
    with torch.no_grad():
        assert {m.dtype for m in model(_images().to(dtype))} == {dtype}


@pytest.mark.parametrize("attention", sweep(["deformable", "cswin"], "deformable"))
def test_one_compiled_graph_serves_several_image_sizes(build, attention):
    torch._dynamo.reset()
    model = build(attention=attention, depth=1, num_interactions=1, add_vit_feature=False).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((64, 96), (96, 128)):
            images = _images(*size)
            for got, expected in zip(compiled(images), model(images), strict=True):
                torch.testing.assert_close(got, expected)
            with torch.compiler.set_stance("fail_on_recompile"):
                compiled(_images(160, 64))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"images: expected \[B, 3, H, W\], got shape \[3, 64, 64\]"),
        (torch.zeros(1, 4, 64, 64), "images: expected 3 channels in .*, got 4"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "images: expected a floating-.*torch.uint8"),
        (torch.zeros(1, 3, 0, 32), r"images: expected H, W >= 16 .*got shape \[1, 3, 0, 32\]"),
        (torch.zeros(1, 3, 32, 15), r"images: expected H, W >= 16 .*got shape \[1, 3, 32, 15\]"),
    ],
    ids=["rank", "channels", "dtype", "empty", "less than a patch"],
)
def test_bad_images_are_refused_by_name(build, images, message):
    with pytest.raises(ValueError, match=message):
        build()(images)
