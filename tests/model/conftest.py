# SPDX-License-Identifier: Apache-2.0
"""Small models that keep every structural feature of the published ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vitadapter
from vitadapter import ViTAdapter

# Four blocks of width 48 and a stem of width 8; six adapter heads as in tiny and small.
_SMALL: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "conv_inplane": 8,
    "pretrain_size": 64,
    "drop_path_rate": 0.0,
}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Tensors this small only wait for each other on several threads."""
    threads(1)


@pytest.fixture
def build() -> Callable[..., ViTAdapter]:
    """Builds a small model; arguments as for create_model."""

    def build(task: str = "segmentation", **overrides: Any) -> ViTAdapter:
        return vitadapter.create_model("vit_adapter_tiny", task=task, **{**_SMALL, **overrides})

    return build


@pytest.fixture
def randomise() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Moves every parameter away from its initial value, so that zeros hide nothing."""

    def randomise(module: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return module

    return randomise
