# SPDX-License-Identifier: Apache-2.0
"""What the adapter and the baselines share: a vision transformer, and parts that make four maps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitadapter_ops.linear import is_untouched, warn_if_slow_autocast

from . import images as image_tools
from .backbones.protocol import Grid, Step
from .config import AdapterConfig
from .layers.attention import DeformableAttention
from .layers.interaction import Injector


class FeaturePyramid(nn.Module):
    """A vision transformer and further parts, of which freeze_backbone concerns the former.

    Attributes:
        config: all choices.
        embed_dim: channels of each output map.
        strides: strides of the output maps in pixels.
        own_parts: names of the children and parameters that are not the ViT's.
    """

    strides = (4, 8, 16, 32)
    own_parts: Collection[str] = ()
    config: AdapterConfig
    embed_dim: int
    patch_size: int
    num_prefix_tokens: int

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What the ViT was pre-trained with, under names of timm's default_cfg.

        `mean` and `std`, one number for each channel of images in [0, 1], and `input_size`, (C, H,
        W) of the images in pixels. A value is None where it is not known. Loading a checkpoint does
        not change them.
        """
        config: Any = self.config
        known: dict[str, Any] = config.default_cfg
        return known

    def start(self, images: Tensor) -> tuple[Tensor, Grid, Sequence[Step]]:
        """Tokens, grid and blocks of the backbone, see `Backbone`."""
        raise NotImplementedError

    def _check(self, images: Tensor) -> Tensor:
        """The images, which `forward` takes."""
        image_tools.check(images, self.patch_size, self._first_layer(), self.config.in_chans)
        warn_if_slow_autocast(images)
        if torch._C._get_tracing_state() and any(
            isinstance(module, DeformableAttention) for module in self.modules()
        ):
            return image_tools.of_traced_size(images)
        return images

    def _first_layer(self) -> Any:
        """The convolution of the images: the spatial prior's, else the ViT's.

        None where it is unknown, or where hooks of the part that it is in may change what it gets.
        """
        part = getattr(self, "spm", getattr(self, "patch_embed", None))
        if torch.compiler.is_compiling() or not isinstance(part, nn.Module):
            return None
        if not is_untouched(part):
            return None
        stem = getattr(part, "stem", None)
        return stem[0] if isinstance(stem, nn.Sequential) else getattr(part, "proj", None)

    def vit_parameters(self) -> Iterator[nn.Parameter]:
        """The backbone's own parameters, without those of the parts around it."""
        for name, parameter in self.named_parameters():
            if name.partition(".")[0] not in self.own_parts:
                yield parameter

    def train(self, mode: bool = True) -> FeaturePyramid:
        """Sets the mode; a frozen backbone stays in inference mode."""
        super().train(mode)
        if mode and self.config.freeze_backbone:
            for name, child in self.named_children():
                if name not in self.own_parts:
                    child.eval()
        return self

    def _freeze(self) -> None:
        """Where the configuration asks for it, lets nothing of the ViT and the injectors learn."""
        if not self.config.freeze_backbone:
            return
        injectors = [module for module in self.modules() if isinstance(module, Injector)]
        parameters = [parameter for each in injectors for parameter in each.parameters()]
        for parameter in (*self.vit_parameters(), *parameters):
            parameter.requires_grad_(False)
        self.train(self.training)

    def _vit_gradients(self) -> torch.set_grad_enabled:
        """A context in which the ViT runs."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_backbone)
