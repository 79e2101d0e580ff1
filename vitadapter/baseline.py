# SPDX-License-Identifier: Apache-2.0
"""Plain ViTs with simple necks: what the adapter is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import images as image_tools
from .adapter import build_interactions, init_adapter
from .backbones.beit import BEiT
from .backbones.plain_vit import PlainViT
from .backbones.protocol import Grid
from .config import COARSEST_STRIDE, NECK_GROUPS, NUM_MAPS, ModelConfig, backbone_arguments
from .layers.attention.deformable import reference_points
from .layers.interaction import LAYER_NORM_EPS, Geometry, embed_levels, run, to_maps, to_tokens
from .layers.spatial_prior import SpatialPriorModule
from .layers.upsample import Upsample
from .pyramid import FeaturePyramid
from .registry import builds


class ViTBaseline(FeaturePyramid):
    """A plain ViT and necks that give its tokens four resolutions (paper tables 1 and 3).

    Each map comes from the end of another quarter of the blocks; with residual blocks (ViTDet, Li
    et al., ECCV 2022) all four come from the last one.

    The first two variants of table 6 are built on it: components="spm" adds the spatial prior's
    maps to the necks', "spm+injector" also injects the pyramid, as it is, before each quarter. No
    code was published for either. With these structures their parameters come out.

    Attributes:
        config: all choices.
        embed_dim: channels of each output map.
        strides: strides of the output maps in pixels.
    """

    own_parts = (
        *("level_embed", "spm", "interactions", "norm1", "norm2", "norm3", "norm4"),
        *("up1", "up2", "up3", "up4", "fpn1", "fpn2", "fpn3", "fpn4"),
    )
    config: ModelConfig
    taps: Sequence[int]

    def necks(self, tokens: list[Tensor], shape: Grid) -> list[Tensor]:
        """Four maps with strides 4, 8, 16, 32 from four times tokens [B, h*w, D]."""
        raise NotImplementedError

    def forward(
        self, images: Tensor, padding_mask: None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the feature pyramid.

        Args:
            images: as in `ViTAdapter`.
            padding_mask: `ViTAdapter` takes one; these models do not.

        Returns:
            Four maps [B, embed_dim, ceil(H/s), ceil(W/s)] with strides s = 4, 8, 16, 32.

        Raises:
            TypeError, ValueError: as in `ViTAdapter`.
        """
        if padding_mask is not None:
            raise ValueError(
                "padding_mask: expected None for a ViTBaseline, whose necks have no mask, got a "
                "mask; call the model with images of one size at a time"
            )
        images = self._check(images)
        padded = image_tools.pad(images, COARSEST_STRIDE)
        prior = self.spm(padded) if self.config.ranges else ()
        outputs = []  # of every block
        with self._vit_gradients():
            x, shape, steps = self.start(padded)
            inject = self._injection(padded, prior, shape)
            for index, step in enumerate(steps):
                x = run(step, inject(index, x), with_cp=self.config.with_cp)
                outputs.append(x)
        prefix = self.num_prefix_tokens
        maps = self.necks([outputs[tap][:, prefix:] for tap in self.taps], shape)
        if prior:
            maps = [m + p for m, p in zip(maps, prior, strict=True)]
        return image_tools.crop(maps, self.strides, images)

    def _injection(
        self, padded: Tensor, prior: Sequence[Tensor], shape: Grid
    ) -> Callable[[int, Tensor], Tensor]:
        """What happens to the tokens before block `index`."""
        if self.interactions is None:
            return lambda index, x: x
        pyramid = prior[1:]
        c = embed_levels(pyramid, self.level_embed)
        c_shapes = [(level.shape[2], level.shape[3]) for level in pyramid]
        geometry = Geometry(
            shape,
            c_shapes,
            reference_points([shape], padded.device),
            reference_points(c_shapes, padded.device),
        )
        injectors = {
            blocks.start: interaction
            for blocks, interaction in zip(self.config.ranges, self.interactions, strict=True)
        }

        def inject(index: int, x: Tensor) -> Tensor:
            if index in injectors:
                x, _, _ = injectors[index](x, c, [], geometry, self.num_prefix_tokens)
            return x

        return inject

    def _add_prior(self, config: ModelConfig) -> None:
        self.config = config
        self.interactions: nn.ModuleList | None = None
        if config.ranges:
            self.spm = SpatialPriorModule(config.conv_inplane, config.embed_dim, config.in_chans)
            init_adapter(self.spm)
        if config.ranges and config.components == "spm+injector":
            self.level_embed = nn.Parameter(torch.zeros(3, config.embed_dim))
            nn.init.normal_(self.level_embed)
            self.interactions = build_interactions(config)
            init_adapter(self.interactions)
            # Injectors alone read it.
            self.level_embed.requires_grad_(not config.freeze_backbone)
        self._freeze()


