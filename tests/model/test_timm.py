# SPDX-License-Identifier: Apache-2.0
"""Adapters around timm's vision transformers and around a user's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import vitadapter
from dynamic_graphs import one_dynamic_graph_serves_all
from optional import require_integration
from vitadapter import ViTAdapter
from vitadapter.adapter import ADAPTER_PARTS

# Everything that differs between plain ViTs: patches, prefix tokens, norms, positions.
MODELS = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},  # two prefix tokens
    "deit3_small_patch16_224": {"depth": 4},  # positions without class token, layer scale
    "vit_tiny_patch16_224.augreg_in21k": {},
    "vit_base_patch16_224.mae": {"depth": 4, "embed_dim": 96, "num_heads": 3},
    "vit_base_patch16_clip_224.openai": {"depth": 4, "embed_dim": 96, "num_heads": 3},  # pre-norm
    "vit_base_patch16_siglip_224": {"depth": 4, "embed_dim": 96, "num_heads": 3},  # no class token
    "beit_base_patch16_224": {"depth": 4, "embed_dim": 96, "num_heads": 3},
    "beitv2_base_patch16_224": {"depth": 4, "embed_dim": 96, "num_heads": 3},
    "vit_small_patch14_dinov2": {"depth": 4},
    "vit_small_patch14_reg4_dinov2": {"depth": 4},  # four registers
    "vit_small_patch16_dinov3": {"depth": 4},  # rotary positions, four registers
    "eva02_tiny_patch14_224": {"depth": 4},  # rotary and learned positions, SwiGLU
    "vit_tiny_patch16_224": {"depth": 4, "patch_size": 8},
    "vit_base_patch16_rope_mixed_224": {"depth": 4, "embed_dim": 96, "num_heads": 3},
    "vit_relpos_base_patch16_cls_224": {"depth": 4, "embed_dim": 96, "num_heads": 3},
    "vit_srelpos_small_patch16_224": {"depth": 4},  # one bias for all blocks, no class token
}
# Of one image size.
RELATIVE = ("beit", "vit_relpos", "vit_srelpos")


@pytest.fixture
def timm():
    return require_integration("timm")


def _build(name: str, task: str = "segmentation", **options) -> ViTAdapter:
    options = {"conv_inplane": 8, **options}
    model = ViTAdapter.from_timm(name, task=task, model_args=MODELS[name], **options)
    # Positions and biases start at zero in many models, which would hide wrong ones.
    with torch.no_grad():
        for key, parameter in model.backbone.named_parameters():
            if parameter.dim() <= 1 or "pos" in key or "token" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _tokens_after_each_block(model: ViTAdapter, images):
    outputs = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
        for block in model.backbone.model.blocks
    ]
    with torch.no_grad():
        maps = model(images)
    for hook in hooks:
        hook.remove()
    return maps, outputs


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_bitwise_those_of_timm_while_gammas_are_zero(timm, name):
    model = _build(name)
    vit = model.backbone.model
    images = torch.randn(2, 3, 224, 224)
    maps, outputs = _tokens_after_each_block(model, images)
    with torch.no_grad():
        expected = vit.forward_intermediates(
            images,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=vit.num_prefix_tokens > 0,
        )
    assert len(outputs) == len(expected) == model.depth
    for got, want in zip(outputs, expected, strict=True):
        patches, prefix = want if isinstance(want, tuple) else (want, want[:, :0])
        assert torch.equal(got[:, model.num_prefix_tokens :], patches)
        assert torch.equal(got[:, : model.num_prefix_tokens], prefix)
    assert [tuple(m.shape) for m in maps] == [
        (2, vit.embed_dim, 224 // s, 224 // s) for s in model.strides
    ]


@pytest.mark.parametrize("name", MODELS)
def test_timms_state_dict_stays_loadable(timm, name):
    model = _build(name)
    other = timm.create_model(name, num_classes=0, **MODELS[name])
    model.backbone.model.load_state_dict(other.state_dict())
    state = {key: torch.randn_like(value) for key, value in other.state_dict().items()}
    report = vitadapter.load_checkpoint(model, {"state_dict": state})
    assert report.unexpected == ()
    own = model.backbone.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())
    own_file = model.state_dict()
    assert vitadapter.load_checkpoint(_build(name), own_file, strict=True).missing == ()


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith(RELATIVE)])
@pytest.mark.parametrize("size", [(64, 96), (70, 101)], ids=str)
def test_any_image_size_gives_maps_with_strides_4_to_32(timm, name, size):
    model = _build(name)
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *size))
    expected = [tuple(math.ceil(side / s) for side in size) for s in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == expected
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("deit3_small_patch16_224", ((64, 96), (128, 160))),
        # Of other sizes than the above: the paddings of ViT and pyramid differ.
        ("vit_small_patch14_reg4_dinov2", ((64, 96), (100, 230))),
        ("vit_small_patch16_dinov3", ((70, 101), (101, 70))),
    ],
)
def test_one_dynamic_graph_serves_image_sizes_of_a_kind(timm, name, sizes):
    model = _build(name, "detection", num_interactions=1)
    one_dynamic_graph_serves_all(model, sizes)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_that_can_learn_gets_a_gradient(timm, name):
    model = _build(name).train()
    for interaction in model.interactions:
        nn.init.ones_(interaction.injector.gamma)
    sum(m.square().mean() for m in model(torch.randn(2, 3, 224, 224))).backward()
    missing = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_the_final_norm_learns_where_it_is_used(timm):
    for norm_taps in (False, True):
        model = _build("deit_tiny_patch16_224", "detection", norm_taps=norm_taps).train()
        sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
        norm = model.backbone.model.norm
        assert norm.weight.requires_grad == norm_taps
        assert (norm.weight.grad is not None) == norm_taps


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith(RELATIVE)])
def test_model_of_one_image_size_takes_another_when_told(timm, name):
    model = _build(name, img_size=64)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64))[1].shape[2:] == (8, 8)
        with pytest.raises(ValueError, match=r"images: expected 64x64 .*img_size.*got 64x96$"):
            model(torch.randn(1, 3, 64, 96))


def test_a_model_that_timm_made_can_be_passed(timm):
    vit = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True)
    model = ViTAdapter.from_timm(vit, task="detection", conv_inplane=8)
    assert model.backbone.model is vit
    assert model.config.adapter_heads == 6


def test_a_model_that_timm_made_for_one_size_says_how_to_make_it_for_all(timm):
    vit = timm.create_model("deit_tiny_patch16_224", depth=4, img_size=64)
    model = ViTAdapter.from_timm(vit, task="detection", conv_inplane=8)
    assert len(model(torch.randn(2, 3, 64, 64))) == 4
    text = r"images: expected 64x64 .*got 64x96; .*dynamic_img_size=True"
    with pytest.raises(ValueError, match=text):
        model(torch.randn(2, 3, 64, 96))


@pytest.mark.parametrize(
    "arguments", [{"pretrained": True}, {"img_size": 64}, {"model_args": {"depth": 4}}], ids=str
)
def test_a_model_that_timm_made_is_made_with_no_further_arguments(timm, arguments):
    vit = timm.create_model("deit_tiny_patch16_224", depth=4)
    with pytest.raises(ValueError, match=rf"^{next(iter(arguments))}: expected to be left out"):
        ViTAdapter.from_timm(vit, task="detection", **arguments)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("resnet18", "ResNet"), ("swin_tiny_patch4_window7_224", "SwinTransformer")),
        *(("naflexvit_base_patch16_gap", "NaFlexVit"), ("convit_tiny", "ConVit")),
        ("samvit_base_patch16", "VisionTransformerSAM"),
    ],
)
def test_models_of_other_kinds_are_refused(timm, name, kind):
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=rf"name: expected a plain vision .*got {kind}$"),
    ):
        ViTAdapter.from_timm(name, task="detection")


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_r_s16_p8_224", "vit_base_r50_s16_224", "vit_base_mci_224", "vitamin_small_224"],
)
def test_stems_of_several_convolutions_are_refused(timm, name):
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"name: .*one convolution.*VisionTransformer.*HybridEmbed"),
    ):
        ViTAdapter.from_timm(name, task="detection")


def test_a_subclass_with_a_forward_of_its_own_is_refused(timm):
    from timm.models.vision_transformer import VisionTransformer

    class Same(VisionTransformer):
        pass

    class Prompted(VisionTransformer):
        def forward_features(self, x):
            return super().forward_features(x)

    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0, "img_size": 64}
    model = ViTAdapter.from_timm(Same(**sizes), task="detection", conv_inplane=8)
    assert len(model(torch.randn(2, 3, 64, 64))) == 4
    with pytest.raises(ValueError, match=r"name: expected a plain vision .*got Prompted$"):
        ViTAdapter.from_timm(Prompted(**sizes), task="detection")


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_patches_that_are_dropped_or_lie_over_each_other_are_refused(timm, name):
    text = r"^patch_drop_rate: expected 0, .* got 0.25"
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        ViTAdapter.from_timm(name, task="detection", model_args={"patch_drop_rate": 0.25})
    with torch.device("meta"):
        vit = timm.create_model(name)
    vit.patch_embed.proj.stride = (8, 8)
    with pytest.raises(ValueError, match=r"patches of 16x16 pixels side by side.*stride \(8, 8\)"):
        ViTAdapter.from_timm(vit, task="detection")


def test_defaults_follow_the_published_sizes(timm):
    with torch.device("meta"):
        base = ViTAdapter.from_timm("vit_base_patch16_224", task="detection")
        large = ViTAdapter.from_timm("vit_large_patch16_224", task="detection")
    assert (base.config.adapter_heads, base.config.deform_ratio) == (12, 0.5)
    assert (large.config.adapter_heads, large.config.deform_ratio) == (16, 0.5)


@pytest.mark.parametrize(
    ("width", "heads", "channels"),
    [
        *((64, 2, 32), (192, 6, 32), (256, 8, 32), (320, 10, 32), (384, 6, 64), (512, 8, 32)),
        *((768, 12, 32), (832, 13, 32), (1024, 16, 32), (1152, 18, 32), (4096, 64, 32)),
        # Not in timm: 32 channels do not come out, but a multiple of 8 or 4 near it does.
        *((96, 6, 16), (400, 5, 40), (480, 6, 40), (100, 5, 20), (37, 1, 37)),
    ],
)
def test_heads_fit_the_width(width, heads, channels):
    backbone = _Ramp(16)
    backbone.embed_dim = width
    with torch.device("meta"):
        model = ViTAdapter.around(backbone, task="detection", conv_inplane=8)
    assert model.config.adapter_heads == heads
    assert model.interactions[0].extractor.attn.value_proj.out_features == heads * channels


@pytest.mark.parametrize(
    ("depth", "lengths"),
    [
        *((4, [1] * 4), (6, [1, 2, 1, 2]), (12, [3] * 4), (18, [4, 5, 4, 5])),
        *((27, [6, 7, 7, 7]), (50, [12, 13, 12, 13]), (23, [5, 6, 6, 6])),
    ],
)
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_quarters_of_any_depth_are_nearly_equal(task, depth, lengths):
    backbone = _Ramp(16)
    backbone.depth = depth
    model = ViTAdapter.around(backbone, task=task, conv_inplane=8)
    assert [len(blocks) for blocks in model.config.ranges] == lengths
    assert [index for blocks in model.config.ranges for index in blocks] == list(range(depth))
    assert len(model(torch.randn(2, 3, 64, 64))) == 4
    options = vitadapter.dinov3_options(depth)
    pairs = options["interaction_indexes"]
    assert [last - first + 1 for first, last in pairs] == lengths
    assert (pairs[0][0], pairs[-1][1]) == (0, depth - 1)


def test_shares_may_be_any_number_up_to_the_depth():
    for number in (1, 3, 4):
        model = ViTAdapter.around(
            _Ramp(16), task="detection", conv_inplane=8, num_interactions=number
        )
        assert len(model.interactions) == number
    with pytest.raises(
        ValueError, match=r"num_interactions: expected at most one.* 4 blocks.*got 5"
    ):
        ViTAdapter.around(_Ramp(16), task="detection", num_interactions=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("embed_dim", 96), ("depth", 4), ("num_heads", 3), ("patch_size", 8)),
        *(("num_classes", 10), ("in_chans", 1), ("colour", 1)),
    ],
)
def test_options_that_are_not_the_adapters_are_named_first(timm, name, value):
    text = rf"^{name}: expected one of .*got {name}={value}; .*go into model_args; .*conv_inplane"
    with pytest.raises(ValueError, match=text):
        ViTAdapter.from_timm("deit_tiny_patch16_224", task="detection", **{name: value})
    text = rf"^{name}: expected one of .*got {name}={value}; .*backbone's attributes.*conv_inplane"
    with pytest.raises(ValueError, match=text):
        ViTAdapter.around(_Ramp(16), task="detection", **{name: value})


class _Ramp(nn.Module):
    """A backbone of a user: its tokens are the coordinates of their patches' centres."""

    embed_dim, depth, num_prefix_tokens = 12, 4, 1

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def start(self, images):
        batch, _, height, width = images.shape
        h, w = height // self.patch_size, width // self.patch_size
        y = ((torch.arange(h) + 0.5) * self.patch_size).view(h, 1, 1).expand(h, w, 6)
        x = ((torch.arange(w) + 0.5) * self.patch_size).view(1, w, 1).expand(h, w, 6)
        tokens = torch.cat((y, x), -1).view(1, h * w, 12).expand(batch, -1, -1)
        tokens = torch.cat((tokens.new_zeros(batch, 1, 12), tokens), dim=1)
        return tokens, (h, w), [lambda t: t] * self.depth


