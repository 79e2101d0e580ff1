# SPDX-License-Identifier: Apache-2.0
"""The layer that transformers' modules sample with, for the mappings of the kernels package.

from vitadapter_ops.compat.kernels import kernel_mapping
with use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
    kernelize(model, mode=Mode.INFERENCE, device="cpu")
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import _checks
from .._names import renamed
from . import _common

__all__ = ["MultiScaleDeformableAttention", "kernel_mapping"]


class MultiScaleDeformableAttention(nn.Module):
    """The layer that transformers calls by this name, for its kernels mapping too.

    It has no parameters and no state; `kernel_mapping` registers it.
    """

    can_torch_compile = True
    has_backward = True

    @renamed(spatial_shapes="value_spatial_shapes_list")
    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Samples `value`.

        Args:
            value: [B, S, M, D], the levels one after the other.
            value_spatial_shapes: [L, 2]; not read, the list says the same without a device read.
            value_spatial_shapes_list: (H, W) of each level.
            level_start_index: [L]; not read.
            sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions.
            attention_weights: [B, Q, M, L, P].
            im2col_step: any positive integer; not needed.

        Returns:
            [B, Q, M * D], dtype of value.

        Raises:
            TypeError: a tensor is none, or an argument of another kind.
            ValueError: sizes, dtypes or devices disagree, or im2col_step is not positive.
        """
        _checks.positive("im2col_step", im2col_step)
        return _common.sample(
            value, value_spatial_shapes_list, sampling_locations, attention_weights
        )


def kernel_mapping() -> dict[str, dict[str, _Layer]]:
    """Our layer for the `kernels` package, on CPUs and GPUs.

        from kernels import Mode, kernelize, use_kernel_mapping
        with use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
            kernelize(model, mode=Mode.INFERENCE, device="cpu")

    It replaces the layer alone, in one model; `transformers.patch_transformers` replaces the
    modules, which is faster, and keeps locations exact in 16-bit models.
    """
    return {"MultiScaleDeformableAttention": {"cpu": _Layer(), "cuda": _Layer(), "rocm": _Layer()}}


@dataclass(frozen=True)
class _Layer:
    """What `kernels` calls a repository: something that loads a layer."""

    layer_name: str = "MultiScaleDeformableAttention"

    def load(self) -> type[nn.Module]:
        """The layer's class."""
        return MultiScaleDeformableAttention
