# SPDX-License-Identifier: Apache-2.0
"""ViT-Adapter: a plain ViT, a spatial prior and their interactions give four feature maps."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_ops import MSDeformAttn

from .backbones.plain_vit import PlainViT
from .config import NUM_MAPS, PATCH_SIZE, AdapterConfig
from .layers.attention import build_attention
from .layers.interaction import Extractor, Injector, Interaction, to_maps, to_tokens
from .layers.spatial_prior import SpatialPriorModule

_COARSEST_STRIDE = 32


class ViTAdapter(PlainViT):
    """Vision Transformer Adapter for dense predictions (Chen et al., ICLR 2023, sec. 3).

    The state_dict has the keys of the released backbones, without their `backbone.` prefix.

    Args:
        config: all choices; `create_model` fills it from a name.

    Attributes:
        config: as given.
        embed_dim: channels of each output map.
        strides: strides of the output maps in pixels.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            patch_size=PATCH_SIZE,
            pretrain_size=config.pretrain_size,
            drop_path_rate=config.drop_path_rate,
            layer_scale=config.layer_scale,
            window_size=config.window_size,
            global_blocks=config.global_blocks,
        )
        dim = config.embed_dim
        self.config = config
        self.embed_dim = dim
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPriorModule(config.conv_inplane, dim)
        last = config.num_interactions - 1
        self.interactions = nn.ModuleList(
            _build_interaction(config, extra_extractors=2 if index == last else 0)
            for index in range(config.num_interactions)
        )
        self.up = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.norm1 = nn.BatchNorm2d(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.norm3 = nn.BatchNorm2d(dim)
        self.norm4 = nn.BatchNorm2d(dim)
        self._init_adapter()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the feature pyramid.

        Images whose sides are not multiples of 32 are padded with zeros at the bottom and right,
        and each map is cropped to the part that the image covers. The result near those two edges
        therefore depends on the padding, and in training mode so do the batch statistics.

        Args:
            images: [B, 3, H, W], floating point, normalised as in pre-training; any H, W >= 1.

        Returns:
            Four maps [B, embed_dim, ceil(H/s), ceil(W/s)] with strides s = 4, 8, 16, 32.

        Raises:
            ValueError: images has another rank, number of channels or an integer dtype, or is
                empty.
        """
        _check_images(images)
        height, width = images.shape[-2:]
        rows, columns = _ceil_div(height, _COARSEST_STRIDE), _ceil_div(width, _COARSEST_STRIDE)
        pad = (0, columns * _COARSEST_STRIDE - width, 0, rows * _COARSEST_STRIDE - height)
        images = F.pad(images, pad)

        c1, *pyramid = self.spm(images)
        c_shapes = [(level.shape[2], level.shape[3]) for level in pyramid]
        embeddings = self.level_embed.unbind(0)
        c = to_tokens([p + e[:, None, None] for p, e in zip(pyramid, embeddings, strict=True)])
        x, x_shape = self.tokenize(images)

        vit_tokens = []  # after each interaction
        step = self.config.blocks_per_interaction
        for index, interaction in enumerate(self.interactions):
            blocks = [self.blocks[index * step + offset] for offset in range(step)]
            x, c = interaction(x, c, blocks, x_shape, c_shapes)
            vit_tokens.append(x)

        c2, c3, c4 = to_maps(c, c_shapes)
        maps = [c1 + self.up(c2), c2, c3, c4]
        if self.config.add_vit_feature:
            if self.config.task == "detection":
                vit_tokens = [x] * NUM_MAPS
            for index, tokens in enumerate(vit_tokens):
                (vit_map,) = to_maps(tokens, [x_shape])
                maps[index] = maps[index] + _resize(vit_map, maps[index])

        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        f1, f2, f3, f4 = (
            norm(m)[:, :, : _ceil_div(height, stride), : _ceil_div(width, stride)]
            for norm, m, stride in zip(norms, maps, self.strides, strict=True)
        )
        return f1, f2, f3, f4

    def _init_adapter(self) -> None:
        nn.init.normal_(self.level_embed)
        for part in (self.spm, self.interactions, self.up):
            part.apply(_init_layer)
        # Deformable attention has its own rule; it comes last because _init_layer touched it.
        for module in self.interactions.modules():
            if isinstance(module, MSDeformAttn):
                module._reset_parameters()


def _build_interaction(config: AdapterConfig, extra_extractors: int) -> Interaction:
    options: dict[str, Any] = {}
    if config.attention == "deformable":
        options = {"n_points": config.n_points, "ratio": config.deform_ratio}
    elif config.attention == "dense":
        options = {"naive": config.naive_attention}
    attention = partial(
        build_attention, config.attention, config.embed_dim, config.adapter_heads, **options
    )

    def extractor() -> Extractor:
        hidden = int(config.embed_dim * config.cffn_ratio) if config.with_cffn else None
        return Extractor(config.embed_dim, attention, hidden, config.drop_path_rate)

    return Interaction(
        Injector(config.embed_dim, attention, config.injector_init),
        extractor(),
        [extractor() for _ in range(extra_extractors if config.use_extra_extractor else 0)],
        with_cp=config.with_cp,
    )


def _init_layer(module: nn.Module) -> None:
    """The published initialisation of the adapter; norms keep their default of weight 1, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _ceil_div(size: int, stride: int) -> int:
    # Not -(-size // stride): with symbolic sizes torch.compile simplifies this form far faster.
    return (size + stride - 1) // stride


def _resize(x: Tensor, like: Tensor) -> Tensor:
    size = (like.shape[2], like.shape[3])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _check_images(images: Tensor) -> None:
    if images.dim() != 4:
        raise ValueError(f"images: expected [B, 3, H, W], got shape {list(images.shape)}")
    if images.shape[1] != 3:
        raise ValueError(f"images: expected 3 channels in [B, 3, H, W], got {images.shape[1]}")
    if not images.is_floating_point():
        raise ValueError(f"images: expected a floating-point dtype, got {images.dtype}")
    if images.shape[2] < 1 or images.shape[3] < 1:
        raise ValueError(f"images: expected H, W >= 1, got shape {list(images.shape)}")
