# SPDX-License-Identifier: Apache-2.0
"""Plain ViTs with necks, and the partial adapters built on them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vitadapter
from vitadapter.baseline import ResidualBlock

SMALL = {"embed_dim": 96, "depth": 4, "num_heads": 3, "conv_inplane": 8, "pretrain_size": 64}


def _build(name="vit_tiny", task="detection", **overrides):
    return vitadapter.create_model(name, task=task, **{**SMALL, **overrides}).eval()


def _block_outputs(model, images):
    outputs = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
        for block in model.blocks
    ]
    with torch.no_grad():
        maps = model(images)
    for hook in hooks:
        hook.remove()
    return maps, outputs


@pytest.mark.parametrize("name", ["vit_tiny", "vitdet_tiny"])
def test_maps_are_normalised_and_resized_tokens(randomise, name):
    model = randomise(_build(name)).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    maps, outputs = _block_outputs(model, images)
    taps = outputs if name == "vit_tiny" else [outputs[-1]] * 4
    with torch.no_grad():
        grids = []
        for norm, tokens in zip(
            (model.norm1, model.norm2, model.norm3, model.norm4), taps, strict=True
        ):
            tokens = F.layer_norm(tokens, (96,), norm.weight, norm.bias, 1e-6)
            grids.append(tokens.transpose(1, 2).reshape(2, 96, 4, 6))

        def up(layer, x):
            return F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)

        first = F.group_norm(up(model.up1[0], grids[0]), 32, model.up1[1].weight, model.up1[1].bias)
        expected = (
            up(model.up1[3], F.gelu(first)),
            up(model.up2, grids[1]),
            grids[2],
            F.max_pool2d(grids[3], 2),
        )
    for got, want in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_residual_block_is_a_bottleneck_that_starts_as_the_identity(randomise):
    block = ResidualBlock(8).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    assert torch.equal(block(x, (3, 4)), x)
    randomise(block)

    def norm(layer, y):  # over channels
        mean, var = y.mean(1, keepdim=True), y.var(1, keepdim=True, correction=0)
        y = (y - mean) / (var + 1e-6).sqrt()
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    y = x.transpose(1, 2).reshape(2, 8, 3, 4)
    y = F.gelu(norm(block.norm1, F.conv2d(y, block.conv1.weight)))
    y = F.gelu(norm(block.norm2, F.conv2d(y, block.conv2.weight, padding=1)))
    y = norm(block.norm3, F.conv2d(y, block.conv3.weight))
    torch.testing.assert_close(block(x, (3, 4)), x + y.flatten(2).transpose(1, 2))


def test_beit_baseline_takes_the_published_blocks_and_strips_the_class_token():
    with torch.device("meta"):
        base = vitadapter.create_model("beit_base", task="segmentation")
        large = vitadapter.create_model("beit_large", task="segmentation")
    assert (base.taps, large.taps) == ([3, 5, 7, 11], [7, 11, 15, 23])
    model = _build("beit_base", "segmentation", depth=12, img_size=64)
    maps, outputs = _block_outputs(model, torch.randn(1, 3, 64, 64))
    third = outputs[7][:, 1:].transpose(1, 2).reshape(1, 96, 4, 4)
    torch.testing.assert_close(maps[2], third)


def test_spatial_prior_is_added_to_the_plain_maps(randomise):
    model = randomise(_build(components="spm", num_interactions=4)).double()
    plain = _build().double()
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for got, neck, prior in zip(model(images), plain(images), model.spm(images), strict=True):
            torch.testing.assert_close(got, neck + prior)


def test_injectors_act_before_each_quarter(randomise):
    model = _build(components="spm+injector", num_interactions=4)
    images = torch.randn(1, 3, 64, 64)
    _, before = _block_outputs(model, images)
    for index in range(4):
        torch.nn.init.ones_(model.interactions[index].injector.gamma)
        _, after = _block_outputs(model, images)
        equal = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert equal == [True] * index + [False] * (4 - index)
        torch.nn.init.zeros_(model.interactions[index].injector.gamma)


@pytest.mark.parametrize("size", [(64, 96), (70, 101)], ids=str)
@pytest.mark.parametrize("components", ["full", "spm", "spm+injector"])
def test_maps_have_strides_4_to_32_for_any_image_size(components, size):
    number = 0 if components == "full" else 4
    model = _build(components=components, num_interactions=number)
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *size))
    expected = [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == expected


def test_widths_that_the_necks_norms_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of 32 for a plain ViT"):
        vitadapter.create_model("vit_tiny", task="segmentation", embed_dim=48)
    assert vitadapter.create_model("vit_tiny", task="segmentation", embed_dim=96, depth=4)
