# SPDX-License-Identifier: Apache-2.0
"""Images that a model cannot take are refused in the name of the argument."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from families import build

FAMILIES = ["plain", "beit", "uniperceiver", "baseline", "spm"]
IMAGES = torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [None, 3, "image.png", IMAGES.numpy()], ids=type)
def test_what_is_no_tensor_is_named(family, images):
    with pytest.raises(TypeError, match=r"images: expected a torch.Tensor, got"):
        build(family)(images)


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