@builds("plain_vit", adapter=False)
class PlainViTBaseline(PlainViT, ViTBaseline):
    """The baseline with DeiT's and AugReg's ViT.

    Args:
        config: all choices; `create_model` fills it from a name.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(**backbone_arguments(config, PlainViT))
        dim = config.embed_dim
        self.taps = [config.depth - 1] * NUM_MAPS if config.residual_blocks else config.last_blocks
        if config.residual_blocks:
            # Which blocks have one was not published; ViTDet spaces its four evenly.
            for index in config.last_blocks:
                self.blocks[index].residual = ResidualBlock(dim)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm4 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.up1 = nn.Sequential(
            Upsample(dim), nn.GroupNorm(NECK_GROUPS, dim), nn.GELU(), Upsample(dim)
        )
        self.up2 = Upsample(dim)
        self.up3 = nn.Identity()
        self.up4 = nn.MaxPool2d(kernel_size=2, stride=2)
        init_adapter(self.up1, self.up2)
        self._add_prior(config)

    def necks(self, tokens: list[Tensor], shape: Grid) -> list[Tensor]:
        """Normalises and resizes."""
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        ups = (self.up1, self.up2, self.up3, self.up4)
        return [
            up(to_maps(norm(x), [shape])[0]) for up, norm, x in zip(ups, norms, tokens, strict=True)
        ]


@builds("beit", adapter=False)
class BEiTBaseline(BEiT, ViTBaseline):
    """The baseline with BEiT; its necks have a batch norm, and its tokens none.

    Args:
        config: all choices; `create_model` fills it from a name.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(**backbone_arguments(config, BEiT))
        dim, third = config.embed_dim, config.depth // 3
        # Published for both depths: [3, 5, 7, 11] and [7, 11, 15, 23].
        self.taps = [third - 1, config.depth // 2 - 1, 2 * third - 1, config.depth - 1]
        if config.depth == 12:
            self.taps[0] = 3
        self.fpn1 = nn.Sequential(Upsample(dim), nn.BatchNorm2d(dim), nn.GELU(), Upsample(dim))
        self.fpn2 = nn.Sequential(Upsample(dim))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)
        self._add_prior(config)

    def necks(self, tokens: list[Tensor], shape: Grid) -> list[Tensor]:
        """Resizes."""
        ups = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [up(to_maps(x, [shape])[0]) for up, x in zip(ups, tokens, strict=True)]


class ResidualBlock(nn.Module):
    """Bottleneck of three convolutions around which the input is added (ViTDet).

    It starts as the identity: the weight of its last norm is 0.

    Args:
        dim: channels; the bottleneck has half as many.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = dim // 2
        self.conv1 = nn.Conv2d(dim, width, kernel_size=1, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.act1 = nn.GELU()
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.act2 = nn.GELU()
        self.conv3 = nn.Conv2d(width, dim, kernel_size=1, bias=False)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor, shape: Grid) -> Tensor:
        """Maps tokens [B, h*w, D] of a grid `shape` = (h, w) to the same shape."""
        (y,) = to_maps(x, [shape])
        y = self.act1(_channel_norm(self.norm1, self.conv1(y)))
        y = self.act2(_channel_norm(self.norm2, self.conv2(y)))
        y = _channel_norm(self.norm3, self.conv3(y))
        return x + to_tokens([y])


def _channel_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
