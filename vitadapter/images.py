# SPDX-License-Identifier: Apache-2.0
"""Images in, maps out: checks, padding and cropping."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_ops import _checks
from vitadapter_ops.linear import is_plain_tensor


def check(
    images: Tensor, patch_size: int, layer: nn.Module | None = None, in_chans: int = 3
) -> None:
    """Checks what a model is called with.

    Args:
        images: as given.
        patch_size: side of a patch in pixels.
        layer: the model's convolution of the images, which no hook is called before.
        in_chans: channels C of the images.

    Raises:
        TypeError: images is no tensor.
        ValueError: it is not [B, C, H, W], dense, floating point and at least one patch; or a plain
            layer's weight has another dtype, outside autocast, or is on another device.
    """
    _checks.is_tensor("images", images, _described)
    if images.dim() != 4:
        hint = "; images[None] is a batch of one" if images.dim() == 3 else ""
        raise ValueError(
            f"images: expected [B, {in_chans}, H, W], got shape {list(images.shape)}{hint}"
        )
    if images.shape[1] != in_chans:
        hint = "; images.permute(0, 3, 1, 2) puts the channels first"
        raise ValueError(
            f"images: expected {in_chans} channels in [B, {in_chans}, H, W], got {images.shape[1]}"
            f"{hint if images.shape[3] == in_chans else ''}"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images: expected a floating-point dtype, got {images.dtype}; for values of 0 to 255, "
            f"images.float() / 255, {_NORMALISE}"
        )
    if images.shape[2] < patch_size or images.shape[3] < patch_size:
        raise ValueError(
            f"images: expected H, W >= {patch_size} (one patch), got shape {list(images.shape)}"
        )
    # Other kinds of layers, and of weights, may convert and move images themselves.
    if type(layer) is nn.Conv2d and is_plain_tensor(layer.weight):
        _check_like(images, layer.weight)


_NORMALISE = "then normalise by the mean and std of model.default_cfg"


def _described(images: object) -> str:
    """What came in place of a tensor, and how it becomes one."""
    if not isinstance(images, list | tuple) or not images:
        kind, scaled = _kind_and_conversion(images, "images")
        one = f"; of one image [H, W, C], 0 to 255, make ({scaled})[None], {_NORMALISE}"
        return kind + one if scaled else kind
    kind, scaled = _kind_and_conversion(images[0], "image")
    each = f"of each image make {scaled}, {_NORMALISE}; " if scaled else ""
    return (
        f"{type(images).__name__} of {kind}; {each}vitadapter.pad_images makes a batch and its "
        "padding mask of a list of tensors [C, h, w]"
    )


def described_image(image: object) -> str:
    """What came in place of the tensor [C, h, w] of one image, and how it becomes one."""
    kind, scaled = _kind_and_conversion(image, "image")
    of = "of an image [H, W, C], 0 to 255, make"
    return f"{kind}; {of} {scaled}, {_NORMALISE}" if scaled else kind


def _kind_and_conversion(image: object, name: str) -> tuple[str, str]:
    """The name of the type, and an expression for a tensor [C, h, w]; "" where none is known."""
    kind = "None" if image is None else type(image).__name__
    scaled = ".permute(2, 0, 1).float() / 255"
    if isinstance(image, np.ndarray):
        return f"numpy array of shape {list(image.shape)}", f"torch.from_numpy({name}){scaled}"
    if str(type(image).__module__).startswith("PIL."):
        array = f"numpy.array({name}.convert('RGB'))"
        return f"PIL {kind}", f"torch.from_numpy({array}){scaled}"
    return kind, ""


def _check_like(images: Tensor, weight: Tensor) -> None:
    if images.device != weight.device:
        raise ValueError(
            f"images: expected a tensor on the model's device, {weight.device}, got one on "
            f"{images.device}"
        )
    if images.dtype != weight.dtype and (
        images.is_meta or not torch.is_autocast_enabled(images.device.type)
    ):
        raise ValueError(
            f"images: expected the model's dtype, {weight.dtype}, or torch.autocast, got "
            f"{images.dtype}"
        )


def of_traced_size(images: Tensor) -> Tensor:
    """The images; in a graph by torch.jit.trace, a check that they have the size of the example.

    For whatever turns sizes into constants: without it, the graph gives wrong maps of other sizes.
    """
    if not torch._C._get_tracing_state():
        return images
    height, width = (int(side) for side in images.shape[-2:])
    # RuntimeError: The expanded size of the tensor (64) must match the existing size (96) ...
    return images.expand(-1, -1, height, width)


def ceil_div(size: int, stride: int) -> int:
    """size / stride, rounded up."""
    # Not -(-size // stride): with symbolic sizes torch.compile simplifies this form far faster.
    return (size + stride - 1) // stride


def pad(images: Tensor, multiple: int) -> Tensor:
    """Pads with zeros at the bottom and right to multiples of `multiple`."""
    height, width = images.shape[-2:]
    rows, columns = ceil_div(height, multiple), ceil_div(width, multiple)
    return F.pad(images, (0, columns * multiple - width, 0, rows * multiple - height))


def crop(
    maps: Sequence[Tensor], strides: Sequence[int], images: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of the four maps that the images cover; in training no views.

    FSDP2 warns of views, for the gradient's hook is lost where one is changed in place.
    """
    height, width = images.shape[-2:]
    parts = []
    for part, stride in zip(maps, strides, strict=True):
        rows, columns = ceil_div(height, stride), ceil_div(width, stride)
        if is_symbolic(part) or part.shape[2:] != (rows, columns):
            part = corner(part.permute(0, 2, 3, 1), rows, columns).permute(0, 3, 1, 2)
        if not torch.compiler.is_compiling() and part.requires_grad and part._is_view():
            part = part.clone(memory_format=torch.channels_last)
        parts.append(part)
    f1, f2, f3, f4 = parts
    return f1, f2, f3, f4


def corner(x: Tensor, height: int, width: int) -> Tensor:
    """The top left height x width pixels of x [B, H, W, C].

    A view; but torch.compile and torch.export ask of every view of symbolic size whether it is all
    of x, and their graphs hold for that answer only. They get a copy, of which Inductor makes a
    part of what computes x, and whose gradient is padding.
    """
    if is_symbolic(x):
        return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    return x[:, :height, :width]


def is_symbolic(x: Tensor) -> bool:
    """Whether a graph is being made in which sizes of x are no numbers."""
    symbolic = any(isinstance(size, torch.SymInt) for size in x.shape)
    return symbolic or torch.compiler.is_dynamo_compiling() or bool(torch._C._get_tracing_state())
