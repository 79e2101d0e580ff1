# SPDX-License-Identifier: Apache-2.0
"""The published ViT-Adapters by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from .adapter import ViTAdapter
from .config import AdapterConfig

# Paper, appendix A.1 and table 10. Large is pre-trained at 384 pixels (AugReg), the others at 224.
_MODELS: dict[str, dict[str, Any]] = {
    "vit_adapter_tiny": {
        "embed_dim": 192, "depth": 12, "num_heads": 3, "adapter_heads": 6,
        "deform_ratio": 1.0, "drop_path_rate": 0.1, "pretrain_size": 224,
    },
    "vit_adapter_small": {
        "embed_dim": 384, "depth": 12, "num_heads": 6, "adapter_heads": 6,
        "deform_ratio": 1.0, "drop_path_rate": 0.2, "pretrain_size": 224,
    },
    "vit_adapter_base": {
        "embed_dim": 768, "depth": 12, "num_heads": 12, "adapter_heads": 12,
        "deform_ratio": 0.5, "drop_path_rate": 0.3, "pretrain_size": 224,
    },
    "vit_adapter_large": {
        "embed_dim": 1024, "depth": 24, "num_heads": 16, "adapter_heads": 16,
        "deform_ratio": 0.5, "drop_path_rate": 0.4, "pretrain_size": 384,
    },
}  # fmt: skip


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(_MODELS)


def create_model(
    name: str,
    *,
    task: str,
    attention: str = "deformable",
    num_interactions: int = 4,
    pretrain_size: int | None = None,
    **overrides: Any,
) -> ViTAdapter:
    """Builds a ViT-Adapter with fresh weights (Chen et al., ICLR 2023, sec. 3 and table 10).

    Args:
        name: one of `list_models()`.
        task: "detection" or "segmentation"; the published models differ in window attention and
            in the source of the ViT features, see `AdapterConfig`.
        attention: what injectors and extractors use: "deformable" (the published model), "dense",
            "cswin" or "pale" (table 7).
        num_interactions: injector-extractor pairs; divides the depth, and is 4 for segmentation.
        pretrain_size: side of the pre-training image in pixels; None: 224, for large 384.
        **overrides: any other field of `AdapterConfig`.

    Returns:
        The model in training mode, float32.

    Raises:
        ValueError: an unknown name, task, attention or override, with the valid ones listed; or
            values that contradict each other.
    """
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {', '.join(_MODELS)}, got {name!r}")
    values = dict(_MODELS[name])
    valid = {field.name for field in dataclasses.fields(AdapterConfig)}
    unknown = sorted(overrides.keys() - valid)
    if unknown:
        raise ValueError(
            f"overrides: expected fields of the configuration ({', '.join(sorted(valid))}), "
            f"got {', '.join(unknown)}"
        )
    values.update(overrides)
    if pretrain_size is not None:
        values["pretrain_size"] = pretrain_size
    config = AdapterConfig(
        task=task, attention=attention, num_interactions=num_interactions, **values
    )
    return ViTAdapter(config)
