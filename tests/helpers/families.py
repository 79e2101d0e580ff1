# SPDX-License-Identifier: Apache-2.0
"""One small model of each family, as names and arguments of create_model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import vitadapter

_SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "adapter_heads": 2,
    "conv_inplane": 4,
    "drop_path_rate": 0.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {"name": "vit_adapter_tiny", "pretrain_size": 64},
    "beit": {"name": "beit_adapter_base", "img_size": 64},
    "beit, windows": {"name": "beit_adapter_base", "task": "detection", "window_size": 2},
    "uniperceiver": {"name": "uniperceiver_adapter_base", "pretrain_size": 64},
    "spm": {"name": "vit_adapter_tiny", "components": "spm"},
    "spm+injector": {"name": "vit_adapter_tiny", "components": "spm+injector"},
    "baseline": {"name": "vit_tiny"},
    "vitdet": {"name": "vitdet_tiny", "task": "detection", "window_size": 2},
    "beit baseline": {"name": "beit_base", "img_size": 64},
}


def build(family: str, **options: Any) -> nn.Module:
    """A model in training mode whose parameters are all other than zero."""
    arguments = {"task": "segmentation", **_SMALL, **FAMILIES[family], **options}
    model = vitadapter.create_model(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
