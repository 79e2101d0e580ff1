# SPDX-License-Identifier: Apache-2.0
"""transformers' models with their own attention and with ours."""

import functools
import importlib

import pytest
import torch

import drop_in_checks
from optional import require_integration
from vitadapter_ops.compat import functions
from vitadapter_ops.compat.kernels import MultiScaleDeformableAttention, kernel_mapping
from vitadapter_ops.compat.transformers import MODELS, patch_transformers
from vitadapter_ops.testing import tolerances
from vitadapter_ops.testing.tolerances import DROP_IN_ULPS, assert_as_accurate_as_eager

SHAPES = [(5, 8), (3, 4), (2, 2)]
TENSOR = torch.tensor(SHAPES)
STARTS = torch.tensor([0, 40, 52])
PIXELS, BATCH, QUERIES, WIDTH, HEADS, POINTS = 56, 2, 7, 24, 3, 4

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations


@pytest.fixture(autouse=True, scope="module")
def transformers():
    return require_integration("transformers")


# DETA left transformers before the releases with which our torch works.
INSTALLED = [name for name in MODELS if name != "deta"]
PER_LEVEL = ("d_fine", "deimv2", "rt_detr_v2")
NO_PROJECTIONS = ("d_fine", "deimv2")
PADDING_IS_TRUE = ("mask2former", "oneformer")


