# SPDX-License-Identifier: Apache-2.0
"""Published weights in: released models, pre-trained backbones, files of timm and jax."""

from .load import LoadReport, load_checkpoint

__all__ = ["LoadReport", "load_checkpoint"]
