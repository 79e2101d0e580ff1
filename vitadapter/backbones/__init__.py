# SPDX-License-Identifier: Apache-2.0
"""Backbones that an adapter can be built around."""

from .plain_vit import PlainViT

__all__ = ["PlainViT"]