@functools.cache
def modeling(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def attention_class(name):
    (found,) = (
        each
        for key, each in vars(modeling(name)).items()
        if key.endswith("MultiscaleDeformableAttention") and isinstance(each, type)
    )
    return found


class Settings:
    """What the attention modules read of a configuration."""

    d_model = WIDTH
    decoder_attention_heads = HEADS
    num_feature_levels = decoder_n_levels = 3
    disable_custom_kernels = False
    decoder_offset_scale = 0.5
    decoder_method = "default"

    def __init__(self, points, method="default"):
        self.decoder_n_points = points
        self.decoder_method = method


def attention(name, points=POINTS, method="default"):
    made = attention_class(name)
    if name in PADDING_IS_TRUE:
        module = made(WIDTH, HEADS, 3, points)
    elif name in PER_LEVEL:
        module = made(Settings(points, method))
    else:
        module = made(Settings(points), HEADS, points)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def call(name, padding, module, query, value, reference, position=None):
    arguments = {
        "hidden_states": query,
        "encoder_hidden_states": value,
        "reference_points": reference,
        "spatial_shapes": TENSOR,
        "spatial_shapes_list": SHAPES,
        "level_start_index": STARTS,
        "position_embeddings": position,
        "attention_mask": padding if name in PADDING_IS_TRUE or padding is None else ~padding,
    }
    if name == "mask2former":
        del arguments["spatial_shapes"]
    if name in NO_PROJECTIONS:
        del arguments["level_start_index"], arguments["position_embeddings"]
        if padding is not None:  # a mask of [B, S] does not fit their values
            arguments["attention_mask"] = arguments["attention_mask"].unsqueeze(-1)
    return module(**arguments)


def tensors(name, coordinates, levels=None):
    # RT-DETRv2 and D-FINE hand one box to all levels.
    levels = levels or (1 if name in PER_LEVEL else 3)
    made = [
        torch.randn(BATCH, QUERIES, WIDTH),
        torch.randn(BATCH, PIXELS, WIDTH),
        torch.rand(BATCH, QUERIES, levels, coordinates) * 0.8 + 0.1,
    ]
    if name not in NO_PROJECTIONS:
        made.append(torch.randn(BATCH, QUERIES, WIDTH))
    return made


def padding():
    return torch.rand(BATCH, PIXELS) < 0.3


def both(name, padding=None):
    original = functools.partial(call, name, padding)
    return original, patched(name, original)


def patched(name, function):
    return drop_in_checks.under(functools.partial(patch_transformers, name), function)


CASES = [
    (name, coordinates)
    for name in INSTALLED
    for coordinates in ((4,) if name in PER_LEVEL else (2, 4))
]


@pytest.mark.parametrize("precision", drop_in_checks.PRECISIONS)
@pytest.mark.parametrize(("name", "coordinates"), CASES)
def test_modules_return_the_same_output_and_weights(name, coordinates, precision):
    original, ours = both(name, padding())
    drop_in_checks.check(original, ours, attention(name), tensors(name, coordinates), precision)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("name", INSTALLED)
def test_modules_with_and_without_a_mask_and_compiled(name, masked):
    mask = padding() if masked else None
    original, ours = both(name, mask)
    compiled_ours = patched(name, drop_in_checks.in_one_graph(functools.partial(call, name, mask)))
    module, given = attention(name), tensors(name, 4)
    drop_in_checks.check(original, ours, module, given)
    drop_in_checks.check(original, compiled_ours, module, given)


def published(name, points, padding, module, query, value, reference, position=None):
    """What a module of PER_LEVEL means to compute, also where its own code fails."""
    query = query if position is None else query + position
    logits = drop_in_checks.linear(module, "attention_weights", query)
    output = drop_in_checks.published_module(
        module, query, value, reference, SHAPES, HEADS, points, padding,
        method=getattr(module, "method", getattr(module, "decoder_method", None)),
    )  # fmt: skip
    return output, logits.view(BATCH, QUERIES, HEADS, -1).softmax(-1)


@pytest.mark.parametrize("precision", drop_in_checks.PRECISIONS)
@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("name", PER_LEVEL)
def test_reference_points_of_modules_that_take_boxes_only(name, levels, method, precision):
    points = POINTS if name == "rt_detr_v2" else [3, 6, 2]
    module, given = attention(name, points, method), tensors(name, 2, levels)
    mask = padding()
    original, ours = both(name, mask)
    with pytest.raises((RuntimeError, ValueError)):  # six dimensions, where five are expected
        original(module, *given)
    each = [POINTS] * 3 if name == "rt_detr_v2" else points
    intended = functools.partial(published, name, each, mask)
    drop_in_checks.check(intended, ours, module, given, precision)


@pytest.mark.parametrize("name", PER_LEVEL)
def test_a_box_for_each_level(name):
    # The originals take it where each level has one point; two coordinates not even there.
    original, ours = both(name, padding())
    module = attention(name, points=1)
    drop_in_checks.check(original, ours, module, tensors(name, 4, levels=3))
    with pytest.raises((RuntimeError, ValueError)):
        original(module, *tensors(name, 2, levels=3))


@pytest.mark.parametrize("name", NO_PROJECTIONS)
def test_a_mask_as_the_other_models_pass_it(name):
    mask, module = padding(), attention(name)
    query, value, reference = tensors(name, 4)

    def forward():
        return module(
            query, attention_mask=~mask, reference_points=reference, encoder_hidden_states=value,
            spatial_shapes=TENSOR, spatial_shapes_list=SHAPES,
        )  # fmt: skip

    with pytest.raises(RuntimeError):
        forward()
    with patch_transformers(name):
        for mine, theirs in zip(
            forward(), call(name, mask, module, query, value, reference), strict=True
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("name", NO_PROJECTIONS)
def test_levels_with_their_own_points(name, precision):
    original, ours = both(name)
    # In fp64 powers of two: the originals keep 1 / points in fp32.
    module = attention(name, points=[4, 8, 2] if precision == "fp64" else [3, 6, 2])
    drop_in_checks.check(original, ours, module, tensors(name, 4), precision)


@pytest.mark.parametrize("name", PER_LEVEL)
def test_discrete_sampling(name):
    original, ours = both(name, padding())
    module = attention(name, method="discrete")
    # Offsets get no gradient rather than one of zero, which optimizers would act on.
    drop_in_checks.check(original, ours, module, tensors(name, 4))


def without(what, given):
    """Tensors of no images, or of no queries."""
    if what == "images":
        return [each[:0] for each in given]
    query, value, reference, *position = given
    return [query[:, :0], value, reference[:, :0], *(each[:, :0] for each in position)]


@pytest.mark.parametrize("what", ["images", "queries"])
@pytest.mark.parametrize("name", INSTALLED)
def test_modules_take_no_images_and_no_queries(name, what):
    mask = padding()[: 0 if what == "images" else BATCH]
    original, ours = both(name, mask)
    module = attention(name)
    given = [each.requires_grad_() for each in without(what, tensors(name, 4))]

    def results(function):
        output, weights = function(module, *given)
        return output, weights, *torch.autograd.grad(output.sum() + weights.sum(), given)

    for mine, theirs in zip(results(ours), results(original), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", INSTALLED)
def test_sixteen_bit_modules_stay_sixteen_bit(name):
    original, ours = both(name)
    module, given = attention(name).bfloat16(), [t.bfloat16() for t in tensors(name, 4)]
    with torch.no_grad():
        got, expected = ours(module, *given), original(module, *given)
        exact = original(module.double(), *(t.double() for t in given))
    for mine, theirs, true in zip(got, expected, exact, strict=True):
        assert mine.dtype == theirs.dtype == torch.bfloat16
        assert (mine - true).abs().max() <= (theirs - true).abs().max() * 1.5 + 0.01


# --- gradients of the weights that modules return


def gradients_at_the_weights(module, given, name):
    """By retain_grad, and by autograd.grad with the graph cut off behind the weights."""
    given = [each.detach().requires_grad_() for each in given]
    output, weights = call(name, padding(), module, *given)
    weights.retain_grad()
    (alone,) = torch.autograd.grad(output.square().sum(), weights, retain_graph=True)
    output.square().sum().backward()
    return alone, weights.grad


METHODS = [(name, "default") for name in INSTALLED] + [(name, "discrete") for name in PER_LEVEL]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "method"), METHODS)
def test_gradients_reach_the_returned_weights(name, method, dtype):
    module, given = attention(name, method=method), tensors(name, 4)

    def gradients(dtype):
        torch.manual_seed(1)  # of the mask
        return gradients_at_the_weights(module.to(dtype), [each.to(dtype) for each in given], name)

    exact, eager = gradients(torch.float64), gradients(dtype)
    with patch_transformers(name):
        got = gradients(dtype)
    for mine, theirs, true in zip(got, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        assert_as_accurate_as_eager(name, mine, theirs, true, DROP_IN_ULPS)


@pytest.mark.parametrize("name", INSTALLED)
def test_weights_are_the_same_with_and_without_gradients(name):
    _, ours = both(name, padding())
    module, given = attention(name), tensors(name, 4)
    recorded = ours(module, *given)
    with torch.no_grad():
        fused = ours(module, *given)
    for mine, other in zip(recorded, fused, strict=True):
        torch.testing.assert_close(mine, other, **tolerances.CLOSE_SUMS)


def test_originals_come_back():
    places = []
    for name in INSTALLED:
        module = modeling(name)
        places.append((attention_class(name), "forward"))
        for owner, attribute in (
            (getattr(module, "MultiScaleDeformableAttention", None), "forward"),
            (module, "multi_scale_deformable_attention"),
            (module, "multi_scale_deformable_attention_v2"),
        ):
            if owner is not None and attribute in vars(owner):
                places.append((owner, attribute))
    before = [vars(owner)[attribute] for owner, attribute in places]
    with patch_transformers() as patch:
        during = [vars(owner)[attribute] for owner, attribute in places]
        assert len(patch.replaced) == len(places)
    after = [vars(owner)[attribute] for owner, attribute in places]
    assert all(now is not then for now, then in zip(during, before, strict=True))
    assert all(now is then for now, then in zip(after, before, strict=True))


def test_names_are_checked():
    with pytest.raises(ValueError, match=r"models: expected names from d_fine, .*; got 'detr'"):
        patch_transformers("detr")
    with pytest.raises(ImportError, match="has no model 'deta'"):
        patch_transformers("deta")


@pytest.mark.parametrize("name", INSTALLED)
def test_two_steps_of_a_module_have_the_losses_of_the_original(name):
    original, _ = both(name, padding())
    module, given = attention(name), tensors(name, 4)

    def loss(model):
        return original(model, *given)[0].square().mean()

    drop_in_checks.check_training(module, loss, functools.partial(patch_transformers, name))


def test_arguments_may_be_positional():
    module, (query, value, reference, position) = attention("oneformer"), tensors("oneformer", 2)
    arguments = (query, padding(), value, None, position, reference, TENSOR, STARTS)
    arguments += (False, SHAPES)
    expected = module(*arguments)
    with patch_transformers("oneformer"):
        for mine, theirs in zip(module(*arguments), expected, strict=True):
            torch.testing.assert_close(mine, theirs, **tolerances.CLOSE_SUMS)


def test_a_call_that_the_original_refuses_is_refused():
    module, (query, *_) = attention("mask2former"), tensors("mask2former", 2)
    with patch_transformers("mask2former"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'spatial_shapes'"):
            module(query, spatial_shapes=TENSOR)
        with pytest.raises(TypeError, match=r"encoder_hidden_states: expected a torch\.Tensor"):
            module(query)
        with pytest.raises(TypeError, match="multiple values for argument 'hidden_states'"):
            module(query, hidden_states=query)


def test_a_forward_with_other_arguments_keeps_its_own(monkeypatch):
    def forward(self, hidden_states, something_else):
        raise NotImplementedError

    module = modeling("mask2former")
    monkeypatch.setattr(attention_class("mask2former"), "forward", forward)
    with patch_transformers("mask2former"):
        assert attention_class("mask2former").forward is forward
        assert module.multi_scale_deformable_attention is functions.multi_scale_deformable_attention


# --- whole models


def backbone(stages=("stage2", "stage3", "stage4")):
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=list(stages),
    )


DETR_SIZE = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_labels": 5,
    "attn_implementation": "eager",
}


def labels():
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.4], [0.6, 0.3, 0.2, 0.2]])
    return [{"class_labels": torch.tensor([1, 3]), "boxes": boxes} for _ in range(2)]


