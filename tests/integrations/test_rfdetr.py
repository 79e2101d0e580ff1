# SPDX-License-Identifier: Apache-2.0
"""RF-DETR's attention with its own function and with ours."""

import functools
import importlib

import pytest
import torch

import drop_in_checks
from optional import require_integration
from vitadapter_ops.compat import deformable_detr, rfdetr
from vitadapter_ops.testing import tolerances

SHAPES = [(5, 8), (3, 4), (2, 2)]
STARTS = torch.tensor([0, 40, 52])
PIXELS, BATCH, QUERIES, WIDTH, HEADS = 56, 2, 7, 24, 3

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def theirs():
    return require_integration("rfdetr.models.ops.modules.ms_deform_attn")


def attention(theirs):
    return drop_in_checks.perturbed(theirs.MSDeformAttn(WIDTH, 3, HEADS, 4))


def call(padding, module, query, value, reference):
    return module(query, reference, value, torch.tensor(SHAPES), STARTS, padding, SHAPES)


def tensors(coordinates, levels=3):
    reference = torch.rand(BATCH, QUERIES, levels, coordinates) * 0.8 + 0.1
    return torch.randn(BATCH, QUERIES, WIDTH), torch.randn(BATCH, PIXELS, WIDTH), reference


@pytest.mark.parametrize("precision", drop_in_checks.PRECISIONS)
@pytest.mark.parametrize(("coordinates", "levels"), [(2, 3), (4, 3), (4, 1)])
def test_patched_module_is_the_original(theirs, coordinates, levels, precision):
    padding = torch.rand(BATCH, PIXELS) < 0.3
    original = functools.partial(call, padding)
    ours = drop_in_checks.under(rfdetr.patch_rfdetr, original)
    drop_in_checks.check(original, ours, attention(theirs), tensors(coordinates, levels), precision)


def test_two_steps_of_training_a_decoder_are_the_originals(theirs):
    transformer = importlib.import_module("rfdetr.models.transformer")
    model = transformer.Transformer(
        d_model=WIDTH, sa_nhead=HEADS, ca_nhead=HEADS, num_queries=QUERIES, num_decoder_layers=2,
        dim_feedforward=48, return_intermediate_dec=True, group_detr=2, num_feature_levels=3,
        dec_n_points=2, lite_refpoint_refine=True, bbox_reparam=True,
    )  # fmt: skip
    model.decoder.bbox_embed = None  # what LWDETR sets with lite_refpoint_refine
    drop_in_checks.perturbed(model)
    maps = [torch.randn(BATCH, WIDTH, *shape) for shape in SHAPES]
    masks = [torch.rand(BATCH, *shape) < 0.2 for shape in SHAPES]
    positions = [torch.randn_like(each) for each in maps]
    boxes, queries = torch.rand(2 * QUERIES, 4), torch.randn(2 * QUERIES, WIDTH)
    target = torch.randn(2, BATCH, 2 * QUERIES, WIDTH)

    def loss(model):
        hidden_states, *_ = model(maps, masks, positions, boxes, queries)
        return (hidden_states - target).square().mean()

    drop_in_checks.check_training(model, loss, rfdetr.patch_rfdetr)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_compiled_in_one_graph(theirs, masked):
    padding = torch.rand(BATCH, PIXELS) < 0.3 if masked else None
    original = functools.partial(call, padding)
    ours = drop_in_checks.under(rfdetr.patch_rfdetr, drop_in_checks.in_one_graph(original))
    drop_in_checks.check(original, ours, attention(theirs), tensors(4))


@pytest.mark.parametrize("ours", [False, True], ids=["patched", "ours"])
def test_state_travels_and_gives_the_same_output(theirs, ours):
    module, arguments = attention(theirs), tensors(4)
    padding = torch.rand(BATCH, PIXELS) < 0.3
    expected = call(padding, module, *arguments)
    with rfdetr.patch_rfdetr():
        other = (deformable_detr if ours else theirs).MSDeformAttn(WIDTH, 3, HEADS, 4)
        other.load_state_dict(module.state_dict(), strict=True)
        query, value, reference = arguments
        got = other(query, reference, value, torch.tensor(SHAPES), STARTS, padding)
    torch.testing.assert_close(got, expected, **tolerances.CLOSE_SUMS)
    module.load_state_dict(other.state_dict(), strict=True)


def test_export_mode_keeps_the_originals_graph(theirs):
    module, arguments = attention(theirs), tensors(4)
    module.export()
    expected = call(None, module, *arguments)
    with rfdetr.patch_rfdetr():
        assert torch.equal(call(None, module, *arguments), expected)


def test_originals_come_back(theirs):
    before = vars(theirs.MSDeformAttn)["forward"], theirs.ms_deform_attn_core_pytorch
    with rfdetr.patch_rfdetr():
        assert theirs.MSDeformAttn.forward is not before[0]
        assert theirs.ms_deform_attn_core_pytorch is before[1]
    assert vars(theirs.MSDeformAttn)["forward"] is before[0]
