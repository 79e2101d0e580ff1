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


def test_maps_are_channels_last_so_that_tokens_are_views():
    spm = SpatialPriorModule(width=4, embed_dim=6).eval()
    for level in spm(torch.randn(2, 3, 64, 96)):
        assert level.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch", [1, 2])
def test_upsampling_is_the_transposed_convolution(batch):
    up = Upsample(6).double()
    x = torch.randn(batch, 6, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(up(x), F.conv_transpose2d(x, up.weight, up.bias, stride=2))
    assert up(x).is_contiguous(memory_format=torch.channels_last)
    base = torch.randn(batch, 6, 6, 10, dtype=torch.float64)
    torch.testing.assert_close(up(x, base), up(x) + base)