def images(height=96, width=128):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def padded():
    mask = torch.ones(2, 96, 128, dtype=torch.long)
    mask[1, 70:] = 0
    mask[1, :, 100:] = 0
    return mask


def deformable_detr():
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    config = DeformableDetrConfig(
        backbone_config=backbone(), num_queries=10, two_stage=True, with_box_refine=True,
        two_stage_num_proposals=10,
        num_feature_levels=4, **DETR_SIZE,
    )  # fmt: skip
    model = DeformableDetrForObjectDetection(config)
    return model, {"pixel_values": images(), "pixel_mask": padded(), "labels": labels()}


def rt_detr(prefix, **changes):
    """RT-DETR and those that are built like it."""
    import transformers

    sizes = {
        "backbone_config": backbone(),
        "d_model": 32,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [12, 16, 20],
        "feat_strides": [8, 16, 32],
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 48,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "num_queries": 10,
        "num_labels": 5,
        "num_denoising": 4,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{prefix}Config")(**sizes | changes)
    model = getattr(transformers, f"{prefix}ForObjectDetection")(config)
    inputs = {"pixel_values": images()}
    # The models of document layouts refuse labels.
    return model, inputs if prefix.startswith("PPDocLayout") else {**inputs, "labels": labels()}


def pp_doclayout_v2():
    reading_order = {
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
        "num_hidden_layers": 1, "coordinate_size": 6, "shape_size": 4, "num_classes": 5,
        "relation_bias_embed_dim": 4, "global_pointer_head_size": 8,
    }  # fmt: skip
    return rt_detr(
        "PPDocLayoutV2",
        reading_order_config=reading_order,
        class_thresholds=[0.0] * 5,
        class_order=list(range(5)),
    )


def pp_doclayout_v3():
    return rt_detr(
        "PPDocLayoutV3",
        backbone_config=backbone(("stage1", "stage2", "stage3", "stage4")),
        mask_feature_channels=[8, 8],
        x4_feat_dim=8,
        num_prototypes=4,
        global_pointer_head_size=8,
    )


def lw_detr(prefix, backbone, **changes):
    """LW-DETR and RF-DETR: a plain ViT with windows, and boxes in two stages."""
    import transformers

    vit = getattr(transformers, f"{prefix}{backbone}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8,
        num_windows=4 if prefix == "LwDetr" else 2, out_indices=[1, 2],
    )  # fmt: skip
    config = getattr(transformers, f"{prefix}Config")(
        backbone_config=vit, d_model=32, decoder_ffn_dim=48, decoder_layers=2,
        decoder_self_attention_heads=4, decoder_cross_attention_heads=4, num_queries=10,
        group_detr=2, num_labels=5, c2f_num_blocks=1, attn_implementation="eager", **changes,
    )  # fmt: skip
    model = getattr(transformers, f"{prefix}ForObjectDetection")(config)
    return model, {"pixel_values": images(64, 64), "labels": labels()}


def mask2former():
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = Mask2FormerConfig(
        backbone_config=backbone(("stage1", "stage2", "stage3", "stage4")),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48,
        dim_feedforward=48, encoder_layers=2, decoder_layers=2, num_attention_heads=4,
        num_queries=6, num_labels=5, train_num_points=64,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 2, 96, 128, generator=generator) > 0.5).float()
    return Mask2FormerForUniversalSegmentation(config), {
        "pixel_values": images(),
        "mask_labels": list(masks),
        "class_labels": [torch.tensor([0, 2])] * 2,
    }


