# SPDX-License-Identifier: Apache-2.0
"""From tensors to a kernel's arguments. What depends on a configuration is prepared once for it.

A kernel is compiled for dtypes, M, D, L and P, but for no number of queries, images or pixels and
for no stride: those are run-time arguments whose values Triton's specialisation never sees, because
the kernels are compiled from an explicit signature (`source`), which is also what the tests compile
ahead of time. Nothing is tuned at import or at a call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from .. import _checks
from .._call_cache import CallCache
from ..reference import compute_dtype
from . import kernels, tuning

_INT32_END = 2**31

# Whether the kernels run in Triton's interpreter, on tensors of any device (TRITON_INTERPRET=1).
INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}

Needs = tuple[bool, bool, bool, bool]  # gradients of value, reference, points, weights


@dataclass(frozen=True)
class Configuration:
    """All that a kernel is compiled for.

    Attributes:
        needs: which gradients, for the backward; None for the forward.
        dtype: of value.
        points_dtype: of points and weights.
        heads: M.
        channels: D.
        points: of each level.
        vec: a power of two that divides D, the strides of value and its address, in elements.
        wide: whether offsets into one image may not fit int32.
        reference: None, or images beyond the first (1 or 0), levels, boxes (1 or 0).
        scaled: whether there is an offset scale.
        padded: whether there is a padding mask.
        softmax: whether the weights are returned, or have a gradient.
    """

    needs: Needs | None
    dtype: torch.dtype
    points_dtype: torch.dtype
    heads: int
    channels: int
    points: tuple[int, ...]
    vec: int
    wide: bool
    reference: tuple[int, int, int] | None = None
    scaled: bool = False
    padded: bool = False
    softmax: bool = False


@dataclass(frozen=True)
class Source:
    """A kernel with its signature, constants and options, ready to compile for a target."""

    kernel: Any
    signature: dict[str, Any]  # what is a constant is "constexpr"
    constants: dict[str, Any]
    aligned: dict[str, int]  # bytes that divide an argument's address
    options: dict[str, Any]
    rows: int

    @property
    def trailing(self) -> dict[str, Any]:
        """The constants that are no tensor left out: they follow all other arguments."""
        return {name: value for name, value in self.constants.items() if value is not None}

    def compile(self, target: Any) -> Any:
        """The compiled kernel. Needs no GPU."""
        names = list(self.signature)
        attributes = {
            (names.index(name),): [["tt.divisibility", number]]
            for name, number in self.aligned.items()
            if self.signature[name] != "constexpr"
        }
        made = ASTSource(self.kernel, self.signature, self.constants, attributes)
        return triton.compile(made, target=target, options=self.options)


def source(configuration: Configuration, backend: str, arch: object, warp: int) -> Source:
    """The kernel of a configuration, laid out for an architecture.

    Args:
        configuration: what to compute.
        backend: "cuda", "hip", ... as Triton's GPUTarget has it, like the next two.
        arch: see there.
        warp: see there.
    """
    c = configuration
    acc = compute_dtype(c.dtype)
    name, points_name, acc_name = _TYPES[c.dtype], _TYPES[c.points_dtype], _TYPES[acc]
    forward, backward = tuning.knobs(tuning.family(backend, arch), name, c.channels)
    needs = c.needs or (False, False, False, False)
    knobs, itemsize = forward, c.dtype.itemsize
    if needs[0]:
        # The gradient of value is added to in the type of arithmetic, which may be the wider one.
        knobs, itemsize = backward, acc.itemsize
    elif c.needs is not None:
        knobs = tuning.Knobs(backward.warps)
    fewest = min((count for count in c.points if count > 0), default=0)
    tiles = tuning.layout(knobs, warp, itemsize, c.channels, c.vec, fewest)

    def given(there: object, kind: str) -> str | None:
        return f"*{kind}" if there else None

    def gradient(index: int, kind: str) -> str | None:
        return given(needs[index], kind)

    index = "i64" if c.wide else "i32"
    inputs = {
        "value": f"*{name}",
        "points": f"*{points_name}",
        "weights": f"*{points_name}",
        "reference": given(c.reference, acc_name),
        "scale": given(c.scaled, acc_name),
        "padding": given(c.padded, "u8"),
    }
    # The level table is scalars, not a tensor: no copy to the device for each image size, nothing
    # for a CUDA graph to keep alive, and the kernel reads it like its other scalars, from constant
    # memory.
    sizes = kernels.Sizes(
        levels=("i32", "i32", index) * len(c.points),
        queries="i32",
        pixels="i64",
        value_b="i64",
        value_s=index,
        value_m="i64",
        points_b="i64",
        points_q="i32",
        weights_b="i64",
        weights_q="i32",
    )
    constants: dict[str, Any] = {"CONFIG": c, "LAYOUT": tiles}
    types: dict[str, Any]
    if c.needs is None:
        kernel = kernels.forward_kernel
        outputs = {"out": f"*{name}", "softmax": given(c.softmax, points_name)}
        types = inputs | outputs | {"sizes": sizes}
    else:
        kernel = kernels.backward_kernel
        grads = {"grad_out": f"*{name}", "grad_softmax": given(c.softmax, points_name)}
        outputs = {
            "grad_value": gradient(0, acc_name),
            "grad_points": gradient(2, points_name),
            "grad_weights": gradient(3, points_name),
            "grad_reference": gradient(1, acc_name),
        }
        types = grads | inputs | outputs | {"sizes": sizes}
    absent = dict.fromkeys(name for name, kind in types.items() if kind is None)
    signature = {name: kind or "constexpr" for name, kind in types.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = dict.fromkeys(types.keys() & {"out", "grad_out", "grad_value"}, 16)
    aligned["value"] = c.vec * c.dtype.itemsize
    # num_stages: there is no loop to pipeline. Fusing products with sums rounds less often.
    options = {"num_warps": tiles.warps, "num_stages": 1, "enable_fp_fusion": True}
    return Source(kernel, signature, absent | constants, aligned, options, tiles.rows)


@functools.cache
def _prepare(device: torch.device, *configuration: Any) -> tuple[int, Callable[..., None]]:
    """Queries of a program, and what launches the kernel: f(grid, *arguments)."""
    c = Configuration(*configuration)
    if INTERPRETED:
        interpreted = source(c, "interpreter", "interpreter", 32)

        def interpret(grid: int, *arguments: Any) -> None:
            interpreted.kernel[(grid,)](*arguments, **interpreted.trailing)

        return interpreted.rows, interpret

    target = triton.runtime.driver.active.get_current_target()
    made = source(c, target.backend, target.arch, target.warp_size)
    compiled = made.compile(target)
    constants = tuple(made.trailing.values())

    def launch(grid: int, *arguments: Any) -> None:
        compiled[grid, 1, 1](*arguments, *constants)

    return made.rows, launch


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a tensor's device the current one, where it is not."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    module = getattr(torch, device.type)
    if module.current_device() == device.index:
        return contextlib.nullcontext()
    return module.device(device)


# --- arguments ----------------------------------------------------------------------------------


def _levels(
    value: Tensor, spatial_shapes: Sequence[int], level_start_index: Sequence[int]
) -> tuple[int, ...]:
    """The level table as the kernels take it.

    Raises:
        ValueError: value is none that the kernels know, or one would read beyond it.
    """
    _checks.dense("value", value)
    _checks.rank("value", value, "B, S, M, D")
    _checks.dtype("value", value, _checks.FLOATING)
    return _table(value.shape[1], tuple(spatial_shapes), tuple(level_start_index))


@functools.lru_cache(maxsize=1024)
def _table(
    pixels: int, spatial_shapes: tuple[int, ...], level_start_index: tuple[int, ...]
) -> tuple[int, ...]:
    count = len(level_start_index)
    if len(spatial_shapes) != 2 * count:
        raise ValueError(
            f"spatial_shapes: expected {2 * count} sides (from level_start_index), "
            f"got {len(spatial_shapes)}"
        )
    levels: tuple[int, ...] = ()
    for level, start in enumerate(level_start_index):
        height, width = spatial_shapes[2 * level], spatial_shapes[2 * level + 1]
        if height < 1 or width < 1:
            raise ValueError(f"spatial_shapes[{level}]: expected H, W >= 1, got {height, width}")
        if start < 0 or start + height * width > pixels:
            raise ValueError(
                f"level_start_index[{level}]: expected {height} x {width} pixels (from "
                f"spatial_shapes) from it to lie inside the {pixels} of value, got {start}"
            )
        levels += (height, width, start)
    return levels


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, *dtypes: torch.dtype
) -> None:
    """The last line of defence, for whoever calls a raw operator.

    Raises:
        ValueError: layout, shape, device or dtype is none that the kernels know.
    """
    _checks.dense(name, tensor)
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != like.device:
        kinds = dict.fromkeys(map(str, dtypes))
        raise ValueError(
            f"{name}: expected {list(shape)} of {' or '.join(kinds)} on {like.device}, "
            f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )


def _aligned(tensor: Tensor, alignment: int) -> Tensor:
    """The tensor, or a contiguous copy of it that lies at a multiple of `alignment` bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % alignment == 0 else tensor.clone()