def test_what_a_users_backbone_lacks_is_named():
    backbone = nn.Module()
    backbone.embed_dim = 12
    missing = "got Module without depth, patch_size, num_prefix_tokens, start; .*from_timm"
    with pytest.raises(TypeError, match=f"backbone: .*{missing}"):
        ViTAdapter.around(backbone, task="detection")
    for value in ("vit_base_patch16_224", None, object()):
        with pytest.raises(TypeError, match=r"backbone: expected a torch.nn.Module, got .*names"):
            ViTAdapter.around(value, task="detection")


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("embed_dim", 12.0, TypeError, "expected an integer, got 12.0"),
        ("depth", lambda: 4, TypeError, "expected an integer, got <function"),
        ("depth", 0, ValueError, "expected 1 or more, got 0"),
        ("patch_size", (16, 16), TypeError, r"expected an integer, got \(16, 16\)"),
        ("num_prefix_tokens", -1, ValueError, "expected 0 or more, got -1"),
        ("num_prefix_tokens", None, TypeError, "expected an integer, got None"),
        ("in_chans", 0, ValueError, "expected 1 or more, got 0"),
        ("start", None, TypeError, "expected a method, got None"),
    ],
)
def test_attributes_of_a_users_backbone_are_checked(name, value, error, text):
    backbone = _Ramp(16)
    setattr(backbone, name, value)
    with pytest.raises(error, match=rf"^backbone\.{name}: {text}"):
        ViTAdapter.around(backbone, task="detection")


