# SPDX-License-Identifier: Apache-2.0
"""No images, no queries, no pixels, no points: empty results where the originals give them."""

import pytest
import torch

from vitadapter_ops.compat import (
    dcnv4,
    deformable_detr,
    detrex,
    functions,
    kernels,
    mmcv,
    msda,
    rfdetr,
    rtdetr,
)

HEADS, WIDTH = 4, 8
CHANNELS = HEADS * WIDTH
SHAPES, NO_PIXELS = [(6, 5), (3, 4)], [(0, 5), (0, 4)]

# images, queries, level table
SIZES = {
    "no images": (0, 5, SHAPES),
    "no queries": (2, 0, SHAPES),
    "no pixels": (2, 5, NO_PIXELS),
    "nothing": (0, 0, NO_PIXELS),
}
by_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def tensors(size, coordinates):
    batch, queries, shapes = size
    pixels = sum(height * width for height, width in shapes)
    made = (
        torch.randn(batch, queries, CHANNELS),
        torch.randn(batch, pixels, CHANNELS),
        torch.rand(batch, queries, 2, coordinates),
    )
    return [each.requires_grad_() for each in made], shapes


def in_mmcv(module, q, v, p, shapes):
    starts = torch.tensor([0, shapes[0][0] * shapes[0][1]])
    padding = torch.zeros(v.shape[:2], dtype=torch.bool)
    padding = padding if module.batch_first else padding.T
    return module(
        q, value=v, reference_points=p, spatial_shapes=torch.tensor(shapes),
        level_start_index=starts, key_padding_mask=padding,
    )  # fmt: skip


def in_detr(module, q, v, p, shapes):
    return module(q, p, v, shapes)


def in_rtdetr(module, q, v, p, shapes):
    return module(q, p, v, shapes, torch.ones(v.shape[:2], dtype=torch.bool))


def in_dfine(module, q, v, p, shapes):
    return module(q, p, v.view(*v.shape[:2], HEADS, WIDTH), shapes)


def in_mmcv_batch_second(module, q, v, p, shapes):
    return in_mmcv(module, q.transpose(0, 1), v.transpose(0, 1), p, shapes).transpose(0, 1)


def discrete():
    return rtdetr.MSDeformableAttention(CHANNELS, HEADS, 2, 3, method="discrete")


MODULES = {
    "deformable-detr": (lambda: deformable_detr.MSDeformAttn(CHANNELS, 2, HEADS, 3), in_detr),
    "dcnv4": (lambda: dcnv4.FlashDeformAttn(CHANNELS, 2, HEADS, 3), in_detr),
    "mmcv": (
        lambda: mmcv.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 3),
        in_mmcv_batch_second,
    ),
    "detrex": (
        lambda: detrex.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 3, batch_first=True),
        in_mmcv,
    ),
    "groundingdino": (
        lambda: detrex.GroundingDinoAttention(CHANNELS, HEADS, 2, 3, batch_first=True),
        in_mmcv,
    ),
    "rtdetr": (lambda: rtdetr.MSDeformableAttention(CHANNELS, HEADS, 2, [3, 6]), in_rtdetr),
    "rtdetr-discrete": (discrete, in_rtdetr),
    "d-fine": (lambda: rtdetr.DFineMSDeformableAttention(CHANNELS, HEADS, 2, [3, 6]), in_dfine),
}


@by_size
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("project", MODULES)
def test_modules(project, coordinates, size):
    make, call = MODULES[project]
    module, (given, shapes) = make(), tensors(size, coordinates)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = call(module, *given, shapes)
        assert list(out.shape) == [*size[:2], CHANNELS]
    call(module, *given, shapes).sum().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in given)
    assert given[0].grad is not None
    assert module.attention_weights.weight.grad.isfinite().all()


# --- functions


def applied(function):
    return lambda value, shapes, *points: function(
        value, torch.tensor(shapes), torch.tensor([0, shapes[0][0] * shapes[0][1]]), *points, 64
    )


def packed(value, shapes, locations, weights):
    numbers = torch.cat((locations.flatten(3), weights.flatten(3)), -1)
    starts = torch.tensor([0, shapes[0][0] * shapes[0][1]])
    return dcnv4.FlashDeformAttnFunction.apply(
        value, torch.tensor(shapes), starts, numbers, 64, locations.shape[4]
    )


def by_point(name, method):
    def function(value, shapes, locations, weights):
        return getattr(functions, name)(
            value, shapes, locations.flatten(3, 4), weights.flatten(3), [3, 3], method
        )

    return function


def pixels_last(value, shapes, locations, weights):
    return rfdetr.ms_deform_attn_core_pytorch(
        value.permute(0, 2, 3, 1), torch.tensor(shapes), locations, weights.flatten(3)
    )


def layer(value, shapes, locations, weights):
    return kernels.MultiScaleDeformableAttention()(
        value, torch.tensor(shapes), shapes, None, locations, weights, 64
    )


FUNCTIONS = {
    "apply": applied(functions.MSDeformAttnFunction.apply),
    "core": functions.ms_deform_attn_core_pytorch,
    "rfdetr": pixels_last,
    "kernels": layer,
}
OF_THREE_POINTS = {
    **FUNCTIONS,
    "dcnv4": packed,
    "v2": by_point("deformable_attention_core_func_v2", "default"),
    "v2-discrete": by_point("deformable_attention_core_func_v2", "discrete"),
    "v2-discrete-transformers": by_point("multi_scale_deformable_attention_v2", "discrete"),
}


def located(size, points):
    batch, queries, shapes = size
    pixels = sum(height * width for height, width in shapes)
    made = (
        torch.randn(batch, pixels, HEADS, WIDTH),
        torch.rand(batch, queries, HEADS, 2, points, 2),
        torch.rand(batch, queries, HEADS, 2, points),
    )
    return [each.requires_grad_() for each in made], shapes


def check_function(function, size, points):
    (value, *rest), shapes = located(size, points)
    out = function(value, shapes, *rest)
    assert list(out.shape) == [*size[:2], CHANNELS]
    if not value.numel() or not points:
        assert not out.any()
    out.sum().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in (value, *rest))


@by_size
@pytest.mark.parametrize("name", OF_THREE_POINTS)
def test_functions(name, size):
    check_function(OF_THREE_POINTS[name], size, 3)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_without_points(name):
    check_function(FUNCTIONS[name], (2, 5, SHAPES), 0)


@pytest.mark.parametrize("points", [0, 3])
@by_size
def test_extensions(size, points):
    (value, locations, weights), shapes = located(size, points)
    starts = [0, shapes[0][0] * shapes[0][1]]
    arguments = (value, torch.tensor(shapes), torch.tensor(starts), locations, weights)
    grad = torch.ones(*size[:2], CHANNELS)
    assert msda.ms_deform_attn_forward(*arguments, 64).shape == grad.shape
    assert mmcv.ms_deform_attn_forward(*arguments, 64).shape == grad.shape
    gradients = msda.ms_deform_attn_backward(*arguments, grad, 64)
    targets = [torch.zeros_like(each) for each in (value, locations, weights)]
    mmcv.ms_deform_attn_backward(*arguments, grad, *targets, 64)
    for mine, theirs in zip(gradients, targets, strict=True):
        assert torch.equal(mine, theirs)
