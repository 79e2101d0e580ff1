# SPDX-License-Identifier: Apache-2.0
"""detrex's module, and GroundingDINO's.

    from vitadapter_ops.compat import msda
    msda.install("detrex._C"); msda.install("groundingdino._C")   # their code as it is

    from vitadapter_ops.compat.detrex import MultiScaleDeformableAttention    # without their code

Their own modules reach the extension on a GPU only; elsewhere they call
`multi_scale_deformable_attn_pytorch`, which `functions.patch_module` replaces.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._names import renamed
from . import _common, mmcv
from .functions import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

__all__ = [
    "GroundingDinoAttention",
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "multi_scale_deformable_attn_pytorch",
]


class MultiScaleDeformableAttention(mmcv.MultiScaleDeformableAttention):
    """detrex's `MultiScaleDeformableAttention`: mmcv's with other names in the constructor.

    Args:
        embed_dim: as embed_dims of mmcv's.
        num_heads: as there.
        num_levels: as there.
        num_points: as there.
        img2col_step: kept as the attribute im2col_step.
        dropout: as there.
        batch_first: as there.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive, or num_heads does not divide embed_dim.
    """

    @renamed(embed_dims="embed_dim")
    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        img2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
    ) -> None:
        _common.check_sizes(embed_dim=embed_dim, img2col_step=img2col_step)
        super().__init__(
            embed_dim, num_heads, num_levels, num_points, img2col_step, dropout, batch_first
        )
        self.embed_dim = embed_dim


class GroundingDinoAttention(MultiScaleDeformableAttention):
    """`MultiScaleDeformableAttention` of the groundingdino package: no dropout and no identity.

    Args:
        embed_dim: as embed_dims of mmcv's.
        num_heads: as there.
        num_levels: as there.
        num_points: as there.
        img2col_step: kept as the attribute im2col_step.
        batch_first: as there.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        img2col_step: int = 64,
        batch_first: bool = False,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, num_levels, num_points, img2col_step, 0.0, batch_first
        )

    @renamed(padding_mask="key_padding_mask")
    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: _common.SpatialShapes | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As mmcv's forward, without identity: the attention alone, shaped as query."""
        return mmcv.attention(
            self,
            query,
            query if value is None else value,
            query_pos,
            key_padding_mask,
            reference_points,
            spatial_shapes,
            level_start_index,
        )

    def freeze_sampling_offsets(self) -> None:
        """Stops the training of the offsets."""
        self.sampling_offsets.requires_grad_(False)

    def freeze_attention_weights(self) -> None:
        """Stops the training of the weights."""
        self.attention_weights.requires_grad_(False)
