# SPDX-License-Identifier: Apache-2.0
"""mmcv's (onedl-mmcv's) operator and mmdet's models, with their own functions and with ours."""

import copy
import importlib

import pytest
import torch

import drop_in_checks
from optional import require_integration
from vitadapter_ops.compat import functions, mmcv

SHAPES = [(5, 8), (3, 4), (2, 2)]
PIXELS, BATCH, QUERIES, WIDTH, HEADS = 56, 2, 7, 24, 3

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def theirs():
    return require_integration("mmcv.ops.multi_scale_deform_attn")


def attention(theirs, **changes):
    module = theirs.MultiScaleDeformableAttention(
        WIDTH, num_heads=HEADS, num_levels=3, dropout=0.0, **changes
    )
    return drop_in_checks.perturbed(module)


def call(padding, module, query, value, reference, position):
    if not module.batch_first:
        query, value, position = (t.transpose(0, 1) for t in (query, value, position))
    return module(
        query, value=value, query_pos=position, key_padding_mask=padding,
        reference_points=reference, spatial_shapes=torch.tensor(SHAPES),
        level_start_index=torch.tensor([0, 40, 52]),
    )  # fmt: skip


def tensors(coordinates):
    return (
        torch.randn(BATCH, QUERIES, WIDTH),
        torch.randn(BATCH, PIXELS, WIDTH),
        torch.rand(BATCH, QUERIES, 3, coordinates) * 0.8 + 0.1,
        torch.randn(BATCH, QUERIES, WIDTH),
    )


@pytest.mark.parametrize("precision", drop_in_checks.PRECISIONS)
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("batch_first", [False, True])
def test_patched_module_is_the_original(theirs, batch_first, coordinates, precision):
    padding = torch.rand(BATCH, PIXELS) < 0.3

    def original(*arguments):
        return call(padding, *arguments)

    def ours(*arguments):
        with mmcv.patch_mmcv():
            return original(*arguments)

    module = attention(theirs, batch_first=batch_first, value_proj_ratio=0.5)
    drop_in_checks.check(original, ours, module, tensors(coordinates), precision)


def test_identity_and_dropout_are_the_originals(theirs):
    module = attention(theirs)
    module.dropout.p = 0.4
    query, value, reference, position = tensors(2)

    def output(module):
        torch.manual_seed(0)
        return module(
            query.transpose(0, 1), value=value.transpose(0, 1), identity=position.transpose(0, 1),
            reference_points=reference, spatial_shapes=torch.tensor(SHAPES),
            level_start_index=torch.tensor([0, 40, 52]),
        )  # fmt: skip

    expected = output(module.train())
    with mmcv.patch_mmcv():
        torch.testing.assert_close(output(module), expected, rtol=1e-4, atol=1e-5)


def test_our_module_takes_their_state(theirs):
    module = attention(theirs)
    ours = mmcv.MultiScaleDeformableAttention(WIDTH, num_heads=HEADS, num_levels=3, dropout=0.0)
    ours.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    module.load_state_dict(ours.state_dict(), strict=True)
    arguments = tensors(2)
    torch.testing.assert_close(
        call(None, ours, *arguments), call(None, module, *arguments), rtol=1e-4, atol=1e-5
    )


def test_originals_come_back_everywhere(theirs):
    package = importlib.import_module("mmcv.ops")
    places = [
        (theirs, "MultiScaleDeformableAttnFunction"),
        (theirs, "multi_scale_deformable_attn_pytorch"),
        (theirs.MultiScaleDeformableAttention, "forward"),
    ]
    before = [vars(owner)[name] for owner, name in places]
    with mmcv.patch_mmcv():
        assert theirs.multi_scale_deformable_attn_pytorch is (
            functions.multi_scale_deformable_attn_pytorch
        )
        assert all(vars(o)[n] is not old for (o, n), old in zip(places, before, strict=True))
        assert package.MultiScaleDeformableAttention is theirs.MultiScaleDeformableAttention
    assert all(vars(o)[n] is old for (o, n), old in zip(places, before, strict=True))


def test_mmdet_encoder_trains_alike(theirs):
    layers = require_integration("mmdet.models.layers.transformer.deformable_detr_layers")
    mmdet_attention = {"embed_dims": 32, "num_heads": 4, "num_levels": 3, "dropout": 0.0}
    encoder = layers.DeformableDetrTransformerEncoder(
        num_layers=2,
        layer_cfg={
            "self_attn_cfg": {**mmdet_attention, "batch_first": True},
            "ffn_cfg": {"embed_dims": 32, "feedforward_channels": 48, "ffn_drop": 0.0},
        },
    )
    query = torch.randn(BATCH, PIXELS, 32)
    arguments = {
        "query": query,
        "query_pos": torch.randn_like(query),
        "key_padding_mask": torch.rand(BATCH, PIXELS) < 0.2,
        "spatial_shapes": torch.tensor(SHAPES),
        "level_start_index": torch.tensor([0, 40, 52]),
        "valid_ratios": torch.ones(BATCH, 3, 2),
    }

    def loss(model):
        return model(**arguments).square().mean()

    drop_in_checks.check_training(encoder, loss, mmcv.patch_mmcv)
