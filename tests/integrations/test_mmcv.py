# SPDX-License-Identifier: Apache-2.0
"""mmcv's (onedl-mmcv's) operator and mmdet's models, with their own functions and with ours."""

import copy
import functools
import importlib

import pytest
import torch

import drop_in_checks
from optional import require_integration
from vitadapter_ops.compat import functions, mmcv
from vitadapter_ops.testing import tolerances

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
    original = functools.partial(call, padding)
    ours = drop_in_checks.under(mmcv.patch_mmcv, original)
    module = attention(theirs, batch_first=batch_first, value_proj_ratio=0.5)
    drop_in_checks.check(original, ours, module, tensors(coordinates), precision)


@pytest.mark.parametrize("batch_first", [False, True])
def test_patched_module_compiles(theirs, batch_first):
    padding = torch.rand(BATCH, PIXELS) < 0.3
    original = functools.partial(call, padding)
    ours = drop_in_checks.under(mmcv.patch_mmcv, drop_in_checks.in_one_graph(original))
    drop_in_checks.check(original, ours, attention(theirs, batch_first=batch_first), tensors(4))


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
        torch.testing.assert_close(output(module), expected, **tolerances.CLOSE_SUMS)


@pytest.mark.parametrize(
    "make", [mmcv.MultiScaleDeformableAttention, None], ids=["ours", "patched"]
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_state_travels_to_our_module_and_back(theirs, batch_first, make):
    module = attention(theirs, batch_first=batch_first)
    arguments = tensors(2)
    padding = torch.rand(BATCH, PIXELS) < 0.3
    expected = call(padding, module, *arguments)
    with mmcv.patch_mmcv():
        other = (make or theirs.MultiScaleDeformableAttention)(
            WIDTH, num_heads=HEADS, num_levels=3, dropout=0.0, batch_first=batch_first
        )
        other.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
        got = call(padding, other, *arguments)
    torch.testing.assert_close(got, expected, **tolerances.CLOSE_SUMS)
    module.load_state_dict(other.state_dict(), strict=True)
    assert list(module.state_dict()) == list(other.state_dict())


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


# --- whole models

SIZE = {"embed_dims": 32, "num_heads": 4, "dropout": 0.0, "batch_first": True}
FEED_FORWARD = {"embed_dims": 32, "feedforward_channels": 48, "ffn_drop": 0.0}
NORM = {"type": "GN", "num_groups": 4}


def backbone(stages):
    return {
        "type": "mmdet.ResNet", "depth": 18, "base_channels": 4, "num_stages": 4,
        "out_indices": stages, "norm_cfg": {"type": "BN"}, "style": "pytorch",
    }  # fmt: skip


def encoder(levels):
    attention = {**SIZE, "num_levels": levels}
    return {
        "num_layers": 2,
        "layer_cfg": {"self_attn_cfg": attention, "ffn_cfg": FEED_FORWARD},
    }


def detector(kind, **changes):
    """Deformable DETR and DINO, which refine boxes from layer to layer."""
    layer = {
        "self_attn_cfg": SIZE,
        "cross_attn_cfg": {**SIZE, "num_levels": 4},
        "ffn_cfg": FEED_FORWARD,
    }
    costs = [
        {"type": "FocalLossCost", "weight": 2.0},
        {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
        {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
    ]
    return {
        "type": kind,
        "num_queries": 10,
        "with_box_refine": True,
        "as_two_stage": kind == "DINO",  # Deformable DETR's needs 256 channels
        "backbone": backbone((1, 2, 3)),
        "neck": {
            "type": "ChannelMapper", "in_channels": [8, 16, 32], "kernel_size": 1,
            "out_channels": 32, "act_cfg": None, "norm_cfg": NORM, "num_outs": 4,
        },
        "encoder": encoder(levels=4),
        "decoder": {
            "num_layers": 2, "return_intermediate": True, "layer_cfg": layer,
            "post_norm_cfg": None,
        },
        "positional_encoding": {"num_feats": 16, "normalize": True},
        "bbox_head": {
            "type": f"{kind}Head",
            "embed_dims": 32,
            "num_classes": 5,
            "loss_cls": {"type": "FocalLoss", "use_sigmoid": True},
        },
        "train_cfg": {"assigner": {"type": "HungarianAssigner", "match_costs": costs}},
        "test_cfg": {"max_per_img": 10},
        **changes,
    }  # fmt: skip


def dino():
    groups = {"dynamic": True, "num_groups": None, "num_dn_queries": 4}
    noise = {"label_noise_scale": 0.5, "box_noise_scale": 1.0, "group_cfg": groups}
    return detector("DINO", dn_cfg=noise)


def segmenter():
    """Mask2Former of mmseg, with the pixel decoder of mmdet."""
    attention = {"embed_dims": 32, "num_heads": 4, "batch_first": True}
    feed_forward = {**FEED_FORWARD, "num_fcs": 2, "act_cfg": {"type": "ReLU", "inplace": True}}
    costs = [
        {"type": "mmdet.ClassificationCost"},
        {"type": "mmdet.CrossEntropyLossCost", "use_sigmoid": True},
        {"type": "mmdet.DiceCost", "pred_act": True},
    ]
    return {
        "type": "mmseg.EncoderDecoder",
        "backbone": backbone((0, 1, 2, 3)),
        "decode_head": {
            "type": "mmseg.Mask2FormerHead",
            "in_channels": [4, 8, 16, 32],
            "strides": [4, 8, 16, 32],
            "feat_channels": 32,
            "out_channels": 32,
            "num_classes": 5,
            "num_queries": 6,
            "num_transformer_feat_level": 3,
            "pixel_decoder": {
                "type": "mmdet.MSDeformAttnPixelDecoder",
                "num_outs": 3,
                "norm_cfg": NORM,
                "encoder": encoder(levels=3),
                "positional_encoding": {"num_feats": 16, "normalize": True},
            },
            "positional_encoding": {"num_feats": 16, "normalize": True},
            "transformer_decoder": {
                "return_intermediate": True,
                "num_layers": 2,
                "layer_cfg": {
                    "self_attn_cfg": attention,
                    "cross_attn_cfg": attention,
                    "ffn_cfg": feed_forward,
                },
            },
            "loss_cls": {"type": "mmdet.CrossEntropyLoss", "class_weight": [1.0] * 5 + [0.1]},
            "loss_mask": {"type": "mmdet.CrossEntropyLoss", "use_sigmoid": True},
            "loss_dice": {"type": "mmdet.DiceLoss", "naive_dice": True, "eps": 1.0},
            "train_cfg": {
                "num_points": 64,
                "oversample_ratio": 3.0,
                "importance_sample_ratio": 0.75,
                "assigner": {"type": "mmdet.HungarianAssigner", "match_costs": costs},
                "sampler": {"type": "mmdet.MaskPseudoSampler"},
            },
        },
        "test_cfg": {"mode": "whole"},
    }


def detections():
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    boxes = torch.tensor([[20.0, 16.0, 70.0, 60.0], [40.0, 30.0, 90.0, 64.0]])
    samples = []
    for height, width in ((96, 128), (70, 100)):  # the second is padded
        sample = DetDataSample(
            metainfo={"img_shape": (height, width), "batch_input_shape": (96, 128)}
        )
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([1, 3]))
        samples.append(sample)
    return samples


def segmentations():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        shape = (96, 128)
        sample = SegDataSample(
            metainfo={"img_shape": shape, "pad_shape": shape, "ori_shape": shape}
        )
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 5, (1, 96, 128)))
        samples.append(sample)
    return samples


