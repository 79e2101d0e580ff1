# SPDX-License-Identifier: Apache-2.0
"""Code that calls mmcv's compiled extension itself, as BEVFormer's does, under patch_mmcv.

mmcv is made up here, with what such code and patch_mmcv see of it, so that nothing has to be built.
"""

import sys
import types

import pytest
import torch
from torch import nn

import drop_in_checks
from drop_in_checks import (
    BATCH,
    HEADS,
    PIXELS,
    QUERIES,
    SHAPES,
    STARTS,
    TENSOR,
    WIDTH,
    original,
    tensors,
)
from vitadapter_ops.compat import mmcv
from vitadapter_ops.testing import oracles, tolerances

FUNCTIONS = ("ms_deform_attn_forward", "ms_deform_attn_backward")


def compiled(*arguments, **keywords):
    raise RuntimeError("implementation for device cpu not found")


@pytest.fixture
def package(monkeypatch):
    """A package named mmcv; its extension has another function beside the two."""

    def add(name, **contents):
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    package = add("mmcv")
    extension = add("mmcv._ext", nms=compiled, **dict.fromkeys(FUNCTIONS, compiled))

    def load_ext(name, functions):
        module = sys.modules[f"mmcv.{name}"]
        assert all(hasattr(module, function) for function in functions)
        return module

    loader = add("mmcv.utils.ext_loader", load_ext=load_ext)
    package.utils = add("mmcv.utils", ext_loader=loader)

    class MultiScaleDeformableAttention(nn.Module):
        def forward(self):
            raise NotImplementedError

    add(
        "mmcv.ops.multi_scale_deform_attn",
        ext_module=extension,
        MultiScaleDeformableAttention=MultiScaleDeformableAttention,
        MultiScaleDeformableAttnFunction=compiled,
        multi_scale_deformable_attn_pytorch=compiled,
    )
    package.ops = add("mmcv.ops")
    return package


def their_function(package, cast=None):
    """An autograd function around the extension; BEVFormer has one in fp32 and one in fp16."""
    extension = package.utils.ext_loader.load_ext("_ext", list(reversed(FUNCTIONS)))

    class TheirFunction(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=cast)
        def forward(ctx, value, shapes, starts, locations, weights, step):
            ctx.step = step
            ctx.save_for_backward(value, shapes, starts, locations, weights)
            return extension.ms_deform_attn_forward(
                value, shapes, starts, locations, weights, im2col_step=step
            )

        @staticmethod
        @torch.autograd.function.once_differentiable
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, grad_output):
            inputs = ctx.saved_tensors
            targets = [torch.zeros_like(inputs[place]) for place in (0, 3, 4)]
            extension.ms_deform_attn_backward(
                *inputs, grad_output.contiguous(), *targets, im2col_step=ctx.step
            )
            return targets[0], None, None, *targets[1:], None

    return TheirFunction


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("first", ["imported first", "patched first"])
def test_code_that_calls_the_extension_itself_trains(package, first, precision):
    function = their_function(package) if first == "imported first" else None
    with mmcv.patch_mmcv():
        function = function or their_function(package)

        def ours(module, value, *points):
            return function.apply(value, TENSOR, STARTS, *points, 64)

        drop_in_checks.check(original, ours, nn.Module(), tensors(), precision)


def test_functions_that_cast_under_autocast(package):
    with mmcv.patch_mmcv():
        function = their_function(package, cast=torch.float32)
        value, *points = tensors()
        expected = oracles.grid_sample(value, SHAPES, *points)
        value.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            got = function.apply(value, TENSOR, STARTS, *points, 64)
        got.sum().backward()
        torch.testing.assert_close(got, expected)
        assert value.grad.isfinite().all()


def test_the_extensions_own_functions_come_back(package):
    extension = sys.modules["mmcv._ext"]
    with mmcv.patch_mmcv() as patch:
        assert {f"mmcv._ext.{name}" for name in FUNCTIONS} <= set(patch.replaced)
        assert extension.ms_deform_attn_backward is mmcv.ms_deform_attn_backward
        assert extension.nms is compiled
    assert all(getattr(extension, name) is compiled for name in FUNCTIONS)


def test_gradients_are_written_where_the_caller_says():
    """Added to grad_value and put into the others, as mmcv's kernels do."""
    value, locations, weights = (each.requires_grad_() for each in tensors())
    grad = torch.randn(BATCH, QUERIES, HEADS * WIDTH)
    out = mmcv.ms_deform_attn_forward(value, TENSOR, STARTS, locations, weights, im2col_step=64)
    assert not out.requires_grad
    exact = oracles.grid_sample(value, SHAPES, locations, weights)
    expected = torch.autograd.grad(exact, (value, locations, weights), grad)
    targets = [torch.ones_like(each) for each in (value, locations, weights)]
    # A target may be a part of a larger tensor.
    targets[0] = torch.ones(BATCH, PIXELS, HEADS, 2 * WIDTH)[..., ::2]
    result = mmcv.ms_deform_attn_backward(
        value, TENSOR, STARTS, locations, weights, grad, *targets, im2col_step=64
    )
    assert result is None
    torch.testing.assert_close(targets[0] - 1, expected[0], **tolerances.CLOSE_SUMS)
    for mine, theirs in zip(targets[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, **tolerances.CLOSE_MODELS)
