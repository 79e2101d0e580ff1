# SPDX-License-Identifier: Apache-2.0
"""Images of different sizes in one batch: each gets the maps that it gets alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from families import build
from optional import require_integration
from vitadapter import ViTAdapter, pad_images
from vitadapter_ops.testing.tolerances import PADDED_GRADIENT_SHARE, PADDED_SHARE

# Two of one size; one shorter, one narrower than others; one that is no multiple of anything.
SIZES = [(64, 96), (40, 70), (96, 33), (64, 96), (96, 64)]
MODELS = {
    "plain": ("plain", {}),
    "windows": ("plain", {"task": "detection", "window_size": 3}),
    "last block's features": ("plain", {"feature_rule": "new"}),
    "BEiT, windows": ("beit, windows", {"window_size": 3}),
    "Uni-Perceiver": ("uniperceiver", {}),
    "no injectors": ("plain", {"components": "spm+extractor"}),
    "no ConvFFN": ("plain", {"with_cffn": False, "use_extra_extractor": False}),
    "frozen": ("plain", {"freeze_backbone": True}),
}
TIMM = [
    *("deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"),
    *("eva02_tiny_patch14_224", "vit_base_patch16_siglip_224"),
]


class _Small(nn.Module):
    """A user's vision transformer: two prefix tokens, and attention over all of its tokens."""

    embed_dim, depth, num_prefix_tokens = 24, 4, 2

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, 24, patch_size, patch_size)
        self.prefix = nn.Parameter(torch.randn(1, 2, 24))
        self.positions = nn.Parameter(torch.randn(1, 24, 5, 5))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True) for _ in range(4)
        )
        self.norm = nn.LayerNorm(24)

    def start(self, images):
        x = self.proj(images)
        x = x + F.interpolate(self.positions, size=x.shape[2:], mode="bilinear")
        tokens = x.flatten(2).transpose(1, 2)
        prefix = self.prefix.expand(len(images), -1, -1)
        return torch.cat((prefix, tokens), 1), (x.shape[2], x.shape[3]), list(self.blocks)


