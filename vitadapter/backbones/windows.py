# SPDX-License-Identifier: Apache-2.0
"""Self-attention of one token set, over all tokens or inside square windows."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..images import ceil_div, corner


class SelfAttention(nn.Module):
    """What all self-attentions share, for those who count their operations.

    Attributes:
        num_heads: attention heads.
        window_size: side of a window in tokens; None: global attention.
    """

    num_heads: int
    window_size: int | None

    def extra_repr(self) -> str:
        """Heads and window."""
        return f"num_heads={self.num_heads}, window_size={self.window_size}"


def attend(qkv: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
    """Softmax attention.

    Args:
        qkv: [B, N, 3D], queries, keys and values of all heads.
        num_heads: attention heads.
        bias: [1, heads, N, N], added to the logits.

    Returns:
        [B, N, D].
    """
    batch, tokens, width = qkv.shape
    # No size is left to view to find out: it cannot without images.
    heads = qkv.view(batch, tokens, 3, num_heads, width // 3 // num_heads)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    if bias is None:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if batch == 0:
            # torch has left the bias out, whose gradient is zero and not None.
            out = out + bias.sum()
    return out.transpose(1, 2).reshape(batch, tokens, width // 3)


def in_windows(
    function: Callable[[Tensor], Tensor], x: Tensor, grid: tuple[int, int], side: int
) -> Tensor:
    """Applies a function to every window of side x side tokens.

    Windows do not overlap. A grid that they do not tile is padded with zeros at the bottom and
    right, and the padding is not masked.

    Args:
        function: maps windows [B * number, side * side, C] to [B * number, side * side, C'].
        x: tokens [B, h * w, C].
        grid: (h, w).
        side: side of a window in tokens.

    Returns:
        [B, h * w, C'].
    """
    batch, _, width = x.shape
    h, w = grid
    rows, columns = ceil_div(h, side), ceil_div(w, side)
    padded = F.pad(x.view(batch, h, w, width), (0, 0, 0, columns * side - w, 0, rows * side - h))
    windows = padded.view(batch, rows, side, columns, side, width).transpose(2, 3)
    out = function(windows.reshape(batch * rows * columns, side * side, width))
    width = out.shape[2]
    out = out.view(batch, rows, columns, side, side, width).transpose(2, 3)
    out = out.reshape(batch, rows * side, columns * side, width)
    return corner(out, h, w).reshape(batch, h * w, width)
