# SPDX-License-Identifier: Apache-2.0
"""torch.jit.trace, where sizes are tensors, and all other kinds of integers that sizes come as."""

import numpy as np
import pytest
import torch
from torch import nn

from optional import require_integration
from vitadapter_ops.compat import dcnv4, deformable_detr, detrex, functions, mmcv, msda, rtdetr
from vitadapter_ops.compat.transformers import patch_transformers
from vitadapter_ops.testing import tolerances

HEADS, WIDTH, POINTS = 3, 8, 2
CHANNELS = HEADS * WIDTH
SHAPES = [(5, 8), (3, 4)]

pytestmark = pytest.mark.filterwarnings("ignore")  # tracers warn of every size that they fix


class OverMaps(nn.Module):
    """Feature maps, whose sizes are tensors while tracing, before an attention."""

    def __init__(self, attention, call):
        super().__init__()
        self.attention, self.call = attention, call

    def forward(self, query, reference, *maps):
        shapes = [each.shape[-2:] for each in maps]
        value = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)
        return self.call(self.attention, query, value, reference, shapes)


def as_mmcv(module, query, value, reference, shapes):
    return module(query, value=value, reference_points=reference, spatial_shapes=shapes)


def as_detr(module, query, value, reference, shapes):
    return module(query, reference, value, shapes)


def as_dfine(module, query, value, reference, shapes):
    return module(query, reference, value.unflatten(2, (HEADS, WIDTH)), shapes)


MODULES = {
    "deformable-detr": (deformable_detr.MSDeformAttn(CHANNELS, 2, HEADS, POINTS), as_detr),
    "dcnv4": (dcnv4.FlashDeformAttn(CHANNELS, 2, HEADS, POINTS), as_detr),
    "mmcv": (
        mmcv.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, POINTS, batch_first=True),
        as_mmcv,
    ),
    "groundingdino": (
        detrex.GroundingDinoAttention(CHANNELS, HEADS, 2, POINTS, batch_first=True),
        as_mmcv,
    ),
    "rtdetr": (rtdetr.MSDeformableAttention(CHANNELS, HEADS, 2, [1, 2]), as_detr),
    "rtdetr-discrete": (
        rtdetr.MSDeformableAttention(CHANNELS, HEADS, 2, POINTS, method="discrete"),
        as_detr,
    ),
    "d-fine": (rtdetr.DFineMSDeformableAttention(CHANNELS, HEADS, 2, [1, 2]), as_dfine),
}


def inputs(batch, queries):
    maps = [torch.randn(batch, CHANNELS, *shape) for shape in SHAPES]
    return torch.randn(batch, queries, CHANNELS), torch.rand(batch, queries, 2, 4), *maps


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("project", MODULES)
def test_modules_are_traced(project, grad):
    module = OverMaps(*MODULES[project]).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, inputs(2, 5), check_trace=False)
        for each in (inputs(2, 5), inputs(3, 4)):  # the sizes of the maps are fixed, no others
            torch.testing.assert_close(traced(*each), module(*each))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_patched_model_is_traced(grad):
    require_integration("transformers")
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, layer_type="basic",
        out_features=["stage3", "stage4"],
    )  # fmt: skip
    config = DeformableDetrConfig(
        backbone_config=backbone, d_model=32, num_feature_levels=2, encoder_layers=1,
        decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=4,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = DeformableDetrForObjectDetection(config).eval()

        def forward(self, pixels):
            return self.model(pixels).logits

    module, images = Logits(), torch.randn(1, 3, 64, 96)
    with torch.set_grad_enabled(grad), patch_transformers("deformable_detr"):
        expected = module(images)
        traced = torch.jit.trace(module, images, check_trace=False)
    assert "vitadapter_ops::ms_deform_attn" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images), expected, **tolerances.CLOSE_SUMS)


# --- integers of other kinds

KINDS = {
    "numpy integers": [tuple(np.int64(side) for side in shape) for shape in SHAPES],
    "array": np.array(SHAPES),
    "list of arrays": list(np.array(SHAPES)),
    "tensor": torch.tensor(SHAPES),
    "tensor of 32 bits": torch.tensor(SHAPES, dtype=torch.int32),
    "list of tensors": list(torch.tensor(SHAPES)),
    "0-d tensors": [tuple(torch.tensor(side) for side in shape) for shape in SHAPES],
    "sizes": [torch.Size(shape) for shape in SHAPES],
}


def by_point(name, method):
    def function(value, shapes, locations, weights):
        return getattr(functions, name)(
            value, shapes, locations.flatten(3, 4), weights.flatten(3), np.array([2, 2]), method
        )

    return function


def extension(value, shapes, locations, weights):
    starts = np.array([0, 40])
    return msda.ms_deform_attn_forward(value, shapes, starts, locations, weights, np.int64(64))


def packed(value, shapes, locations, weights):
    numbers = torch.cat((locations.flatten(3), weights.flatten(3)), -1)
    return dcnv4.FlashDeformAttnFunction.apply(value, shapes, None, numbers, 64, np.int64(2))


FUNCTIONS = {
    "core": functions.ms_deform_attn_core_pytorch,
    "extension": extension,
    "dcnv4": packed,
    "v2": by_point("deformable_attention_core_func_v2", "default"),
    "v2-discrete": by_point("deformable_attention_core_func_v2", "discrete"),
    "v2-discrete-transformers": by_point("multi_scale_deformable_attention_v2", "discrete"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sizes_of_functions(name, kind):
    value = torch.randn(2, 52, HEADS, WIDTH)
    points = torch.rand(2, 5, HEADS, 2, POINTS, 2), torch.rand(2, 5, HEADS, 2, POINTS)
    function = FUNCTIONS[name]
    assert torch.equal(function(value, KINDS[kind], *points), function(value, SHAPES, *points))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("project", MODULES)
def test_sizes_of_modules(project, kind):
    module, call = MODULES[project]
    value = torch.randn(2, 52, CHANNELS)
    query, reference = torch.randn(2, 5, CHANNELS), torch.rand(2, 5, 2, 4)
    module.eval()
    got = call(module, query, value, reference, KINDS[kind])
    assert torch.equal(got, call(module, query, value, reference, SHAPES))


def test_numpy_integers_in_constructors():
    two = np.int64(2)
    module = rtdetr.MSDeformableAttention(np.int64(16), two, two, np.array([1, 2]))
    assert module.num_points_list == [1, 2]
    assert rtdetr.MSDeformableAttention(16, 2, 2, two).num_points_list == [2, 2]
    mmcv.MultiScaleDeformableAttention(np.int64(16), two, two, two)
