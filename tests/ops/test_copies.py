# SPDX-License-Identifier: Apache-2.0
"""Copies of modules, and one module used for inference and for training in turn."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vitadapter
from vitadapter_ops import MSDeformAttn
from vitadapter_ops.testing import tolerances


class Attention(MSDeformAttn):
    """MSDeformAttn of one tensor, which is its query and its input."""

    def forward(self, x):
        points = torch.full((1, x.shape[1], 1, 2), 0.4)
        return super().forward(x, points, x, [(4, 4), (2, 2)])


def attention():
    return Attention(16, 2, 4, 3), torch.randn(2, 20, 16)


def model():
    adapter = vitadapter.create_model(
        "vit_adapter_tiny",
        task="segmentation",
        embed_dim=48,
        depth=4,
        num_heads=3,
        conv_inplane=8,
        pretrain_size=64,
        drop_path_rate=0.0,
    )
    return adapter.eval(), torch.randn(1, 3, 64, 64)


@pytest.fixture(params=[attention, model])
def built(request):
    """A module whose parameters are not zero, and its input."""
    module, x = request.param()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module, x


def results(module, x):
    out = module(x)
    return list(out) if isinstance(out, list | tuple) else [out]


def loss(module, x):
    return sum(out.square().mean() for out in results(module, x))


def assert_equal(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])
def test_a_copy_is_the_same_and_its_own(built, copied):
    module, x = built
    expected = results(module, x)  # what was called before is copied, too
    other = copied(module)
    assert_equal(results(other, x), expected)
    loss(other, x).backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_equal(results(module, x), expected)


def test_an_average_of_weights_is_used(built):
    module, x = built
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(module)
    before = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss(module, x).backward()
    optimizer.step()
    average.update_parameters(module)
    halfway = copy.deepcopy(module)
    with torch.no_grad():
        for mine, first in zip(halfway.parameters(), before.parameters(), strict=True):
            mine.lerp_(first, 0.5)
        for got, expected in zip(results(average, x), results(halfway, x), strict=True):
            torch.testing.assert_close(got, expected, **tolerances.CLOSE_SUMS)


@pytest.mark.parametrize("inference", [torch.inference_mode, torch.no_grad])
def test_training_after_inference_is_that_without_it(built, inference):
    module, x = built
    fresh = copy.deepcopy(module)
    for _ in range(2):
        with inference():
            before = results(module, x)
        for each in (module, fresh):
            each.zero_grad()
            loss(each, x).backward()
        for mine, theirs in zip(module.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
        for each in (module, fresh):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
        with inference():
            assert not all(map(torch.equal, before, results(module, x)))
    with torch.no_grad():
        expected = results(fresh, x)
    with inference():
        assert_equal(results(module, x), expected)
