# SPDX-License-Identifier: Apache-2.0
"""Backbones that an adapter can be built around."""

from .beit import BEiT
from .plain_vit import PlainViT
from .protocol import Backbone
from .uniperceiver import UniPerceiver

__all__ = ["BEiT", "Backbone", "PlainViT", "UniPerceiver"]