@pytest.mark.parametrize("name", ["embed_dim", "depth", "num_prefix_tokens"])
def test_tokens_of_a_users_backbone_are_checked(name):
    backbone = _Ramp(16)
    setattr(backbone, name, getattr(backbone, name) + 6)
    model = ViTAdapter.around(backbone, task="detection", conv_inplane=8)
    delattr(backbone, name)
    text = r"backbone.start: expected tokens .*got \[2, 25, 12\], \(4, 6\) and 4"
    with pytest.raises(ValueError, match=text):
        model(torch.randn(2, 3, 64, 96))


def test_a_model_of_timm_is_sent_to_from_timm(timm):
    with torch.device("meta"):
        vit = timm.create_model("deit_tiny_patch16_224")
    text = r"got VisionTransformer without depth, patch_size, start; ViTAdapter.from_timm takes"
    with pytest.raises(TypeError, match=text):
        ViTAdapter.around(vit, task="detection")


def test_models_of_other_libraries_are_sent_to_from_timm():
    transformers = require_integration("transformers")
    with torch.device("meta"):
        vit = transformers.Dinov2Model(transformers.Dinov2Config(num_hidden_layers=1))
    text = (
        r"got Dinov2Model without embed_dim, depth, .*start; .*from_timm\(\"vit_base_patch14_dinov2"
    )
    with pytest.raises(TypeError, match=text):
        ViTAdapter.around(vit, task="detection")


