# SPDX-License-Identifier: Apache-2.0
"""Self-attention of one token set, over all tokens or inside square windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Entries of the attention matrix that `_attend_explicitly` forms at once: 4 MiB, which caches hold.
_ENTRIES = 2**21
_ROWS = 64  # their number is a multiple of it, as matrix products like it


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
    q, k, v = qkv.view(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if bias is None and _explicit_is_faster(q):
        out = _attend_explicitly(q, k, v)
    elif bias is None:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).reshape(batch, tokens, width // 3)


def _explicit_is_faster(q: Tensor) -> bool:
    """Whether torch's fused attention gains nothing from bf16 here.

    On processors with bf16 dot products but without AMX it takes as long as in fp32 (10.6 ms for 6
    heads and 1024 tokens on two cores); two products and a softmax take 6.7 ms.
    """
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def _attend_explicitly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, some rows at a time; logits are rounded to the dtype of q.

    So the published models compute it under autocast.
    """
    batch, heads, tokens, width = q.shape
    step = max(_ENTRIES // (batch * heads * tokens) // _ROWS, 1) * _ROWS
    k, v = k.contiguous().transpose(-2, -1), v.contiguous()
    parts = (q * width**-0.5).split(step, dim=-2)
    return torch.cat([(rows @ k).softmax(-1) @ v for rows in parts], dim=-2)


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
    padded = F.pad(x.view(batch, h, w, width), (0, 0, 0, -w % side, 0, -h % side))
    rows, columns = padded.shape[1] // side, padded.shape[2] // side
    windows = padded.view(batch, rows, side, columns, side, width).transpose(2, 3)
    out = function(windows.reshape(batch * rows * columns, side * side, width))
    out = out.view(batch, rows, columns, side, side, -1).transpose(2, 3)
    out = out.reshape(batch, rows * side, columns * side, -1)
    return out[:, :h, :w].reshape(batch, h * w, -1)
