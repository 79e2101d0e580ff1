# SPDX-License-Identifier: Apache-2.0
"""Spatial prior module: a small convolutional pyramid of the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SpatialPriorModule(nn.Module):
    """Convolutional stem and three stride-2 stages, each projected to D channels (paper sec. 3.3).

    BatchNorm2d has the keys of the published SyncBatchNorm; convert with
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` for training on several GPUs.

    Args:
        width: channels of the stem.
        embed_dim: channels D of the four outputs.
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_bn_relu(3, width, stride=2),
            *_conv_bn_relu(width, width, stride=1),
            *_conv_bn_relu(width, width, stride=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_bn_relu(width, 2 * width, stride=2))
        self.conv3 = nn.Sequential(*_conv_bn_relu(2 * width, 4 * width, stride=2))
        self.conv4 = nn.Sequential(*_conv_bn_relu(4 * width, 4 * width, stride=2))
        self.fc1 = nn.Conv2d(width, embed_dim, kernel_size=1)
        self.fc2 = nn.Conv2d(2 * width, embed_dim, kernel_size=1)
        self.fc3 = nn.Conv2d(4 * width, embed_dim, kernel_size=1)
        self.fc4 = nn.Conv2d(4 * width, embed_dim, kernel_size=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the pyramid.

        Args:
            images: [B, 3, H, W], H and W multiples of 32.

        Returns:
            Four maps [B, D, H/s, W/s] with strides s = 4, 8, 16, 32.
        """
        # Channels last: pooling is many times faster, and tokens are views of the maps.
        images = images.contiguous(memory_format=torch.channels_last)
        x1 = _exact(self.stem(images), images, 4)
        x2 = _exact(self.conv2(x1), images, 8)
        x3 = _exact(self.conv3(x2), images, 16)
        x4 = _exact(self.conv4(x3), images, 32)
        return self.fc1(x1), self.fc2(x2), self.fc3(x3), self.fc4(x4)


def _exact(x: Tensor, images: Tensor, stride: int) -> Tensor:
    """States that x is exactly `stride` times smaller than the images; changes nothing.

    With symbolic sizes, torch.compile would carry the rounding of five strided layers into every
    later shape, and take minutes to compare them.
    """
    batch, channels = x.shape[:2]
    return x.view(batch, channels, images.shape[2] // stride, images.shape[3] // stride)


def _conv_bn_relu(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