@pytest.mark.parametrize("patch_size", [8, 14, 16, 20, 32])
@pytest.mark.parametrize("size", [(224, 224), (256, 320), (100, 230)], ids=str)
def test_maps_of_a_users_backbone_lie_where_the_image_has_them(patch_size, size):
    model = ViTAdapter.around(_Ramp(patch_size), task="detection", conv_inplane=8).eval()
    resized, samples = {}, []
    add_resized = model._add_resized

    def record(base, vit_map, index):
        resized[index] = add_resized(torch.zeros_like(base), vit_map, index)
        return add_resized(base, vit_map, index)

    model._add_resized = record
    extractor = model.interactions[0].extractor.attn
    extractor.register_forward_pre_hook(lambda module, args: samples.append(args))
    with torch.no_grad():
        model(torch.randn(1, 3, *size))
    for index, stride in enumerate(model.strides):
        # Bilinear interpolation is exact for a ramp, but for the border of the ViT's grid.
        for axis, channel in ((0, 0), (1, 6)):
            got = resized[index][0, channel].amax(dim=1 - axis)
            want = (torch.arange(len(got)) + 0.5) * stride
            grid_end = math.ceil(size[axis] / patch_size) * patch_size - patch_size / 2
            want = want.clamp(patch_size / 2, grid_end)
            torch.testing.assert_close(got, want)
    # The extractors look at the same place of the ViT's grid.
    _, c_shapes, _, ((h, w),), points = samples[0]
    x = points[0, : c_shapes[0][1], 0, 0] * w * patch_size
    torch.testing.assert_close(x, (torch.arange(len(x)) + 0.5) * 8)
    y = points[0, : c_shapes[0][0] * c_shapes[0][1] : c_shapes[0][1], 0, 1] * h * patch_size
    torch.testing.assert_close(y, (torch.arange(len(y)) + 0.5) * 8)