def grounding_dino(prefix="GroundingDino"):
    import transformers
    from transformers import BertConfig

    text = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        vocab_size=1200,
    )  # fmt: skip
    config = getattr(transformers, f"{prefix}Config")(
        backbone_config=backbone(), text_config=text, num_queries=10, max_text_len=16,
        **{key: value for key, value in DETR_SIZE.items() if key != "num_labels"},
    )  # fmt: skip
    model = getattr(transformers, f"{prefix}ForObjectDetection")(config)
    words = torch.tensor([[101, 1010, 1011, 1012, 102]] * 2)  # two phrases would need a separator
    found = [{**each, "class_labels": torch.tensor([0, 0])} for each in labels()]
    return model, {
        "pixel_values": images(),
        "pixel_mask": padded(),
        "input_ids": words,
        "token_type_ids": torch.zeros_like(words),
        "attention_mask": torch.ones_like(words),
        "labels": found,
    }


def oneformer():
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation

    config = OneFormerConfig(
        backbone_config=backbone(("stage1", "stage2", "stage3", "stage4")),
        # As wide as the decoder: a projection between them is in no state_dict, and random anew.
        conv_dim=64, mask_dim=64, hidden_dim=64, encoder_feedforward_dim=48, dim_feedforward=48,
        encoder_layers=2, decoder_layers=3, num_attention_heads=4, num_queries=6, num_labels=5,
        train_num_points=64, is_training=True, task_seq_len=8, text_encoder_width=64,
        text_encoder_context_length=8, text_encoder_num_layers=1, text_encoder_vocab_size=100,
        text_encoder_n_ctx=2,
        dropout=0.0,  # is_training keeps the pixel decoder's on, also in eval()
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 2, 96, 128, generator=generator) > 0.5).float()
    return OneFormerForUniversalSegmentation(config), {
        "pixel_values": images(),
        "task_inputs": torch.randint(0, 100, (2, 8), generator=generator),
        # A text for every query that is not one of the learnt two.
        "text_inputs": torch.randint(0, 100, (2, 4, 8), generator=generator),
        "mask_labels": list(masks),
        "class_labels": [torch.tensor([0, 2])] * 2,
    }


