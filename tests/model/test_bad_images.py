# SPDX-License-Identifier: Apache-2.0
"""Images that a model cannot take are refused in the name of the argument."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from families import build
from vitadapter import pad_images

FAMILIES = ["plain", "beit", "uniperceiver", "baseline", "spm"]
IMAGES = torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [None, 3, "image.png", [], IMAGES.numpy()], ids=type)
def test_what_is_no_tensor_is_named(family, images):
    with pytest.raises(TypeError, match=r"images: expected a torch.Tensor, got"):
        build(family)(images)


PHOTO = np.zeros((64, 96, 3), np.uint8)
SCALED = r"\.permute\(2, 0, 1\).float\(\) / 255"
CONVERSIONS = {
    "array": (
        PHOTO,
        rf"numpy array of shape \[64, 96, 3\]; .*\(torch.from_numpy\(images\){SCALED}\)\[None",
    ),
    "PIL": (PIL.Image.fromarray(PHOTO), rf"PIL Image; .*numpy.array\(images.convert.*{SCALED}"),
    "arrays": ([PHOTO], rf"list of numpy array .*torch.from_numpy\(image\){SCALED}.*pad_images"),
    "PIL images": ((PIL.Image.fromarray(PHOTO),), rf"tuple of PIL Image.*{SCALED}.*pad_images"),
    "tensors": (list(IMAGES), "list of Tensor; vitadapter.pad_images makes a batch"),
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_the_message_says_how_images_become_tensors(case):
    images, text = CONVERSIONS[case]
    with pytest.raises(TypeError, match=f"images: expected a torch.Tensor, got {text}") as caught:
        build("plain")(images)
    if case != "tensors":
        assert "normalise by the mean and std of model.default_cfg" in str(caught.value)


def test_the_conversions_of_the_message_work():
    model = build("plain").eval()
    for name, images in (("images", PHOTO), ("images", PIL.Image.fromarray(PHOTO))):
        with pytest.raises(TypeError) as caught:
            model(images)
        text = str(caught.value)
        expression = text[text.index("(torch") : text.index("[None]") + len("[None]")]
        tensor = eval(expression, {"torch": torch, "numpy": np, name: images})
        assert model(tensor)[0].shape[2:] == (16, 24)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (IMAGES.byte(), r"got torch.uint8; .*images.float\(\) / 255, then normalise .*default_cfg"),
        (IMAGES[0], r"expected \[B, 3, H, W\], got shape \[3, 64, 64\]; images\[None\]"),
        (IMAGES.permute(0, 2, 3, 1), r"expected 3 channels .*got 64; images.permute\(0, 3, 1, 2\)"),
    ],
    ids=["uint8", "one image", "channels last"],
)
def test_the_message_says_what_other_tensors_need(images, text):
    with pytest.raises(ValueError, match=text):
        build("plain")(images)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_dtype_than_the_models_is_named(family, dtype):
    model = build(family).eval()
    text = rf"images: expected the model's dtype, torch.float32, .*got {dtype}"
    with pytest.raises(ValueError, match=text):
        model(IMAGES.to(dtype))
    model.bfloat16()
    with pytest.raises(ValueError, match=r"dtype, torch.bfloat16, .*got torch.float32"):
        model(IMAGES)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_converts_images(family):
    model = build(family).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert all(m.isfinite().all() for m in model(IMAGES.bfloat16()))


def test_hooks_may_convert_images_and_weights():
    for part in ("patch_embed", "patch_embed.proj"):
        model = build("baseline").eval()
        layer = model.get_submodule(part)
        layer.register_forward_pre_hook(lambda layer, args: (args[0].float(),))
        with torch.no_grad():
            assert all(m.isfinite().all() for m in model(IMAGES.double()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("images", "text"),
    [
        (IMAGES.to("meta"), "images: expected a tensor on the model's device, cpu, got .* meta"),
        (IMAGES.to_sparse(), "images: expected a dense tensor, got one of layout sparse_coo"),
    ],
    ids=["meta", "sparse"],
)
def test_another_device_or_layout_is_named(family, images, text):
    with pytest.raises(ValueError, match=text):
        build(family)(images)


def test_images_for_a_batch_that_are_none_are_named_with_their_conversion():
    array = np.zeros((40, 50, 3), dtype=np.uint8)
    text = (
        r"images\[1\]: expected a torch.Tensor, got numpy array of shape \[40, 50, 3\]; of an "
        r"image \[H, W, C\], 0 to 255, make torch"
    )
    with pytest.raises(TypeError, match=text) as caught:
        pad_images([torch.zeros(3, 40, 50), array])
    conversion = str(caught.value).partition("make ")[2]
    tensor = eval(conversion.partition(", then")[0], {"torch": torch, "image": array})
    assert pad_images([tensor])[0].shape == (1, 3, 40, 50)
    with pytest.raises(
        ValueError, match=r"images\[0\]: expected at least one pixel, got .*3, 0, 4"
    ):
        pad_images([torch.zeros(3, 0, 4)])
    nameless = type("Nameless", (), {"__module__": None})()
    with pytest.raises(TypeError, match=r"images\[0\]: expected a torch.Tensor, got Nameless"):
        pad_images([nameless])


def test_images_of_a_size_that_only_the_data_tell_can_be_exported():
    class Cut(torch.nn.Module):
        def forward(self, image, mask):
            return pad_images([image[:, mask.nonzero()[:, 0]]])

    image, mask = torch.randn(3, 6, 5), torch.tensor([True, False] * 3)
    exported = torch.export.export(Cut(), (image, mask), strict=False).module()
    for got, expected in zip(exported(image, ~mask), Cut()(image, ~mask), strict=True):
        assert torch.equal(got, expected)