@pytest.mark.parametrize("components", ["full", "spm+extractor"])
def test_frozen_backbone_runs_without_gradients(timm, components):
    model = _build(
        "deit_tiny_patch16_224", "detection", freeze_backbone=True, components=components
    ).train()
    vit = model.backbone
    assert not any(module.training for module in vit.modules())
    assert model.spm.training
    graph = []
    for block in vit.model.blocks:
        block.register_forward_hook(lambda module, args, out: graph.append(out.requires_grad))
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert graph == [False] * 12
    assert all(parameter.grad is None for parameter in vit.parameters())
    trained = {k.split(".")[0] for k, p in model.named_parameters() if p.grad is not None}
    assert trained == set(ADAPTER_PARTS)
    required = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert required == []
    assert not any("injector" in k for k, p in model.named_parameters() if p.requires_grad)


def test_frozen_backbone_asks_the_operator_for_no_gradient_in_injectors(timm, monkeypatch):
    model = _build("deit_tiny_patch16_224", "detection", freeze_backbone=True).train()
    inputs = []
    for interaction in model.interactions:
        interaction.injector.attn.value_proj.register_forward_hook(
            lambda module, args, out: inputs.append(out.requires_grad)
        )
    model(torch.randn(2, 3, 64, 64))
    assert inputs == [False] * 4


def test_frozen_published_backbone_stays_in_inference_mode(build):
    model = build("detection", freeze_backbone=True, drop_path_rate=0.5).train()
    assert not any(block.training for block in model.blocks)
    images = torch.randn(2, 3, 64, 64)
    sum(m.square().mean() for m in model(images)).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.vit_parameters())
    assert len(list(model.vit_parameters())) == 3 + 4 * 14


def test_dinov3_variant_reads_four_normalised_taps_of_a_frozen_vit(timm):
    options = vitadapter.dinov3_options(8)
    model = ViTAdapter.from_timm(
        "vit_small_patch16_dinov3",
        task="segmentation",
        model_args={"depth": 8},
        **{**options, "adapter_heads": 6},
    ).eval()
    assert not any("injector" in key for key in model.state_dict())
    images, calls = torch.randn(1, 3, 64, 96), []
    for interaction in model.interactions:
        interaction.extractor.register_forward_pre_hook(lambda module, args: calls.append(args[2]))
    with torch.no_grad():
        model(images)
        expected = model.backbone.model.forward_intermediates(
            images, indices=[1, 3, 5, 7], norm=True, output_fmt="NLC", intermediates_only=True
        )
    for got, want in zip(calls, expected, strict=True):
        assert torch.equal(got, want)
    model.train()
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


@pytest.mark.parametrize(
    ("depth", "last"), [(12, [2, 5, 8, 11]), (24, [4, 11, 17, 23]), (40, [9, 19, 29, 39])]
)
def test_dinov3_variant_taps_the_published_blocks(depth, last):
    options = vitadapter.dinov3_options(depth)
    assert [pair[1] for pair in options["interaction_indexes"]] == last
    assert options["components"] == "spm+extractor"
    assert (options["adapter_heads"], options["deform_ratio"]) == (16, 0.5)
    with pytest.raises(ValueError, match="depth: expected 4 blocks or more, got 3"):
        vitadapter.dinov3_options(3)