def _rows(tensor: Tensor, numbers: int) -> tuple[Tensor, int, int]:
    """A tensor of points with its strides over B and Q, in points of so many numbers.

    Only these two strides are free, and a point's numbers lie at a multiple of their size together;
    a tensor that is otherwise is copied.
    """
    if not (tensor.is_contiguous() or tensor[0, 0].is_contiguous()):
        tensor = tensor.contiguous()
    stride_b, stride_q = tensor.stride(0), tensor.stride(1)
    odd = (stride_b | stride_q | tensor.data_ptr() // tensor.element_size()) % numbers
    if odd or stride_q * tuning.MOST_ROWS >= _INT32_END:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        stride_b, stride_q = tensor.stride(0), tensor.stride(1)
    return tensor, stride_b // numbers, stride_q // numbers


@dataclass
class _Points:
    """What both operators' kernels sample: tensors, and what of them a kernel is compiled for."""

    points: Tensor  # [B, Q, M, ..., 2]
    weights: Tensor  # [B, Q, M, ...]
    counts: tuple[int, ...]
    reference: Tensor | None = None
    scale: Tensor | None = None
    padding: Tensor | None = None

    @property
    def boxes(self) -> tuple[int, int, int] | None:
        """Configuration.reference."""
        if self.reference is None:
            return None
        images, _, levels, width = self.reference.shape
        return int(images > 1), levels, int(width == 4)


def _run(
    value: Tensor,
    levels: tuple[int, ...],
    points: _Points,
    leading: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    needs: Needs | None,
    softmax: bool,
) -> tuple[Callable[..., None], int, tuple[Any, ...]] | None:
    """Launches a kernel: `leading` tensors, the inputs, `outputs`, and all else.

    Returns:
        What launches it, the grid, and what follows the tensors, all of which a call with tensors
        that lie alike has in common; None where tensors had to be copied.
    """
    given = (value, points.points, points.weights)
    batch, pixels, heads, channels = value.shape
    if value.stride(3) != 1:
        value = value.contiguous()
    value_b, value_s, value_m, _ = value.stride()
    # The lowest bit of all that must be divisible; an address counts in elements.
    size = value.element_size()
    bits = channels | value_b | value_s | value_m | (value.data_ptr() // size)
    vec = min(bits & -bits, 16 // size)
    furthest = max((pixels - 1) * value_s + channels, pixels * heads * channels)
    located, points_b, points_q = _rows(points.points, 2)
    weights, weights_b, weights_q = _rows(points.weights, 1)
    reference, scale, padding = points.reference, points.scale, points.padding
    queries = located.shape[1]
    device = value.device
    with _on(device):
        rows, launch = _prepare(
            device,
            needs,
            value.dtype,
            located.dtype,
            heads,
            channels,
            points.counts,
            vec,
            furthest >= _INT32_END,
            points.boxes,
            scale is not None,
            padding is not None,
            softmax,
        )
        grid = batch * heads * -(-queries // rows)
        sizes = kernels.Sizes(
            levels,
            queries,
            pixels,
            value_b,
            value_s,
            value_m,
            points_b,
            points_q,
            weights_b,
            weights_q,
        )
        tensors = (value, located, weights)
        launch(grid, *leading, *tensors, reference, scale, padding, *outputs, sizes)
    copied = any(a is not b for a, b in zip(given, tensors, strict=True))
    return None if copied else (launch, grid, sizes)


# Of the forward: a call whose tensors lie as those of an earlier one goes straight to its launch.
_known: CallCache[tuple[Callable[..., None], int, tuple[Any, ...]]] = CallCache()


def _key(tensors: Sequence[Tensor | None], *others: Any) -> tuple[Any, ...] | None:
    """All that checks and launch depend on; None for tensors without strides or an address."""
    try:
        return (
            *others,
            *(
                None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16)
                for t in tensors
            ),
        )
    except RuntimeError:
        return None


def _remember(
    key: tuple[Any, ...] | None,
    launched: tuple[Callable[..., None], int, tuple[Any, ...]] | None,
) -> None:
    if key is not None and launched is not None:
        _known[key] = launched


def _gradient(tensor: Tensor, needed: bool, empty: bool) -> Tensor:
    """Where a gradient is written to, or an empty tensor for one that is not needed."""
    if not needed:
        return tensor.new_empty((0,))
    return tensor.new_zeros(tensor.shape) if empty else tensor.new_empty(tensor.shape)


def _gradient_of_value(value: Tensor, needed: bool) -> Tensor:
    """Where it is added to; in the type of arithmetic."""
    return value.new_zeros(value.shape if needed else (0,), dtype=compute_dtype(value.dtype))


# --- ms_deform_attn -----------------------------------------------------------------------------


def _located(value: Tensor, levels: tuple[int, ...], locations: Tensor, weights: Tensor) -> _Points:
    _checks.rank("sampling_locations", locations, "B, Q, M, L, P, 2")
    batch, _, heads, _ = value.shape
    queries, points, count = locations.shape[1], locations.shape[4], len(levels) // 3
    shape = (batch, queries, heads, count, points)
    accepted = (value.dtype, compute_dtype(value.dtype))
    _expect("sampling_locations", locations, (*shape, 2), value, *accepted)
    _expect("attention_weights", weights, shape, value, locations.dtype)
    return _Points(locations, weights, (points,) * count)


def forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`reference.ms_deform_attn` by a Triton kernel."""
    tensors = (value, sampling_locations, attention_weights)
    key = _key(tensors, tuple(spatial_shapes), tuple(level_start_index))
    known = _known.get(key)
    if known is not None:
        batch, _, heads, channels = value.shape
        out = value.new_empty((batch, attention_weights.shape[1], heads * channels))
        launch, grid, sizes = known
        with _on(value.device):
            launch(grid, *tensors, None, None, None, out, None, sizes)
        return out
    levels = _levels(value, spatial_shapes, level_start_index)
    points = _located(value, levels, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    shape = (batch, attention_weights.shape[1], heads * channels)
    if attention_weights.numel() == 0:
        return value.new_zeros(shape)
    out = value.new_empty(shape)
    _remember(key, _run(value, levels, points, (), (out, None), None, False))
    return out


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    need_value: bool,
    need_locations: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.ms_deform_attn_backward` by a Triton kernel."""
    levels = _levels(value, spatial_shapes, level_start_index)
    points = _located(value, levels, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    shape = (batch, attention_weights.shape[1], heads * channels)
    _expect("grad_output", grad_output, shape, value, value.dtype)
    empty = attention_weights.numel() == 0
    grad_value = _gradient_of_value(value, need_value)
    grad_locations = _gradient(sampling_locations, need_locations, empty)
    grad_weights = _gradient(attention_weights, need_weights, empty)
    needs = (need_value, False, need_locations, need_weights)
    if not empty and any(needs):
        outputs = (
            grad_value if need_value else None,
            grad_locations if need_locations else None,
            grad_weights if need_weights else None,
            None,
        )
        _run(value, levels, points, (_aligned(grad_output, 16), None), outputs, needs, False)
    return grad_value.to(value.dtype), grad_locations, grad_weights


# --- ms_deform_attn_from_offsets ----------------------------------------------------------------


def _from_offsets(
    value: Tensor,
    levels: tuple[int, ...],
    points_per_level: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None,
    offset_scale: Tensor | None,
) -> _Points:
    _checks.rank("sampling_offsets", sampling_offsets, "B, Q, M, K, 2")
    _checks.rank("reference_points", reference_points, "B or 1, Q, L or 1, 2 or 4")
    batch, pixels, heads, _ = value.shape
    compute, count = compute_dtype(value.dtype), len(levels) // 3
    counts = tuple(points_per_level)
    if len(counts) != count or min(counts, default=0) < 0:
        raise ValueError(f"points_per_level: expected {count} numbers, got {list(counts)}")
    shape = (batch, sampling_offsets.shape[1], heads, sum(counts))
    _expect("sampling_offsets", sampling_offsets, (*shape, 2), value, value.dtype, compute)
    _expect("attention_logits", attention_logits, shape, value, sampling_offsets.dtype)
    images, _, boxes, width = reference_points.shape
    if images not in (1, batch) or boxes not in (1, count) or width not in (2, 4):
        raise ValueError(
            f"reference_points: expected [{batch} or 1, {shape[1]}, {count} or 1, 2 or 4], "
            f"got {list(reference_points.shape)}"
        )
    box = (images, shape[1], boxes, width)
    _expect("reference_points", reference_points, box, value, compute)
    if offset_scale is not None:
        _expect("offset_scale", offset_scale, shape[3:], value, compute)
        offset_scale = offset_scale.contiguous() if width == 4 else None
    if padding_mask is not None:
        _expect("padding_mask", padding_mask, (batch, pixels), value, torch.bool)
        padding_mask = padding_mask.contiguous().view(torch.uint8)
    return _Points(
        sampling_offsets,
        attention_logits,
        counts,
        _aligned(reference_points, 2 * reference_points.element_size()),
        offset_scale,
        padding_mask,
    )


def forward_from_offsets(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    points_per_level: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None,
    offset_scale: Tensor | None,
    return_weights: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.ms_deform_attn_from_offsets` by a Triton kernel."""
    tensors = (value, sampling_offsets, attention_logits, reference_points, offset_scale)
    key = None
    if padding_mask is None:
        levels_key = (*spatial_shapes, *level_start_index), tuple(points_per_level)
        key = _key(tensors, *levels_key, return_weights)
    # What else would have to be copied is not looked up.
    if key is not None and reference_points.is_contiguous():
        known = _known.get(key)
        if known is not None:
            batch, _, heads, channels = value.shape
            out = value.new_empty((batch, attention_logits.shape[1], heads * channels))
            weights = attention_logits.new_empty(attention_logits.shape if return_weights else (0,))
            launch, grid, sizes = known
            softmax = weights if return_weights else None
            with _on(value.device):
                launch(grid, *tensors, None, out, softmax, sizes)
            return out, weights
    levels = _levels(value, spatial_shapes, level_start_index)
    points = _from_offsets(
        value,
        levels,
        points_per_level,
        reference_points,
        sampling_offsets,
        attention_logits,
        padding_mask,
        offset_scale,
    )
    batch, _, heads, channels = value.shape
    shape = (batch, attention_logits.shape[1], heads * channels)
    weights = attention_logits.new_empty(attention_logits.shape if return_weights else (0,))
    if attention_logits.numel() == 0:
        return value.new_zeros(shape), weights
    out = value.new_empty(shape)
    outputs = (out, weights if return_weights else None)
    launched = _run(value, levels, points, (), outputs, None, return_weights)
    if points.reference is reference_points and points.scale is offset_scale:
        _remember(key, launched)
    return out, weights


def backward_from_offsets(
    grad_output: Tensor,
    grad_weights: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    points_per_level: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None,
    offset_scale: Tensor | None,
    need_value: bool,
    need_reference: bool,
    need_offsets: bool,
    need_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.ms_deform_attn_from_offsets_backward` by a Triton kernel."""
    levels = _levels(value, spatial_shapes, level_start_index)
    points = _from_offsets(
        value,
        levels,
        points_per_level,
        reference_points,
        sampling_offsets,
        attention_logits,
        padding_mask,
        offset_scale,
    )
    batch, _, heads, channels = value.shape
    shape = (batch, attention_logits.shape[1], heads * channels)
    _expect("grad_output", grad_output, shape, value, value.dtype)
    if grad_weights is not None:
        like = attention_logits
        _expect("grad_weights", grad_weights, like.shape, value, like.dtype)
        grad_weights = grad_weights.contiguous()
    empty = attention_logits.numel() == 0
    grad_value = _gradient_of_value(value, need_value)
    grad_reference = reference_points.new_zeros(reference_points.shape if need_reference else (0,))
    grad_offsets = _gradient(sampling_offsets, need_offsets, empty)
    grad_logits = _gradient(attention_logits, need_logits, empty)
    needs = (need_value, need_reference, need_offsets, need_logits)
    if not empty and any(needs):
        outputs = (
            grad_value if need_value else None,
            grad_offsets if need_offsets else None,
            grad_logits if need_logits else None,
            grad_reference if need_reference else None,
        )
        if not need_logits:
            grad_weights = None
        leading = (_aligned(grad_output, 16), grad_weights)
        _run(value, levels, points, leading, outputs, needs, grad_weights is not None)
    return grad_value.to(value.dtype), grad_reference, grad_offsets, grad_logits