def _with_statistics(model):
    """In inference mode, with norms that move what is zero."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def _build(name: str):
    family, options = MODELS[name]
    return _with_statistics(build(family, **options))


def _images(sizes=SIZES, **options):
    return [torch.randn(3, *size, **options) for size in sizes]


def _share(got, want) -> float:
    return ((got - want).abs().max() / want.square().mean().sqrt()).item()


@torch.no_grad()
def _check(model, images, most: float = PADDED_SHARE[torch.float32]) -> None:
    batch, mask = pad_images(images)
    batch[mask[:, None].expand_as(batch)] = torch.nan  # nothing may look at it
    maps = model(batch, mask)
    for index, image in enumerate(images):
        for got, want in zip(maps, model(image[None]), strict=True):
            height, width = want.shape[2:]
            assert _share(got[index, :, :height, :width], want[0]) <= most
            assert not got[index, :, height:].any()
            assert not got[index, :, :, width:].any()


@pytest.mark.parametrize("name", MODELS)
def test_an_image_in_a_padded_batch_gets_the_maps_that_it_gets_alone(name):
    model, images = _build(name), _images()
    _check(model, images)
    batch, mask = pad_images(images)
    for got, want in zip(model(batch, mask), torch.no_grad()(model)(batch, mask), strict=True):
        assert _share(got, want) <= PADDED_SHARE[torch.float32]
    # Without the mask it does not.
    with torch.no_grad():
        got, want = model(batch)[0][1, :, :10, :18], model(images[1][None])[0][0]
    assert _share(got, want) > 1000 * PADDED_SHARE[torch.float32]


@pytest.mark.parametrize("options", [{}, {"norm_taps": True, "feature_rule": "old"}], ids=str)
@pytest.mark.parametrize("patch_size", [8, 14, 20, 32])
def test_a_users_backbone_needs_to_know_no_mask(patch_size, options):
    model = ViTAdapter.around(
        _Small(patch_size), task="detection", injector_init=1.0, conv_inplane=8, **options
    )
    _check(_with_statistics(model), _images())


@pytest.mark.parametrize("name", TIMM)
def test_around_vits_of_timm(name):
    require_integration("timm")
    sizes = {"depth": 4} if "base" not in name else {"depth": 4, "embed_dim": 96, "num_heads": 3}
    model = ViTAdapter.from_timm(
        name, task="segmentation", model_args=sizes, injector_init=1.0, conv_inplane=8
    )
    _check(_with_statistics(model), _images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = _build("windows").to(dtype)
    _check(model, _images(dtype=dtype), PADDED_SHARE[dtype])


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        _check(_build("windows"), _images(), PADDED_SHARE[torch.bfloat16])


@pytest.mark.parametrize("name", ["plain", "windows", "frozen", "recomputed"])
def test_gradients_are_the_sums_of_those_of_the_images_alone(name):
    if name == "recomputed":
        model = _with_statistics(build("plain", with_cp=True)).double()
    else:
        model = _build(name).double()
    images = _images(dtype=torch.float64)
    batch, mask = pad_images([image.requires_grad_() for image in images])
    factors = [torch.randn_like(m) for m in model(batch, mask)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = [*parameters, *images]
    loss = sum((m * f).sum() for m, f in zip(model(batch, mask), factors, strict=True))
    got = torch.autograd.grad(loss, inputs, materialize_grads=True)
    loss = 0
    for index, image in enumerate(images):
        for m, f in zip(model(image[None]), factors, strict=True):
            loss = loss + (m * f[index : index + 1, :, : m.shape[2], : m.shape[3]]).sum()
    alone = torch.autograd.grad(loss, inputs, materialize_grads=True)
    for one, other in zip(got, alone, strict=True):
        assert (one - other).norm() <= PADDED_GRADIENT_SHARE * other.norm()


@pytest.mark.parametrize("with_cp", [False, True])
def test_training_learns_nothing_from_padding(with_cp):
    model = build("plain", with_cp=with_cp, drop_path_rate=0.1).train()
    batch, mask = pad_images(_images())
    batch.requires_grad_()
    maps = model(batch, mask)
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    gradient = batch.grad.abs().sum(1)
    assert not gradient[mask].any()
    assert gradient[~mask].any()


def test_batch_statistics_do_not_depend_on_what_is_in_the_padding():
    models = [build("plain").train()]
    models.append(copy.deepcopy(models[0]))
    batch, mask = pad_images(_images())
    for model, noise in zip(models, (0.0, 1e3), strict=True):
        model(batch + noise * mask[:, None], mask)
    for one, other in zip(*(model.buffers() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_mask_of_no_padding_changes_nothing():
    model, images = _build("windows"), torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        maps = model(images, torch.zeros(2, 70, 90, dtype=torch.bool))
        for got, want in zip(maps, model(images), strict=True):
            assert _share(got, want) <= PADDED_SHARE[torch.float32]


def test_no_images():
    model = build("plain").eval()
    maps = model(torch.empty(0, 3, 64, 96), torch.empty(0, 64, 96, dtype=torch.bool))
    assert [tuple(m.shape) for m in maps] == [(0, 32, 64 // s, 96 // s) for s in model.strides]


def test_blocks_see_the_tokens_of_images_of_one_size_and_none_of_padding():
    model, shapes = build("plain").eval(), []
    model.blocks[1].register_forward_pre_hook(lambda block, args: shapes.append(args[0].shape[:2]))
    model(*pad_images(_images()))
    # 64x96 pixels, to which 40x70 are padded; 96x64, to which 96x33 are.
    assert shapes == [(3, 24), (2, 24)]


def test_beit_for_segmentation_takes_images_of_its_size():
    model = _with_statistics(build("beit"))
    _check(model, _images([(64, 64), (50, 60), (64, 40)]))
    with pytest.raises(ValueError, match=r"images: expected 64x64 pixels .*got 32x64"):
        model(*pad_images(_images([(64, 64), (30, 60)])))


@pytest.mark.exhaustive
def test_compiled_models_read_the_sizes_of_each_batch():
    torch._dynamo.reset()
    model = _with_statistics(
        build("plain", num_interactions=1, use_extra_extractor=False, feature_rule="new")
    )
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for sizes in (SIZES[:2], [(40, 50), (64, 32)]):
            batch, mask = pad_images(_images(sizes))
            for got, want in zip(compiled(batch, mask), model(batch, mask), strict=True):
                assert _share(got, want) <= PADDED_SHARE[torch.float32]


MASKED = "padding_mask: expected None on the meta device, in torch.export and in torch.jit.trace"


def test_graphs_of_fixed_sizes_are_refused():
    model = build("plain").eval()
    example = pad_images(_images())
    with pytest.raises(ValueError, match=MASKED):
        torch.jit.trace(model, example)
    with pytest.raises(Exception, match=MASKED):
        torch.export.export(model, example)
    with pytest.raises(ValueError, match=MASKED):
        model.to("meta")(*(each.to("meta") for each in example))


def _mask(*padding: tuple[slice, slice], dtype=torch.bool):
    mask = torch.zeros(2, 64, 96, dtype=dtype)
    for rows, columns in padding:
        mask[1, rows, columns] = True
    return mask


ALL = slice(None)
WRONG = {
    "shape": (_mask()[:, :, 1:], r"padding_mask: expected \[2, 64, 96\] .*got \[2, 64, 95\]"),
    "integers": (_mask(dtype=torch.int64), "expected torch.bool, .*int64; .*pixel_mask == 0"),
    "device": (_mask().to("meta"), "padding_mask: expected .*cpu.* got .*meta"),
    "left": (_mask((ALL, slice(0, 9))), "expected each image at the top left .*of image 1"),
    "hole": (_mask((slice(5, 9), slice(5, 9))), "expected each image at the top left .*of image 1"),
    "inverted": (~_mask((ALL, slice(60, 96))), "expected h, w >= 16 .*0x0 pixels .*of image 0"),
    "all": (_mask((ALL, ALL)), r"expected h, w >= 16 \(one patch\) .*0x0 pixels .*of image 1"),
    "small": (_mask((slice(15, 64), ALL)), r"expected h, w >= 16 .*15x96 pixels .*of image 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_masks_are_refused(case):
    mask, text = WRONG[case]
    with pytest.raises(ValueError, match=text):
        build("plain")(torch.randn(2, 3, 64, 96), mask)


def test_what_is_no_mask_is_named():
    with pytest.raises(TypeError, match=r"padding_mask: expected a torch.Tensor, got list"):
        build("plain")(torch.randn(2, 3, 64, 96), [(64, 96), (64, 64)])


@pytest.mark.parametrize("attention", ["dense", "cswin", "pale"])
def test_attentions_without_a_mask_refuse_it(attention):
    with pytest.raises(ValueError, match=f'padding_mask: expected None .*"{attention}"'):
        build("plain", attention=attention)(torch.randn(2, 3, 64, 96), _mask())


@pytest.mark.parametrize("family", ["baseline", "spm", "spm+injector", "vitdet", "beit baseline"])
def test_baselines_refuse_masks(family):
    with pytest.raises(ValueError, match=r"padding_mask: expected None for a ViTBaseline, "):
        build(family)(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))


def test_pad_images_puts_each_at_the_top_left():
    images = _images([(5, 9), (7, 2)])
    batch, mask = pad_images(images)
    assert batch.shape == (2, 3, 7, 9)
    assert mask.dtype == torch.bool
    for image, padded, outside in zip(images, batch, mask, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(padded[:, :height, :width], image)
        assert torch.equal(padded[:, ~outside], image.flatten(1))
        assert not padded[:, outside].any()


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (torch.randn(2, 3, 8, 8), TypeError, "images: expected a list of tensors, got Tensor"),
        ([None], TypeError, r"images\[0\]: expected a torch.Tensor, got None"),
        ([], ValueError, "images: expected at least one tensor, got none"),
        ([torch.randn(1, 3, 8, 8)], ValueError, r"images\[0\]: expected 3 dimensions \[C, h, w\]"),
        (
            [torch.randn(3, 8, 8), torch.randn(1, 8, 8)],
            ValueError,
            r"images\[1\]: expected \[3, 8, 8\]",
        ),
        (
            [torch.randn(3, 8, 8), torch.randn(3, 8, 8).double()],
            ValueError,
            r"images\[1\]: expected dtype float32 \(that of images\[0\]\), got float64",
        ),
    ],
    ids=["tensor", "none", "empty", "rank", "channels", "dtype"],
)
def test_pad_images_names_what_it_cannot_join(images, error, text):
    with pytest.raises(error, match=text):
        pad_images(images)