WHOLE = {
    "deformable-detr": (functools.partial(detector, "DeformableDETR"), detections),
    "dino": (dino, detections),
    "mask2former": (segmenter, segmentations),
}


@pytest.fixture(params=WHOLE)
def whole(request, theirs):
    """What makes the model, its images and their labels."""
    require_integration("mmdet")
    scope = "mmdet"
    if request.param == "mask2former":
        require_integration("mmseg")
        scope = "mmseg"
    importlib.import_module(f"{scope}.models")
    from mmengine import ConfigDict, registry

    config, labels = WHOLE[request.param]
    with registry.DefaultScope.overwrite_default_scope(scope):
        yield lambda: registry.MODELS.build(ConfigDict(config())), images(), labels()


def images():
    return torch.randn(2, 3, 96, 128)


def initialised(make):
    model = make()
    model.init_weights()
    return drop_in_checks.perturbed(model, std=0.1)


def test_two_steps_of_training_a_model_are_the_originals(whole):
    make, images, labels = whole

    def loss(model):
        total, _ = model.parse_losses(model.loss(images, copy.deepcopy(labels)))
        return total

    drop_in_checks.check_training(initialised(make), loss, mmcv.patch_mmcv)


def test_state_dict_and_outputs_of_a_model_are_the_originals(whole):
    make, images, labels = whole
    model = initialised(make)

    def outputs(model):
        if hasattr(model, "decode_head"):  # mmseg's own forward forgets the labels
            return flat(model.decode_head(model.extract_feat(images), copy.deepcopy(labels)))
        return flat(model(images, copy.deepcopy(labels), mode="tensor"))

    with torch.no_grad():
        expected = outputs(model.eval())
        with mmcv.patch_mmcv():
            other = make()
            assert list(other.state_dict()) == list(model.state_dict())
            other.load_state_dict(model.state_dict())
            got = outputs(other.eval())
    assert len(expected) >= 2
    for mine, theirs in zip(got, expected, strict=True):
        finite = theirs.isfinite()  # padded proposals are infinite
        assert torch.equal(finite, mine.isfinite())
        torch.testing.assert_close(mine[finite], theirs[finite], **tolerances.CLOSE_MODELS)


def flat(outputs):
    if isinstance(outputs, (list, tuple)):
        return [tensor for each in outputs for tensor in flat(each)]
    return [outputs]
