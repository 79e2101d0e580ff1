# SPDX-License-Identifier: Apache-2.0
"""Values for models and files, and whether a model has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def values(model: nn.Module) -> dict[str, Tensor]:
    """Random values of the model's shapes, under its keys."""
    return {
        key: torch.randn_like(value) if value.is_floating_point() else value.clone()
        for key, value in model.state_dict().items()
    }


def is_loaded(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether the model has these values."""
    own = model.state_dict()
    return all(torch.equal(own[key], value) for key, value in state.items())


def augreg_shapes(
    *, width: int, heads: int, depth: int, entries: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of AugReg's .npz files for patches of 16 pixels, heads of the model too."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "cls": (1, 1, width),
        "Transformer/posembed_input/pos_embedding": (1, entries, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, 10),
        "head/bias": (10,),
        "pre_logits/kernel": (width, width),
        "pre_logits/bias": (width,),
    }
    for index in range(depth):
        block = f"Transformer/encoderblock_{index}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = (width, heads, width // heads)
            shapes[f"{attention}/{part}/bias"] = (heads, width // heads)
        shapes[f"{attention}/out/kernel"] = (heads, width // heads, width)
        shapes[f"{attention}/out/bias"] = (width,)
        dense = f"{block}/MlpBlock_3/Dense_"
        shapes |= {f"{dense}0/kernel": (width, 4 * width), f"{dense}0/bias": (4 * width,)}
        shapes |= {f"{dense}1/kernel": (4 * width, width), f"{dense}1/bias": (width,)}
    return shapes