def omdet_turbo():
    from transformers import CLIPTextConfig, OmDetTurboConfig, OmDetTurboForObjectDetection

    text = CLIPTextConfig(
        vocab_size=100, hidden_size=24, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=8, bos_token_id=0, eos_token_id=99,
    )  # fmt: skip
    config = OmDetTurboConfig(
        backbone_config=backbone(), text_config=text, apply_layernorm_after_vision_backbone=False,
        text_projection_in_dim=24, text_projection_out_dim=24, task_encoder_hidden_dim=48,
        class_embed_dim=24, encoder_hidden_dim=32, encoder_in_channels=[12, 16, 20],
        vision_features_channels=[32, 32, 32], encoder_attention_heads=4,
        encoder_dim_feedforward=48, decoder_hidden_dim=32, decoder_num_heads=4,
        decoder_num_layers=2, decoder_dim_feedforward=48, num_queries=10,
    )  # fmt: skip
    model = OmDetTurboForObjectDetection(config)
    # It keeps what it made of a text, and with it the graph, from one step to the next.
    model.language_backbone.requires_grad_(False)
    words = torch.tensor([[0, 5, 99], [0, 6, 99], [0, 7, 99]])
    tasks = torch.tensor([[0, 8, 9, 99], [0, 10, 11, 99]])
    return model, {
        "pixel_values": images(),
        "classes_input_ids": words,
        "classes_attention_mask": torch.ones_like(words),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 1]),
    }


D_FINE = {"decoder_n_points": [3, 6, 3], "hidden_expansion": 0.5, "eval_idx": -1}
WHOLE = {
    "deformable_detr": deformable_detr,
    "rt_detr": functools.partial(rt_detr, "RTDetr"),
    "rt_detr_v2": functools.partial(rt_detr, "RTDetrV2"),
    "d_fine": functools.partial(rt_detr, "DFine", **D_FINE),
    "deimv2": functools.partial(rt_detr, "Deimv2", **D_FINE),
    "pp_doclayout_v2": pp_doclayout_v2,
    "pp_doclayout_v3": pp_doclayout_v3,
    "pp_doclayout_v4": functools.partial(
        rt_detr, "PPDocLayoutV4", hidden_size=32, global_pointer_head_size=8
    ),
    "lw_detr": functools.partial(lw_detr, "LwDetr", "ViT", projector_scale_factors=[2.0, 0.5]),
    "rf_detr": functools.partial(lw_detr, "RfDetr", "Dinov2"),
    "mask2former": mask2former,
    "grounding_dino": grounding_dino,
    "mm_grounding_dino": functools.partial(grounding_dino, "MMGroundingDino"),
    "omdet_turbo": omdet_turbo,
    "oneformer": oneformer,
}
# What the models without a loss return.
PREDICTIONS = ("logits", "pred_boxes", "decoder_class_logits", "decoder_coord_logits")


