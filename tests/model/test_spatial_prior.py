# SPDX-License-Identifier: Apache-2.0
"""The spatial prior module against the published list of layers, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize, prune

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


class _Counting(torch.Tensor):
    """A weight of its own class, as quantised and sharded ones are: it knows convolutions only."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # Looking at it is free; whatever else computes with it has to be one of the layer's own.
        if function in (F.conv2d, F.conv_transpose2d, F.batch_norm):
            _Counting.calls += 1
        elif getattr(function, "__name__", "") in ("permute", "flatten", "mul", "repeat", "cat"):
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def _of_own_class(layer) -> None:
    weight = layer.weight.detach().as_subclass(_Counting)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)


def _with_bias(layer) -> None:
    layer.bias = torch.nn.Parameter(torch.randn(layer.out_channels))


class _Halved(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


_CHANGES = {
    "bias": _with_bias,
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", _Halved()),
    "weight norm": parametrizations.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight of another class": _of_own_class,
}


def _assert_inference_is_unchanged(spm):
    """Holds it to what is computed where gradients are recorded."""
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = spm(images)
    with torch.no_grad():
        for got, level in zip(spm(images), expected, strict=True):
            torch.testing.assert_close(got, level.detach())


@pytest.mark.parametrize("change", _CHANGES)
def test_inference_computes_what_a_changed_layer_does(randomise, change):
    spm = randomise(SpatialPriorModule(width=4, embed_dim=6)).double().eval()
    for stage in (spm.stem, spm.conv2, spm.conv3, spm.conv4):
        _CHANGES[change](stage[0])
    spm.double()
    _assert_inference_is_unchanged(spm)


@pytest.mark.parametrize("change", ["no running statistics", "training norms", "buffers removed"])
def test_inference_with_batch_statistics(randomise, change):
    spm = randomise(SpatialPriorModule(width=4, embed_dim=6)).double().eval()
    for norm in (each for each in spm.modules() if isinstance(each, torch.nn.BatchNorm2d)):
        if change == "training norms":
            norm.train()
            norm.momentum = 0.0  # so that the second pass finds what the first one did
        else:
            norm.running_mean = norm.running_var = None
            norm.track_running_stats = change == "buffers removed"
    _assert_inference_is_unchanged(spm)


@pytest.mark.parametrize("change", ["parametrized", "weight norm", "pruned"])
def test_a_changed_upsampling_is_the_transposed_convolution(change):
    up = Upsample(6).double()
    _CHANGES[change](up)
    x = torch.randn(1, 6, 3, 5, dtype=torch.float64)
    expected = F.conv_transpose2d(x, up.weight, up.bias, stride=2)
    torch.testing.assert_close(up(x), expected)
    base = torch.randn(1, 6, 6, 10, dtype=torch.float64)
    torch.testing.assert_close(up.added_to(base, x), expected + base)


def test_weights_of_another_class_are_left_to_the_convolution():
    up, conv = Upsample(6), SpatialPriorModule(width=4, embed_dim=6).eval().conv2
    x, base = torch.randn(1, 6, 3, 5), torch.zeros(1, 6, 6, 10)
    before = up(x).detach()
    for layer in (up, conv[0]):
        _of_own_class(layer)
    _Counting.calls = 0
    with torch.no_grad():
        for got in (up(x), up.added_to(base, x)):
            torch.testing.assert_close(torch.Tensor(got), before)
        conv(torch.randn(1, 4, 16, 24))
    assert _Counting.calls == 4  # a convolution and its norm, which gets what that one gives


@pytest.mark.parametrize("batch", [1, 2])
def test_upsampling_is_the_transposed_convolution(batch):
    up = Upsample(6).double()
    x = torch.randn(batch, 6, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(up(x), F.conv_transpose2d(x, up.weight, up.bias, stride=2))
    assert up(x).is_contiguous(memory_format=torch.channels_last)
    base = torch.randn(batch, 6, 6, 10, dtype=torch.float64)
    base = base.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(up.added_to(base, x), up(x) + base)
    assert up.added_to(base, x).is_contiguous(memory_format=torch.channels_last)
