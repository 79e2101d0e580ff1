# SPDX-License-Identifier: Apache-2.0
"""ViT-Adapter (Chen et al., ICLR 2023): plain vision transformers for dense prediction."""

from vitadapter_ops import __version__

from .adapter import ViTAdapter
from .baseline import ViTBaseline
from .checkpoints import LoadReport, load_checkpoint
from .models import create_model, dinov3_options, list_models
from .ragged import pad_images

__all__ = [
    "LoadReport",
    "ViTAdapter",
    "ViTBaseline",
    "__version__",
    "create_model",
    "dinov3_options",
    "list_models",
    "load_checkpoint",
    "pad_images",
]