def test_norm_that_is_not_there_is_asked_for_by_name(build):
    with pytest.raises(ValueError, match="norm_taps: expected a backbone with a final norm"):
        ViTAdapter.around(_Ramp(16), task="detection", norm_taps=True)
    with pytest.raises(ValueError, match="norm_taps: expected False for plain_vit"):
        build(norm_taps=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_args": {"num_heads": 5}}, r"^name, model_args: .*'num_heads': 5.*AssertionError"),
        ({"model_args": {"patch_size": 0}}, r"^name, model_args: .*ZeroDivisionError"),
        ({"model_args": {"img_sz": 64}}, r"^name, model_args: .*unexpected keyword .*img_sz"),
        ({"model_args": {"patch_size": (16,)}}, r"^name, model_args: .*IndexError"),
        ({"name": "vit_tiny_patch61_224"}, r"Unknown model.*did you mean .*vit_tiny_patch16_224"),
        (
            {"name": "vit_tiny_patch16_224.augreg_in12k"},
            r"Invalid pretrained tag.*did you mean vit_tiny_patch16_224\.augreg_in21k",
        ),
        ({"img_size": 8}, r"^img_size: expected a patch of 16x16 pixels or more, got \(8, 8\)"),
        (
            {"img_size": 64, "model_args": {"img_size": 32}},
            r"^img_size: expected once, got 64 .*32",
        ),
        ({"model_args": {"dtype": torch.float64}}, r"expected weights of torch.float32.*float64"),
        ({"pretained": True}, r"^pretained: .*; did you mean pretrained\?"),
        ({"num_interaction": 4}, r"^num_interaction: .*; did you mean num_interactions\?"),
    ],
)
def test_arguments_that_timm_does_not_take_are_named(timm, arguments, message):
    with pytest.raises(ValueError, match=message):
        ViTAdapter.from_timm(**{"name": "vit_tiny_patch16_224", "task": "detection", **arguments})


@pytest.mark.parametrize("size", [None, 64])
def test_one_image_size_may_be_said_twice(timm, size):
    arguments = {"task": "detection", "img_size": 64, "model_args": {"img_size": size, "depth": 4}}
    model = ViTAdapter.from_timm("vit_tiny_patch16_224", **arguments)
    assert model.backbone.model.patch_embed.img_size == (64, 64)


def test_a_known_name_gets_no_other_suggested(timm):
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'img_sz'$"):
        ViTAdapter.from_timm("vit_tiny_patch16_224", task="detection", model_args={"img_sz": 64})


@pytest.mark.parametrize("value", [[1], []])
def test_model_args_are_a_mapping(timm, value):
    with pytest.raises(TypeError, match=r"^model_args: expected a dict, got \["):
        ViTAdapter.from_timm("vit_tiny_patch16_224", task="detection", model_args=value)


@pytest.mark.parametrize("value", [None, 5])
def test_a_model_of_timm_is_a_name_or_a_module(timm, value):
    with pytest.raises(TypeError, match=rf"^name: expected the name of a timm .*, got {value}$"):
        ViTAdapter.from_timm(value, task="detection")


def test_compiled_models_are_refused(timm, build):
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(TypeError, match=r"^name: expected a module that is not compiled.*compile"):
        ViTAdapter.from_timm(torch.compile(vit), task="detection")
    for module in (vit, _Ramp(16), build()):
        with pytest.raises(TypeError, match=r"^backbone: .*not compiled.*; compile the"):
            ViTAdapter.around(torch.compile(module), task="detection")


def test_an_adapter_in_an_adapter_is_refused(build):
    with pytest.raises(TypeError, match="backbone: expected a vision transformer alone, got Plain"):
        ViTAdapter.around(build(), task="detection")


class _Turned(_Ramp):
    def start(self, images):
        tokens, (h, w), steps = super().start(images)
        return tokens, (w, h), steps


class _Alone(_Ramp):
    def start(self, images):
        return super().start(images)[0]


@pytest.mark.parametrize(
    ("kind", "message"), [(_Turned, r"\(6, 4\) and 4$"), (_Alone, "got Tensor")]
)
def test_what_a_users_backbone_starts_with_is_checked(kind, message):
    model = ViTAdapter.around(kind(16), task="detection", conv_inplane=8)
    with pytest.raises(ValueError, match=rf"^backbone.start: expected tokens.*{message}"):
        model(torch.randn(2, 3, 64, 96))
