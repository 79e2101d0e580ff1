# SPDX-License-Identifier: Apache-2.0
"""Spatial prior module: a small convolutional pyramid of the image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitadapter_ops.linear import is_plain_tensor, is_untouched
from vitadapter_ops.reference import compute_dtype

from ..config import COARSEST_STRIDE
from ..ragged import RaggedBatch


class SpatialPriorModule(nn.Module):
    """Convolutional stem and three stride-2 stages, each projected to D channels (paper sec. 3.3).

    BatchNorm2d has the keys of the published SyncBatchNorm; convert with
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` for training on several GPUs.

    Args:
        width: channels of the stem.
        embed_dim: channels D of the four outputs.
        in_chans: channels of the images.
    """

    def __init__(self, width: int, embed_dim: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = Stage(
            *_conv_bn_relu(in_chans, width, stride=2),
            *_conv_bn_relu(width, width, stride=1),
            *_conv_bn_relu(width, width, stride=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = Stage(*_conv_bn_relu(width, 2 * width, stride=2))
        self.conv3 = Stage(*_conv_bn_relu(2 * width, 4 * width, stride=2))
        self.conv4 = Stage(*_conv_bn_relu(4 * width, 4 * width, stride=2))
        self.fc1 = nn.Conv2d(width, embed_dim, kernel_size=1)
        self.fc2 = nn.Conv2d(2 * width, embed_dim, kernel_size=1)
        self.fc3 = nn.Conv2d(4 * width, embed_dim, kernel_size=1)
        self.fc4 = nn.Conv2d(4 * width, embed_dim, kernel_size=1)

    def forward(
        self, images: Tensor, ragged: RaggedBatch | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the pyramid.

        Args:
            images: [B, in_chans, H, W], H and W multiples of 32.
            ragged: the images' own sizes, where these differ.

        Returns:
            Four maps [B, D, H/s, W/s] with strides s = 4, 8, 16, 32.
        """
        own = () if ragged is None else (partial(_cleared, ragged=ragged, width=images.shape[3]),)
        # Channels last: pooling is many times faster, and tokens are views of the maps.
        images = images.contiguous(memory_format=torch.channels_last)
        x1 = _exact(self.stem(images, *own), images, 4)
        x2 = _exact(self.conv2(x1, *own), images, 8)
        x3 = _exact(self.conv3(x2, *own), images, 16)
        x4 = _exact(self.conv4(x3, *own), images, 32)
        return self.fc1(x1), self.fc2(x2), self.fc3(x3), self.fc4(x4)


class Stage(nn.Sequential):
    """Convolutions, each with its norm and ReLU; perhaps a pooling layer at the end."""

    def forward(self, x: Tensor, clear: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Applies the layers; for inference with each batch norm within the convolution before it.

        A norm of running statistics is a factor and a shift for each channel. In the convolution's
        weights they cost nothing; on their own, a pass over each of the largest maps.

        Args:
            x: [B, C, H, W].
            clear: puts zeros into what the next convolution must find padded with zeros.
        """
        folds = not torch.is_grad_enabled() and is_untouched(self)
        layers: list[Any] = list(self)
        while layers:
            layer = layers.pop(0)
            if folds and _is_product(layer) and layers and _is_affine(layers[0]):
                norm = layers.pop(0)
                dtype = layer.weight.dtype
                wide = compute_dtype(dtype)
                factor = norm.weight.to(wide) * (norm.running_var.to(wide) + norm.eps).rsqrt()
                weight = layer.weight * factor[:, None, None, None]
                shift = norm.bias - norm.running_mean * factor
                x = layer._conv_forward(x, weight.to(dtype), shift.to(dtype))
            else:
                x = layer(x)
            # By their places: tools that fuse layers put identities into those of norm and ReLU.
            if clear is not None and ((len(self) - len(layers)) % 3 == 0 or not layers):
                x = clear(x)
        return x


def _cleared(x: Tensor, ragged: RaggedBatch, width: int) -> Tensor:
    """The map x of images `width` pixels wide, zero outside of each image's region."""
    return ragged.cleared(x, width // x.shape[3], COARSEST_STRIDE)


def _is_product(layer: Any) -> bool:
    """Whether the layer is a convolution without a bias, of a weight like any other.

    Parametrizations and quantisers put another type of layer in its place, or of weight into it.
    """
    return type(layer) is nn.Conv2d and layer.bias is None and is_plain_tensor(layer.weight)


def _is_affine(norm: Any) -> bool:
    """Whether the norm multiplies and shifts each channel by numbers that do not depend on it."""
    return (
        type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and not norm.training
        and all(
            is_plain_tensor(tensor)
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
    )


def _exact(x: Tensor, images: Tensor, stride: int) -> Tensor:
    """States that x is exactly `stride` times smaller than the images; changes nothing.

    With symbolic sizes, torch.compile would carry the rounding of five strided layers into every
    later shape, and take minutes to compare them.
    """
    # Not view, which for a batch of one forgets that the map is channels last.
    return x.expand(-1, -1, images.shape[2] // stride, images.shape[3] // stride)


def _conv_bn_relu(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    # The ReLU writes a map of its own: a hook may have kept the norm's.
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()
