# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention as a module, with the parameters published models have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from ._names import rename
from .functional import ms_deform_attn_from_offsets
from .linear import is_plain, is_plain_tensor, linear, project, warn_if_slow_autocast


def offsets_and_logits(module: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
    """Both projections of the query, as one matrix product where they are plain Linear layers.

    One product reads the query once: 1.0 to 1.3 times as fast forward, 1.0 to 1.5 times with the
    backward on a CPU (benchmarks/op/fused.py). The operator reads the slices where they lie.

    Args:
        module: has the layers `sampling_offsets` and `attention_weights`.
        query: [B, Q, C].

    Returns:
        Offsets [B, Q, M * K * 2] and logits [B, Q, M * K].
    """
    layers: list[Any] = [
        module.get_submodule(name) for name in ("sampling_offsets", "attention_weights")
    ]
    if not all(map(is_plain, layers)) or not _can_join(*(layer.weight for layer in layers)):
        offsets, logits = (layer(query) for layer in layers)
        return offsets, logits
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    offsets, logits = torch.split(
        linear(query, weight, bias), [layer.weight.shape[0] for layer in layers], -1
    )
    return offsets, logits


def _can_join(first: Tensor, second: Tensor) -> bool:
    """Whether torch.cat joins two weights as they are.

    It would widen the narrower of them, and refuses the other type of 16 bits under autocast.
    """
    if (
        first.dtype != second.dtype
        or first.device != second.device
        or first.shape[1:] != second.shape[1:]
    ):
        return False
    return (
        first.dtype == torch.float32
        or not _autocasts(first.device)
        or first.dtype == torch.get_autocast_dtype(first.device.type)
    )


def _autocasts(device: torch.device) -> bool:
    # Some devices have no autocast, and refuse to say so.
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def initial_offsets(heads: int, points: Sequence[int]) -> Tensor:
    """The published initial offsets [M * sum(points) * 2]: a ray of 1, 2, ... pixels a head.

    One direction per head, scaled so that its larger coordinate is 1. Computed in fp32 on the CPU,
    so that any dtype and device gets the same.

    Args:
        heads: attention heads, M.
        points: sampling points of each head on each level.
    """
    angle = torch.arange(heads, dtype=torch.float32, device="cpu") * (2.0 * math.pi / heads)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.cat([torch.arange(1, count + 1, device="cpu") for count in points])
    return (direction[:, None] * steps[:, None]).flatten()


# The operator's arguments in the words of MSDeformAttn.forward, and of its layers.
_NAMES = {
    "value": "input_flatten",
    "spatial_shapes": "input_spatial_shapes",
    "level_start_index": "input_level_start_index",
    "padding_mask": "input_padding_mask",
    "attention_logits": "attention_weights",
}


def _check_ratio(ratio: Any) -> None:
    """Raises TypeError or ValueError unless it is a positive finite number."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise TypeError(f"ratio: expected a number, got {ratio!r}")
    try:
        finite = 0 < float(ratio) < math.inf
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"ratio: expected a positive finite number, got {ratio}")


def check_projected(
    name: str, tensor: Tensor, layer_name: str, layer: nn.Module, error: RuntimeError
) -> None:
    """Says so where a projection failed because its input has another dtype or device.

    Raises:
        ValueError: from the projection's error.
    """
    weight: Any = getattr(layer, "weight", None)
    if not is_plain_tensor(weight):
        return
    source = f"{layer_name}.weight"
    try:
        _checks.device(name, tensor, weight.device, source)
        # Autocast takes any two of those that it converts.
        converted = {*_checks.FLOATING} - {torch.float64}
        if not (_autocasts(weight.device) and converted >= {tensor.dtype, weight.dtype}):
            _checks.dtype(name, tensor, (weight.dtype,), f" (that of {source})")
    except ValueError as known:
        raise known from error


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its four projections (Zhu et al., ICLR 2021, sec. 4.1).

    The state_dict keys, shapes and initialisation are those of Deformable DETR: Linear layers
    `sampling_offsets`, `attention_weights`, `value_proj` and `output_proj`. Initially the points of
    a head lie on a ray, 1 to n_points pixels from the reference, all with equal weight.

    Args:
        d_model: channels of the queries and of the input, C.
        n_levels: feature levels, L.
        n_heads: attention heads, M; divides d_model and int(ratio * d_model).
        n_points: sampling points of each head on each level, P.
        ratio: width of the values relative to d_model (ViT-Adapter uses 0.5 in its larger models).

    Raises:
        TypeError: an argument is not a number, or not an integer where one is expected.
        ValueError: an argument is not positive, or n_heads does not divide the widths.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        ratio: float = 1.0,
    ) -> None:
        super().__init__()
        d_model = _checks.positive("d_model", d_model)
        n_levels = _checks.positive("n_levels", n_levels)
        n_heads = _checks.positive("n_heads", n_heads)
        n_points = _checks.positive("n_points", n_points)
        _check_ratio(ratio)
        d_value = int(ratio * d_model)
        if d_model % n_heads or d_value % n_heads or d_value == 0:
            raise ValueError(
                f"n_heads: expected a divisor of d_model = {d_model} and of "
                f"int(ratio * d_model) = {d_value}, got {n_heads}"
            )
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.ratio = ratio
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_value)
        self.output_proj = nn.Linear(d_value, d_model)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(
                initial_offsets(self.n_heads, [self.n_points] * self.n_levels)
            )
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: _checks.SpatialShapes,
        input_level_start_index: Sequence[int] | Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends from `query` to sampled points of `input_flatten`.

        Locations and softmax are computed in fp32 (fp64 for fp64) whatever the precision of the
        projections, inside `ms_deform_attn_from_offsets`, so that autocast and half precision lose
        no sampling accuracy. Sizes given as Python integers cost no synchronisation.

        Args:
            query: [B, Q, C].
            reference_points: [B or 1, Q, L or 1, 2]: (x, y) as fractions, offsets in pixels of the
                level; or [..., 4]: boxes (x, y, w, h), offsets in units of half a box per point.
            input_flatten: [B, S, C], the levels concatenated.
            input_spatial_shapes: (H, W) of each level; a tensor [L, 2] costs a synchronisation.
            input_level_start_index: first pixel of each level along S; None: consecutive levels.
            input_padding_mask: [B, S] bool, True where the input is padding and reads as zero.

        Returns:
            [B, Q, C].

        Raises:
            TypeError: an argument that should be a tensor is none.
            ValueError: shapes, dtypes or devices disagree (names the argument, expected and got).
        """
        for name, tensor in (("query", query), ("input_flatten", input_flatten)):
            _checks.is_tensor(name, tensor)
            _checks.rank(name, tensor, "B, Q, C" if name == "query" else "B, S, C")
        batch, queries, _ = query.shape
        pixels = input_flatten.shape[1]
        _checks.shape("query", query, (batch, queries, self.d_model), "d_model")
        _checks.shape("input_flatten", input_flatten, (batch, pixels, self.d_model), "query")
        try:
            value = project(self.value_proj, input_flatten)
            offsets, logits = offsets_and_logits(self, query)
        except RuntimeError as error:
            # Any input that a projection takes is right: it may hold weights of 8 bits, or cast.
            check_projected("input_flatten", input_flatten, "value_proj", self.value_proj, error)
            check_projected("query", query, "sampling_offsets", self.sampling_offsets, error)
            raise
        points = self.n_levels * self.n_points
        try:
            # What is not the module's own, the operator checks.
            _checks.level_count(input_spatial_shapes, self.n_levels, "n_levels")
            out = ms_deform_attn_from_offsets(
                # Not -1 for the channels: no pixels have any number of them.
                value.view(batch, pixels, self.n_heads, value.shape[2] // self.n_heads),
                input_spatial_shapes,
                reference_points,
                offsets.view(batch, queries, self.n_heads, points, 2),
                logits.view(batch, queries, self.n_heads, points),
                level_start_index=input_level_start_index,
                padding_mask=input_padding_mask,
            )
        except (TypeError, ValueError) as error:
            rename(error, _NAMES)
            raise
        assert isinstance(out, Tensor)  # no weights were asked for
        if out.requires_grad:
            warn_if_slow_autocast(out)
        return project(self.output_proj, out)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"d_model={self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, "
            f"n_points={self.n_points}, ratio={self.ratio}"
        )
