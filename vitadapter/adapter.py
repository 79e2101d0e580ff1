# SPDX-License-Identifier: Apache-2.0
"""ViT-Adapter: a plain ViT, a spatial prior and their interactions give four feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_ops import MSDeformAttn

from . import images as image_tools
from .backbones.beit import BEiT
from .backbones.plain_vit import PlainViT
from .backbones.protocol import Backbone, Grid, Step, check_backbone
from .backbones.uniperceiver import UniPerceiver
from .config import (
    COARSEST_STRIDE,
    NUM_MAPS,
    AdapterConfig,
    ModelConfig,
    backbone_arguments,
    check_options,
    field_names,
)
from .layers.attention import build_attention
from .layers.attention.deformable import reference_points
from .layers.bilinear import add_bilinear
from .layers.interaction import (
    Extractor,
    Geometry,
    Injector,
    Interaction,
    embed_levels,
    to_maps,
)
from .layers.spatial_prior import SpatialPriorModule
from .layers.upsample import Upsample
from .pyramid import FeaturePyramid
from .ragged import RaggedBatch
from .registry import builds

# What `ViTAdapter` adds to a backbone.
ADAPTER_PARTS = ("level_embed", "spm", "interactions", "up", "norm1", "norm2", "norm3", "norm4")
# Options of `around` and `from_timm`: what the backbone does not say, and is no argument of theirs.
_OPTIONS = [
    name
    for name in field_names(AdapterConfig)
    if name not in ("task", "embed_dim", "depth", "patch_size", "in_chans")
]


class ViTAdapter(FeaturePyramid):
    """Vision Transformer Adapter for dense predictions (Chen et al., ICLR 2023, sec. 3).

    This class is the adapter. `create_model` combines it with a published backbone, such that the
    state_dict has the keys of the released ones without their `backbone.` prefix; `around` and
    `from_timm` build it around any other plain vision transformer, whose keys then start with
    `backbone.`.

    Attributes:
        config: all choices.
        embed_dim: channels of each output map.
        strides: strides of the output maps in pixels.
    """

    own_parts = ADAPTER_PARTS
    depth: int
    # To what the ViT's images are padded; the pyramid's always to a multiple of 32.
    vit_multiple = COARSEST_STRIDE

    @staticmethod
    def around(backbone: Backbone, *, task: str, **options: Any) -> ViTAdapter:
        """Builds an adapter around a vision transformer of yours.

        Args:
            backbone: a module that follows the protocol `vitadapter.backbones.Backbone`. It becomes
                the submodule `backbone`, unmodified.
            task: "detection" or "segmentation": where the ViT features of the output come from, see
                `AdapterConfig`. Windows are the backbone's own business.
            **options: other fields of `AdapterConfig`. The blocks are divided into four shares
                (`vitadapter.config.shares`). Heads and deform_ratio follow the published sizes: up
                to a width of 384 six heads of the whole width, or of 32 channels where six do not
                divide it; in larger models values of half the width, 32 channels per head.

        Returns:
            The model in training mode; the adapter's weights are fresh.

        Raises:
            TypeError: the backbone does not follow the protocol; the message says in what.
            ValueError: values are unknown, out of range or contradict each other.
        """
        if isinstance(backbone, FeaturePyramid):
            raise TypeError(
                f"backbone: expected a vision transformer alone, got {type(backbone).__name__}, "
                "which gives four maps already"
            )
        check_backbone(backbone)
        check_options(options, _OPTIONS, "the backbone's attributes say what the ViT is")
        return WrappedAdapter(backbone, task=task, **options)

    @staticmethod
    def from_timm(
        name: str | nn.Module,
        *,
        task: str,
        pretrained: bool = False,
        img_size: int | tuple[int, int] | None = None,
        model_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> ViTAdapter:
        """Builds an adapter around a plain vision transformer of timm.

        The model is used as it is: its own parts run, its state_dict, under `backbone.model.`,
        stays loadable, and while the injectors' gammas are zero its tokens are bitwise those that
        timm computes. Images of any size are padded to whole patches for it.

        Args:
            name: the model's name in timm, for example "vit_base_patch14_reg4_dinov2.lvd142m"; or a
                model that timm made, with dynamic_img_size=True if it has that argument.
            task: as in `around`.
            pretrained: load timm's weights.
            img_size: for models of one image size, such as BEiT; None: the size timm gives them.
            model_args: further arguments for timm.create_model, such as in_chans or embed_dim.
            **options: as in `around`, for example `components="spm+extractor"` for a ViT that is
                not to be touched.

        Returns:
            The model in training mode; the adapter's weights are fresh.

        Raises:
            ModuleNotFoundError: timm is not installed.
            TypeError: name is neither a string nor a module, or is compiled.
            ValueError: timm's model is not a plain vision transformer, or options are wrong.
        """
        from .backbones.timm import TimmViT

        advice = "arguments for timm.create_model go into model_args"
        check_options(options, _OPTIONS, advice, ("pretrained", "img_size", "model_args"))
        backbone = TimmViT(
            name,
            pretrained=pretrained,
            img_size=img_size,
            model_args={} if model_args is None else model_args,
            with_norm=bool(options.get("norm_taps")),
        )
        return WrappedAdapter(backbone, task=task, **options)

    def _tap_norm(self) -> Step | None:
        """The ViT's final norm, where the configuration asks for it."""
        return None

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the feature pyramid.

        Images whose sides are not multiples of 32 are padded with zeros at the bottom and right,
        and each map is cropped to the part that the image covers. The result near those two edges
        therefore depends on the padding, and in training mode so do the batch statistics.

        Images of different sizes go into one batch with `vitadapter.pad_images` and its mask. Each
        then gets, to rounding, the maps that it gets alone; without a mask the padding is part of
        the images. Batch norms in training mode take their statistics over the whole batch, with
        zeros for the padding.

        Args:
            images: [B, C, H, W], floating point, normalised as in pre-training (`default_cfg`); any
                H, W of at least one patch. BEiT for segmentation serves one size.
            padding_mask: [B, H, W] bool, True where a pixel is padding: all rows below an image and
                all columns right of it; None: there is none. Its values are read, which on a GPU
                is a synchronisation. The ViT runs on the images of each size in turn.

        Returns:
            Four maps [B, embed_dim, ceil(H/s), ceil(W/s)] with strides s = 4, 8, 16, 32; of an
            image of h x w pixels, zero outside of the top left ceil(h/s) x ceil(w/s).

        Raises:
            TypeError: images or padding_mask is no tensor.
            ValueError: images has another rank, number of channels, an integer dtype, another dtype
                than the model, outside autocast, another device or layout, fewer pixels than one
                patch, or a size that the backbone does not serve. padding_mask has another shape,
                dtype or device or no such values, or they cannot be read: on the meta device, in
                torch.export and torch.jit.trace; or the adapter's attention is not deformable.
        """
        images = self._check(images)
        ragged = None if padding_mask is None else self._ragged(images, padding_mask)
        if ragged is not None:
            images = ragged.cleared(images, 1, 1)
        padded = image_tools.pad(images, COARSEST_STRIDE)
        vit_images = padded
        if self.vit_multiple != COARSEST_STRIDE:
            vit_images = image_tools.pad(images, self.vit_multiple)

        c1, *pyramid = self.spm(padded) if ragged is None else self.spm(padded, ragged)
        c = embed_levels(pyramid, self.level_embed)
        with self._vit_gradients():
            x, x_shape, steps = self._started(vit_images, ragged)
        geometry = self._geometry(padded, pyramid, vit_images, x_shape)
        if ragged is not None:
            geometry = self._with_padding(geometry, ragged)

        vit_tokens = []  # after each interaction
        prefix = self.num_prefix_tokens
        for blocks, interaction in zip(self.config.ranges, self.interactions, strict=True):
            own_steps = [steps[index] for index in blocks]
            x, c, tap = interaction(x, c, own_steps, geometry, prefix, self._tap_norm())
            vit_tokens.append(tap[:, prefix:])

        c2, c3, c4 = to_maps(c, geometry.c_shapes)
        maps = [self._upsampled(c2, c1).to(c.dtype), c2, c3, c4]
        if self.config.add_vit_feature:
            if not self.config.takes_each_interaction:
                vit_tokens = [vit_tokens[-1]] * NUM_MAPS
            for index, tokens in enumerate(vit_tokens):
                (vit_map,) = to_maps(tokens, [x_shape])
                maps[index] = self._add_resized(maps[index], vit_map.to(c.dtype), index)

        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        if ragged is not None:
            maps = self._cleared(maps, ragged)  # for the statistics of the norms
        maps = [norm(m) for norm, m in zip(norms, maps, strict=True)]
        if ragged is not None:
            maps = self._cleared(maps, ragged)
        return image_tools.crop(maps, self.strides, images)

    def _ragged(self, images: Tensor, padding_mask: Tensor) -> RaggedBatch:
        if self.config.attention != "deformable":
            raise ValueError(
                f'padding_mask: expected None with attention="{self.config.attention}", which has '
                "no mask, got a mask; call the model with images of one size at a time"
            )
        return RaggedBatch(padding_mask, images, self.patch_size)

    def _started(
        self, images: Tensor, ragged: RaggedBatch | None
    ) -> tuple[Tensor, Grid, Sequence[Step]]:
        # There is nothing to start the transformer with for the groups of no images.
        if ragged is None or not ragged.sizes:
            return self.start(images)
        return ragged.start(
            self.start,
            images,
            patch_size=self.patch_size,
            multiple=self.vit_multiple,
            prefix=self.num_prefix_tokens,
        )

    def _with_padding(self, geometry: Geometry, ragged: RaggedBatch) -> Geometry:
        x_padding = ragged.outside(geometry.x_shape, self.patch_size, self.vit_multiple)
        levels = zip(geometry.c_shapes, self.strides[1:], strict=True)
        c_padding = [ragged.outside(shape, s, COARSEST_STRIDE).flatten(1) for shape, s in levels]
        # Not _replace: torch.compile (2.11) loses what it returns.
        return Geometry(*geometry[:4], x_padding.flatten(1), torch.cat(c_padding, dim=1))

    def _cleared(self, maps: Sequence[Tensor], ragged: RaggedBatch) -> list[Tensor]:
        return [ragged.cleared(m, s, s) for m, s in zip(maps, self.strides, strict=True)]

    def _geometry(
        self, padded: Tensor, pyramid: Sequence[Tensor], vit_images: Tensor, x_shape: Grid
    ) -> Geometry:
        c_shapes = [(level.shape[2], level.shape[3]) for level in pyramid]
        x_points = reference_points([x_shape], padded.device)
        c_points = reference_points(c_shapes, padded.device)
        if self.vit_multiple != COARSEST_STRIDE:
            sides = [float(vit_images.shape[axis]) / float(padded.shape[axis]) for axis in (3, 2)]
            scale = x_points.new_tensor(sides)
            x_points, c_points = x_points * scale, c_points / scale
        return Geometry(x_shape, c_shapes, x_points, c_points)

    def _upsampled(self, c2: Tensor, c1: Tensor) -> Tensor:
        if type(self.up) is Upsample:
            return self.up.added_to(c1, c2)
        result: Tensor = c1 + self.up(c2)
        return result

    def _add_resized(self, base: Tensor, vit_map: Tensor, index: int) -> Tensor:
        """Adds the ViT's map, resized bilinearly, edges repeated, to output `index`."""
        h, w = base.shape[2], base.shape[3]
        vit_h, vit_w = (side * self.patch_size for side in vit_map.shape[2:])
        stride = self.strides[index]
        if self.vit_multiple == COARSEST_STRIDE or (h * stride, w * stride) == (vit_h, vit_w):
            # The first map is a sum that nobody else holds; the others are the pyramid's tokens.
            return add_bilinear(base, vit_map, in_place=index == 0)
        # The two cover different areas: sample at the centres of the output's pixels.
        points = reference_points([(h, w)], vit_map.device).view(1, h, w, 2)
        points = points * points.new_tensor([w * stride / vit_w, h * stride / vit_h])
        grid = (2 * points - 1).to(vit_map.dtype).expand(vit_map.shape[0], -1, -1, -1)
        return base + F.grid_sample(vit_map, grid, padding_mode="border", align_corners=False)

    def _add_adapter(self, config: AdapterConfig) -> None:
        """Makes everything besides the backbone; the last step of a subclass's constructor."""
        if not config.is_adapter:
            raise ValueError(
                'components, num_interactions: expected "full" or "spm+extractor" with at least '
                f"one interaction, got {config.components!r}, {config.num_interactions}; "
                "create_model builds the others as ViTBaseline"
            )
        dim = config.embed_dim
        self.config = config
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPriorModule(config.conv_inplane, dim, config.in_chans)
        self.interactions = build_interactions(config)
        self.up = Upsample(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.norm3 = nn.BatchNorm2d(dim)
        self.norm4 = nn.BatchNorm2d(dim)
        nn.init.normal_(self.level_embed)
        init_adapter(self.spm, self.interactions, self.up)
        self._freeze()


@builds("plain_vit", adapter=True)
class PlainViTAdapter(PlainViT, ViTAdapter):
    """The adapter with DeiT's and AugReg's ViT.

    Args:
        config: all choices; `create_model` fills it from a name.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(**backbone_arguments(config, PlainViT))
        self._add_adapter(config)


@builds("beit", adapter=True)
class BEiTAdapter(BEiT, ViTAdapter):
    """The adapter with BEiT or BEiTv2.

    Args:
        config: all choices; `create_model` fills it from a name.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(**backbone_arguments(config, BEiT))
        self._add_adapter(config)


@builds("uniperceiver", adapter=True)
class UniPerceiverAdapter(UniPerceiver, ViTAdapter):
    """The adapter with Uni-Perceiver's image encoder.

    Args:
        config: all choices; `create_model` fills it from a name.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(**backbone_arguments(config, UniPerceiver))
        self._add_adapter(config)


class WrappedAdapter(ViTAdapter):
    """The adapter around a separate module, see `ViTAdapter.around`."""

    def __init__(self, backbone: Backbone, *, task: str, **options: Any) -> None:
        super().__init__()
        dim = backbone.embed_dim
        ratio = options.pop("deform_ratio", 1.0 if dim <= 384 else 0.5)
        config = AdapterConfig(
            task=task,
            embed_dim=dim,
            depth=backbone.depth,
            patch_size=backbone.patch_size,
            in_chans=getattr(backbone, "in_chans", 3),
            deform_ratio=ratio,
            **{"adapter_heads": _default_heads(dim, ratio), "drop_path_rate": 0.0, **options},
        )
        if config.norm_taps and getattr(backbone, "norm", None) is None:
            raise ValueError("norm_taps: expected a backbone with a final norm, got one without")
        self.backbone = backbone
        self.embed_dim = dim
        self.depth = backbone.depth
        self.patch_size = backbone.patch_size
        self.num_prefix_tokens = backbone.num_prefix_tokens
        self.vit_multiple = backbone.patch_size
        self._add_adapter(config)

    def start(self, images: Tensor) -> tuple[Tensor, Grid, Sequence[Step]]:
        """Tokens, grid and blocks of the backbone, see `Backbone`.

        Raises:
            ValueError: they are not what the protocol says.
        """
        started = self.backbone.start(images)
        if not isinstance(started, tuple) or len(started) != 3:
            raise ValueError(
                f"backbone.start: expected tokens, grid and blocks, got {type(started).__name__}"
            )
        tokens, grid, steps = started
        if image_tools.is_symbolic(tokens):
            return tokens, grid, steps
        batch, _, height, width = images.shape
        h, w = height // self.patch_size, width // self.patch_size
        shape = (batch, self.num_prefix_tokens + h * w, self.embed_dim)
        if tokens.shape != shape or tuple(grid) != (h, w) or len(steps) != self.depth:
            raise ValueError(
                "backbone.start: expected tokens [B, P + h*w, D], the grid (h, w) and a callable "
                f"for each block, which are {list(shape)}, {(h, w)} and {self.depth}, got "
                f"{list(tokens.shape)}, {grid} and {len(steps)}"
            )
        return tokens, grid, steps

    @property
    def default_cfg(self) -> dict[str, Any]:
        """That of the backbone, where it has one."""
        known: Any = getattr(self.backbone, "default_cfg", {})
        return {name: known.get(name) for name in ("input_size", "mean", "std")}

    def _tap_norm(self) -> Step | None:
        backbone: Any = self.backbone
        return backbone.norm if self.config.norm_taps else None


def _default_heads(dim: int, ratio: float) -> int:
    """Heads of an adapter around a ViT of width `dim`, of which values have `ratio`."""
    if dim <= 384 and dim % 6 == 0:
        return 6
    value_width = int(dim * ratio)
    common = math.gcd(dim, value_width)
    divisors = [heads for heads in range(1, common + 1) if common % heads == 0]

    def suits(heads: int) -> tuple[int, int]:
        # Kernels read multiples of 8 channels fastest, then of 4; 32 are the published number.
        channels = value_width // heads
        return math.gcd(channels, 8), -abs(channels - 32)

    return max(divisors, key=suits)


def build_interactions(config: AdapterConfig) -> nn.ModuleList:
    """The interactions, fresh; without extractors where the components have none."""
    options: dict[str, Any] = {}
    if config.attention == "deformable":
        options = {"n_points": config.n_points, "ratio": config.deform_ratio}
    elif config.attention == "dense":
        options = {"naive": config.naive_attention}
    attention = partial(
        build_attention, config.attention, config.embed_dim, config.adapter_heads, **options
    )
    hidden = int(config.embed_dim * config.cffn_ratio) if config.with_cffn else None

    def injector() -> Injector | None:
        if config.components not in ("full", "spm+injector"):
            return None
        return Injector(config.embed_dim, attention, config.injector_init, config.norm_eps)

    def extractors(number: int) -> list[Extractor]:
        if not config.is_adapter:
            return []
        return [
            Extractor(config.embed_dim, attention, hidden, config.drop_path_rate, config.norm_eps)
            for _ in range(number)
        ]

    last = len(config.ranges) - 1
    return nn.ModuleList(
        Interaction(
            injector(),
            next(iter(extractors(1)), None),
            extractors(2 if index == last and config.use_extra_extractor else 0),
            freeze_vit=config.freeze_backbone,
            with_cp=config.with_cp,
        )
        for index in range(len(config.ranges))
    )


def init_adapter(*parts: nn.Module) -> None:
    """The published initialisation; norms keep their default of weight 1, bias 0."""
    for part in parts:
        part.apply(_init_layer)
        # Deformable attention has its own rule; it comes last because _init_layer touched it.
        for module in part.modules():
            if isinstance(module, MSDeformAttn):
                module._reset_parameters()


def _init_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
