# SPDX-License-Identifier: Apache-2.0
"""Bilinear resizing of maps that are channels last in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes as F.interpolate does with align_corners=False.

    On a CPU, torch is slow at this with channels last: two matrix products take a fifth of the time
    (32x32 to 128x128 pixels of 384 channels), and give the same sums but for zeros added.

    Args:
        x: [B, D, h, w].
        size: (H, W) of the result.

    Returns:
        [B, D, H, W], dtype of x.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    batch, channels, h, w = x.shape
    if (h, w) == size:
        return x
    height, width = size
    # Autocast would round to 16 bits, which interpolation on other devices does not.
    with torch.autocast("cpu", enabled=False):
        y = _matrix(height, h, x) @ x.permute(0, 2, 3, 1).reshape(batch, h, w * channels)
        y = _matrix(width, w, x) @ y.view(batch, height, w, channels)
    return y.permute(0, 3, 1, 2)


def _matrix(outputs: int, inputs: int, like: Tensor) -> Tensor:
    """Weights [outputs, inputs]: a hat of width 2 around each output's place, edges repeated."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    place = torch.arange(outputs, dtype=dtype, device=like.device)
    place = ((place + 0.5) * (inputs / outputs) - 0.5).clamp(0, inputs - 1)
    distance = place[:, None] - torch.arange(inputs, dtype=dtype, device=like.device)
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)
