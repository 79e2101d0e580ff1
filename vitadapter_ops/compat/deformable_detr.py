# SPDX-License-Identifier: Apache-2.0
"""Deformable DETR's module, and its copies in DINO, Mask2Former, ViT-Adapter, DINOv3 and others.

from vitadapter_ops.compat.deformable_detr import MSDeformAttn
# instead of: from ops.modules import MSDeformAttn
"""

from __future__ import annotations

from .. import modules
from .functions import MSDeformAttnFunction, ms_deform_attn_core_pytorch

__all__ = ["MSDeformAttn", "MSDeformAttnFunction", "ms_deform_attn_core_pytorch"]


class MSDeformAttn(modules.MSDeformAttn):
    """`vitadapter_ops.MSDeformAttn` with the attribute `im2col_step`, which nothing depends on.

    Constructor, forward and state_dict are those of the original, with `ratio` of ViT-Adapter and
    DINOv3.
    """

    im2col_step = 64
