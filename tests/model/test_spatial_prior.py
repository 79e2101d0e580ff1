# SPDX-License-Identifier: Apache-2.0
"""The spatial prior module against the published list of layers, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitadapter.layers.spatial_prior import SpatialPriorModule
from vitadapter.layers.upsample import Upsample


def _conv_bn_relu(x, conv, norm, stride):
    x = F.conv2d(x, conv.weight, stride=stride, padding=1)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    x = (x - mean) / (var + 1e-5).sqrt()
    return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


def test_spatial_prior_is_the_published_convolutional_pyramid(randomise):
    spm = randomise(SpatialPriorModule(width=4, embed_dim=6)).double().train()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)

    x = images
    for index, stride in ((0, 2), (3, 1), (6, 1)):
        x = _conv_bn_relu(x, spm.stem[index], spm.stem[index + 1], stride)
    stages = [F.max_pool2d(x, kernel_size=3, stride=2, padding=1)]
    for conv, norm, _ in (spm.conv2, spm.conv3, spm.conv4):
        stages.append(_conv_bn_relu(stages[-1], conv, norm, 2))
    projections = (spm.fc1, spm.fc2, spm.fc3, spm.fc4)

    assert [stage.shape[1] for stage in stages] == [4, 8, 16, 16]
    for got, stage, fc in zip(spm(images), stages, projections, strict=True):
        torch.testing.assert_close(got, F.conv2d(stage, fc.weight, fc.bias))


def test_images_that_are_not_multiples_of_32_are_refused():
    with pytest.raises(RuntimeError):
        SpatialPriorModule(width=4, embed_dim=6)(torch.randn(2, 3, 64, 90))


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_are_channels_last_so_that_tokens_are_views(batch):
    spm = SpatialPriorModule(width=4, embed_dim=6).eval()
    for level in spm(torch.randn(batch, 3, 64, 96)):
        # Of a batch of one, is_contiguous ignores a stride at which convolutions look.
        assert level.stride() == level.clone(memory_format=torch.channels_last).stride()


@pytest.mark.parametrize("norm", ["BatchNorm2d", "SyncBatchNorm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inference_folds_batch_norms_into_convolutions(randomise, dtype, norm, monkeypatch):
    spm = randomise(SpatialPriorModule(width=4, embed_dim=6)).double().eval()
    if norm == "SyncBatchNorm":
        spm = torch.nn.SyncBatchNorm.convert_sync_batchnorm(spm)
    for each in spm.modules():
        if isinstance(each, torch.nn.modules.batchnorm._NormBase):
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    exact = [level.detach() for level in spm(images)]
    spm.to(dtype)
    usual = [level.detach() for level in spm(images.to(dtype))]
    monkeypatch.setattr(F, "batch_norm", None)  # calling it would raise
    with torch.no_grad():
        folded = spm(images.to(dtype))
    for got, one, true in zip(folded, usual, exact, strict=True):
        assert got.dtype == dtype
        error, allowed = ((each - true).abs().max() for each in (got, one))
        assert error <= 2 * allowed + 1e-13


def test_hooks_and_other_layers_are_called_in_inference(randomise):
    spm = randomise(SpatialPriorModule(width=4, embed_dim=6)).eval()
    images = torch.randn(1, 3, 64, 96)
    seen = []
    handle = spm.stem[1].register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        expected = spm(images)
        handle.remove()
        assert len(seen) == 1
        for got, level in zip(spm(images), expected, strict=True):
            torch.testing.assert_close(got, level)
        spm.stem[1] = torch.nn.Identity()
        with_grad = [level.detach() for level in torch.enable_grad()(spm)(images)]
        for got, level in zip(spm(images), with_grad, strict=True):
            torch.testing.assert_close(got, level)


@pytest.mark.parametrize("batch", [1, 2])
def test_upsampling_is_the_transposed_convolution(batch):
    up = Upsample(6).double()
    x = torch.randn(batch, 6, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(up(x), F.conv_transpose2d(x, up.weight, up.bias, stride=2))
    assert up(x).is_contiguous(memory_format=torch.channels_last)
    base = torch.randn(batch, 6, 6, 10, dtype=torch.float64)
    expected = up(x) + base
    base = base.contiguous(memory_format=torch.channels_last)
    assert up(x, base).data_ptr() == base.data_ptr()
    torch.testing.assert_close(base, expected.detach())