@pytest.fixture(params=WHOLE)
def whole(request):
    require_integration("scipy")  # the matcher of the losses
    torch.manual_seed(0)
    model, inputs = WHOLE[request.param]()
    return request.param, drop_in_checks.perturbed(model, std=0.1), inputs


def test_two_steps_of_training_have_the_losses_of_the_original(whole):
    name, model, inputs = whole

    def loss(model):
        output = model(**inputs)
        if output.get("loss") is None:  # some cannot train
            return sum(output[each].square().mean() for each in output if each in PREDICTIONS)
        return output.loss

    drop_in_checks.check_training(model, loss, functools.partial(patch_transformers, name))


def test_state_dict_and_outputs_are_the_originals(whole):
    name, model, inputs = whole
    inputs = {key: value for key, value in inputs.items() if "labels" not in key}
    model.eval()
    with torch.no_grad():
        expected = model(**inputs)
        keys = list(model.state_dict())
        with patch_transformers(name):
            other, _ = WHOLE[name]()
            assert list(other.state_dict()) == keys
            other.load_state_dict(model.state_dict())
            got = other.eval()(**inputs)
    compared = 0
    for key, value in expected.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            finite = value.isfinite()  # padded proposals are infinite
            assert torch.equal(finite, got[key].isfinite())
            torch.testing.assert_close(got[key][finite], value[finite], **tolerances.CLOSE_MODELS)
            compared += 1
    assert compared >= 2


def test_returned_attentions_are_the_originals(transformers):
    model, inputs = deformable_detr()
    del inputs["labels"]
    model.eval()
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True)
        with patch_transformers("deformable_detr"):
            got = model(**inputs, output_attentions=True)
    for key in ("encoder_attentions", "cross_attentions"):
        assert len(expected[key]) == 2
        for mine, theirs in zip(got[key], expected[key], strict=True):
            torch.testing.assert_close(mine, theirs, **tolerances.CLOSE_SMALL)


@pytest.mark.parametrize("build", [deformable_detr, mask2former], ids=lambda f: f.__name__)
def test_gradients_reach_the_attentions_of_a_model(transformers, build):
    """What transformers' own common test of retained gradients asks."""
    model, inputs = build()
    inputs = {key: value for key, value in inputs.items() if "labels" not in key}
    kept = []

    def keep(module, arguments, output):
        output[1].retain_grad()
        kept.append(output[1])

    found = attention_class(build.__name__)
    for module in model.modules():
        if isinstance(module, found):
            module.register_forward_hook(keep)  # as transformers collects attentions

    def gradients():
        kept.clear()
        outputs = model.eval()(**inputs)
        outputs[0].square().sum().backward()
        return [each.grad for each in kept]

    expected = gradients()
    assert len(expected) >= 2
    assert not any(each is None for each in expected)
    with patch_transformers(build.__name__):
        got = gradients()
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerances.close_to_largest(theirs))


def test_gradients_reach_the_attentions_that_a_model_returns(transformers):
    """The same by the names that transformers gives them."""
    model, inputs = deformable_detr()
    del inputs["labels"]
    model.eval()

    def gradients():
        outputs = model(**inputs, output_attentions=True)
        kept = outputs.encoder_attentions + outputs.cross_attentions
        for each in kept:
            each.retain_grad()
        outputs.logits.square().sum().backward()
        return [each.grad for each in kept]

    expected = gradients()
    with patch_transformers("deformable_detr"):
        got = gradients()
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerances.close_to_largest(theirs))


# --- the kernels package


def test_kernels_package_takes_our_layer(monkeypatch):
    kernels = require_integration("kernels")
    original = modeling("deformable_detr").MultiScaleDeformableAttention
    # What transformers' own decorator sets, where it accepts the installed release of kernels.
    name = "MultiScaleDeformableAttention"
    monkeypatch.setattr(original, "kernel_layer_name", name, raising=False)
    model, inputs = deformable_detr()
    drop_in_checks.perturbed(model, std=0.1)
    expected = drop_in_checks.sgd(model, lambda model: model(**inputs).loss)
    with kernels.use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    layer = model.model.encoder.layers[0].self_attn.attn
    assert layer.forward.__func__ is MultiScaleDeformableAttention.forward
    got = drop_in_checks.sgd(model, lambda model: model(**inputs).loss)
    drop_in_checks.assert_trained_alike(got, expected)
