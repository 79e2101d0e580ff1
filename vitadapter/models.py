# SPDX-License-Identifier: Apache-2.0
"""The published models by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any

from .adapter import ViTAdapter
from .baseline import ViTBaseline
from .checkpoints import load_checkpoint
from .config import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NUM_MAPS,
    ModelConfig,
    check_options,
    field_names,
    shares,
)
from .registry import builder_of

# Paper, appendix A.1 and table 10. Large is pre-trained by AugReg, at 384 pixels and with its mean
# and std; the others at 224.
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 192, "depth": 12, "num_heads": 3, "adapter_heads": 6,
        "deform_ratio": 1.0, "drop_path_rate": 0.1, "pretrain_size": 224,
    },
    "small": {
        "embed_dim": 384, "depth": 12, "num_heads": 6, "adapter_heads": 6,
        "deform_ratio": 1.0, "drop_path_rate": 0.2, "pretrain_size": 224,
    },
    "base": {
        "embed_dim": 768, "depth": 12, "num_heads": 12, "adapter_heads": 12,
        "deform_ratio": 0.5, "drop_path_rate": 0.3, "pretrain_size": 224,
    },
    "large": {
        "embed_dim": 1024, "depth": 24, "num_heads": 16, "adapter_heads": 16,
        "deform_ratio": 0.5, "drop_path_rate": 0.4, "pretrain_size": 384,
        "mean": HALF, "std": HALF,
    },
}  # fmt: skip
_PLAIN = {"family": "plain_vit"}
# All published detectors and segmentors with the families below.
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
# One value starts both the layer scale and the injectors, in the published configurations.
_BEIT = {"family": "beit", "injector_init": 1e-6, "pretrain_size": 224, **_IMAGENET}
_UNIPERCEIVER = {"family": "uniperceiver", "norm_eps": 1e-5, "pretrain_size": 224, **_IMAGENET}
# The one light model of which a configuration was published has a single interaction.
_LIGHT_BASE = {
    "num_interactions": 1, "with_cffn": False, "use_extra_extractor": False,
    "add_vit_feature": False,
}  # fmt: skip
# The other light model is known by its parameters and FLOPs only; these give both.
_LIGHT_LARGE = {"use_extra_extractor": False, "deform_ratio": 0.25}
_BASELINE = {"num_interactions": 0}
# Plain ViTs drop less than those with an adapter.
_PLAIN_SIZES = {
    size: values if size == "large" else {**values, "drop_path_rate": 0.1}
    for size, values in _SIZES.items()
}
_VITDET = {"num_interactions": 0, "residual_blocks": True}

_MODELS: dict[str, dict[str, Any]] = {
    **{f"vit_adapter_{size}": {**values, **_PLAIN} for size, values in _SIZES.items()},
    "vit_adapter_base_light": {**_SIZES["base"], **_PLAIN, **_LIGHT_BASE},
    "vit_adapter_large_light": {**_SIZES["large"], **_PLAIN, **_LIGHT_LARGE},
    "beit_adapter_base": {**_SIZES["base"], **_BEIT, "drop_path_rate": 0.2},
    "beit_adapter_large": {**_SIZES["large"], **_BEIT, "drop_path_rate": 0.3},
    "uniperceiver_adapter_base": {**_SIZES["base"], **_UNIPERCEIVER, "drop_path_rate": 0.2},
    "uniperceiver_adapter_large": {**_SIZES["large"], **_UNIPERCEIVER},
    **{f"vit_{size}": {**values, **_PLAIN, **_BASELINE} for size, values in _PLAIN_SIZES.items()},
    **{f"vitdet_{size}": {**values, **_PLAIN, **_VITDET} for size, values in _PLAIN_SIZES.items()},
    "beit_base": {**_SIZES["base"], **_BEIT, **_BASELINE, "drop_path_rate": 0.2},
    "beit_large": {**_SIZES["large"], **_BEIT, **_BASELINE, "drop_path_rate": 0.2},
}
# What was published for one task only.
_DETECTION: dict[str, dict[str, Any]] = {"beit_adapter_large": {"drop_path_rate": 0.4}}


def dinov3_options(depth: int) -> dict[str, Any]:
    """Options of DINOv3's own variant of the adapter (Simeoni et al., 2025), for `from_timm`.

        ViTAdapter.from_timm("vit_large_patch16_dinov3", task="segmentation", **dinov3_options(24))

    No injectors, a frozen ViT, and its tokens after four blocks, normalised: the published ones for
    depths 24 and 40, else the last of each quarter (`vitadapter.config.shares`).

    Args:
        depth: blocks of the ViT.

    Raises:
        ValueError: there are fewer than four blocks.
    """
    if depth < NUM_MAPS:
        raise ValueError(f"depth: expected {NUM_MAPS} blocks or more, got {depth}")
    blocks = [(share.start, share.stop - 1) for share in shares(depth, NUM_MAPS)]
    if depth == 24:
        blocks = [(0, 4), (5, 11), (12, 17), (18, 23)]
    return {
        "components": "spm+extractor",
        "interaction_indexes": blocks,
        "feature_rule": "old",
        "norm_taps": True,
        "adapter_heads": 16,
        "deform_ratio": 0.5,
        "drop_path_rate": 0.3,
        "freeze_backbone": True,
        "with_cp": True,
    }


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(_MODELS)


def create_model(
    name: str,
    *,
    task: str,
    attention: str = "deformable",
    num_interactions: int | None = None,
    components: str = "full",
    img_size: int | None = None,
    pretrain_size: int | None = None,
    checkpoint: str | os.PathLike[str] | IO[bytes] | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> ViTAdapter | ViTBaseline:
    """Builds a published model (Chen et al., ICLR 2023, sec. 3 and tables 6, 7 and 10).

    Args:
        name: one of `list_models()`.
        task: "detection" or "segmentation"; the published models differ in window attention and
            in the source of the ViT features, see `AdapterConfig`.
        attention: what injectors and extractors use: "deformable" (the published model), "dense",
            "cswin" or "pale" (table 7).
        num_interactions: injector-extractor pairs; divides the depth; 0: the plain ViT (table 6).
            None: as published, four in most models.
        components: "full", "spm+injector", "spm" (table 6) or "spm+extractor", see `AdapterConfig`.
        img_size: side of the images in pixels, for BEiT segmentation, which serves one size (None:
            512). Other models take images of any size.
        pretrain_size: side of the pre-training image in pixels; None: 224, for large 384.
        checkpoint: for `load_checkpoint`; None: fresh weights, those of the ViT included.
        **overrides: any other field of `ModelConfig`.

    Returns:
        The model in training mode, float32.

    Raises:
        TypeError: a value is of another type.
        ValueError: an unknown name, task, attention or override, with the valid ones listed; values
            that contradict each other; or a checkpoint of another architecture.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected str, got {name!r}")
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {', '.join(_MODELS)}, got {name!r}")
    published = _DETECTION.get(name, {}) if task == "detection" else {}
    values = {**_MODELS[name], **published, **overrides}
    for key, value in (("num_interactions", num_interactions), ("pretrain_size", pretrain_size)):
        if value is not None:
            values[key] = value
    own = [field for field in field_names(ModelConfig) if field != "family"]
    check_options(overrides, own, others=("checkpoint",))
    config = ModelConfig(
        task=task,
        attention=attention,
        components=components,
        img_size=img_size,
        **values,
    )
    build = builder_of(config.family, adapter=config.is_adapter)
    assert build is not None  # or the configuration would have refused
    model: ViTAdapter | ViTBaseline = build(config)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
