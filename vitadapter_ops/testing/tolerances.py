# SPDX-License-Identifier: Apache-2.0
"""Every numerical tolerance of the tests, and where it comes from."""

from __future__ import annotations

import torch
from torch import Tensor

# A backend may be this many times further from the fp64 result than eager torch at its dtype.
EAGER_FACTOR = 2.0

# ... plus this many units in the last place of the largest result, for the cases in which eager
# torch happens to be exact. One unit is one rounding of the output.
FLOOR_ULPS = 2.0

# fp64 against an independent fp64 definition: both sum at most 5 x 11 points of 4 corners in their
# own order; measured at most 3 units in the last place of the largest result.
DEFINITION_ULPS = 16.0

# Gradients in fp64 on the CPU against the reference: the same products, added in another order
# (torch's over channels; the reference adds corner after corner to the gradient of value). Measured
# over 36 shapes in three instruction sets: at most 4.8 units.
CPU_FP64_ULPS = 8.0

# Derivatives by torch of the definition against those by the backward kernels, in fp64: the same
# products in another order, through further functions that sum hundreds of them. Measured over
# tests/ops/test_derivatives.py: at most 24 units.
DERIVATIVE_ULPS = 64.0

# A model's module against the project's own: gradients of parameters are sums over all queries, in
# which whoever rounds luckily wins. Measured over tests/integrations: at most 7 units.
DROP_IN_ULPS = 16.0

# ... and in fp64, where both sum a hundred products through four Linear layers in their own order.
DROP_IN_FP64_ULPS = 256.0

# Gradients under bf16 autocast, as a share of their length: an offset that bf16 rounds across a
# pixel's centre line takes the slope of the neighbouring pixels, in ours and in the original alike
# but not for the same points. Measured over tests/integrations: at most 0.18, for either of them.
CROSSINGS_SHARE = 0.25

# The fused operator given offsets and logits in bf16, against fp64: this many times the error of
# rounding these once and computing all else exactly. Measured on maps 64 to 512 wide: 1.000002.
ROUNDED_ONCE_FACTOR = 1.2

# Losses of a model in fp32 with its own attention and with ours, over two steps of training.
MODEL_LOSS_SHARE = 1e-5

# ... and the gradient of each parameter, as a share of its length. Measured over 15 models of
# transformers: at most 1.6e-6.
MODEL_GRADIENT_SHARE = 1e-5

# ... beyond this share of the length of all gradients together, for parameters whose true gradient
# is zero, such as biases before a normalisation. Measured over the same models: at most 1.2e-8.
MODEL_GRADIENT_FLOOR = 1e-7

# A step of training in fp64 spread over processes against one process's, as a share of the length
# of each parameter and output: the same terms in another order. Measured over attention_steps.py:
# at most 2e-16.
SPREAD_FP64_SHARE = 1e-12

# ... in bf16, which rounds offsets across the centre lines of pixels and so changes their gradients
# (parameters; measured at most 0.036), and offsets to 2^-8 pixels and values likewise (outputs;
# 0.010).
SPREAD_BF16_PARAMETER_SHARE = 1e-1
SPREAD_BF16_OUTPUT_SHARE = 5e-2

# Another implementation's output against ours, as a share of the largest value, beyond which a
# benchmark says that they disagree. Loose: one that computes locations in bf16 is off by a quarter
# of a pixel on large maps, which is its users' concern; wrong levels or axes are off by far more.
RIVAL_SHARE = 0.05

# An image in a padded batch against the image alone: the largest difference as a share of the map's
# root mean square. Sizes of the batch round sampling locations, in fp32 also for fp64, and order
# sums. Measured over tests/model/test_padding_mask.py: at most 1.3e-6, 4e-7 and, mostly, nothing;
# with vit_adapter_small in fp32 at 512 pixels 5.6e-6. bf16 rounds to 4e-3.
PADDED_SHARE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.05}

# ... and of the gradient of each parameter in fp64, as a share of its length; measured 3.2e-7.
PADDED_GRADIENT_SHARE = 1e-5

# A model's maps against its maps in fp64, as a share of each map's largest value: some 40 layers of
# fp32, or of bf16 products under autocast.
MAP_SHARE = {torch.float32: 1e-4, torch.bfloat16: 0.1}

# Another project's whole model with its own attention and with ours, in fp32, as a share of the
# largest value: beyond it a benchmark prints no ratio of times.
DROP_IN_MODEL_SHARE = 1e-4

# For torch.testing.assert_close. Two ways to one fp32 result of a few products, as a module and its
# merged, traced or quantised self: units in the last place of values around 1, 6e-8 each.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# ... of sums over hundreds of terms in another order, such as gradients of weights.
CLOSE_SUMS = {"rtol": 1e-4, "atol": 1e-5}
# ... of a whole model, or of positions resized by another library's arithmetic.
CLOSE_MODELS = {"rtol": 1e-4, "atol": 1e-4}
# ... of values far below 1.
CLOSE_SMALL = {"rtol": 1e-4, "atol": 1e-6}
CLOSE_DERIVATIVES = {"rtol": 1e-5, "atol": 1e-6}
# The same values; NaN and another dtype are no equal ones.
EQUAL = {"rtol": 0.0, "atol": 0.0}
# An exported fp16 program against eager fp16: one rounding, 2^-10 of values around 1.
CLOSE_EXPORTED_16_BITS = {"rtol": 2**-10, "atol": 2**-10}
# Two runs on a GPU, whose atomics add in another order, in 16 bits.
CLOSE_ON_GPU = {"rtol": 2e-2, "atol": 1e-3}
# bf16 on maps of thousands of pixels, whose coordinates in fp32 leave a thousandth of a pixel.
CLOSE_FAR_AWAY = {"rtol": 2e-2, "atol": 2e-2}


def close_to_largest(expected: Tensor) -> dict[str, float]:
    """Of gradients of a whole foreign model in fp32, as a share of the largest of each."""
    return {"rtol": 1e-3, "atol": 1e-3 * expected.abs().max().item()}


def eps(dtype: torch.dtype) -> float:
    """One unit in the last place of 1."""
    return torch.finfo(dtype).eps


class Inaccurate(AssertionError):
    """A result whose error is beyond its bound, `times` the bound (infinite where that is 0)."""

    def __init__(self, message: str, error: float, bound: float) -> None:
        super().__init__(message)
        self.times = error / bound if bound else float("inf")


def require(condition: bool, message: str) -> None:
    """An assertion that `python -O` keeps.

    Raises:
        AssertionError: the condition does not hold.
    """
    if not condition:
        raise AssertionError(message)


def assert_as_accurate_as_eager(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, ulps: float = FLOOR_ULPS
) -> None:
    """Holds `got` to EAGER_FACTOR times the error of `eager`.

    Args:
        name: of the result, for errors.
        got: the result, any shape and floating dtype.
        eager: eager torch's, of the same shape.
        exact: the fp64 result, of the same shape.
        ulps: what is allowed beyond, in units in the last place of the largest of `exact`.

    Raises:
        AssertionError: another shape, or not finite.
        Inaccurate: the error is beyond its bound.
    """
    shapes = list(got.shape), list(exact.shape)
    require(shapes[0] == shapes[1], f"{name}: shape {shapes[0]}, not {shapes[1]}")
    require(bool(got.isfinite().all()), f"{name}: not finite")
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    floor = ulps * eps(got.dtype) * exact.abs().max().item()
    bound = EAGER_FACTOR * eager_error + floor
    if not error <= bound:
        raise Inaccurate(
            f"{name}: error {error:.3g}, eager torch's {eager_error:.3g}, floor {floor:.3g}",
            error,
            bound,
        )


def assert_same_definition(
    name: str, got: Tensor, exact: Tensor, ulps: float = DEFINITION_ULPS
) -> None:
    """Holds an fp64 result to another fp64 result."""
    dtypes = {got.dtype, exact.dtype}
    require(dtypes == {torch.float64}, f"{name}: expected float64, got {dtypes}")
    bound = ulps * eps(torch.float64) * max(exact.abs().max().item(), 1e-300)
    error = (got - exact).abs().max().item()
    require(error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}")


def assert_close_but_for_crossings(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Holds a bf16 gradient to CROSSINGS_SHARE beyond EAGER_FACTOR times the error of `eager`."""
    require(bool(got.isfinite().all()), f"{name}: not finite")
    error = (got.double() - exact).norm().item()
    eager_error = (eager.double() - exact).norm().item()
    bound = EAGER_FACTOR * eager_error + CROSSINGS_SHARE * exact.norm().item()
    require(error <= bound, f"{name}: error {error:.3g}, eager torch's {eager_error:.3g}")


def assert_map_agrees(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Holds a map to fp64's; `dtype` is what the model's products are in."""
    share = ((got.double() - exact).abs().max() / exact.abs().max()).item()
    assert share <= MAP_SHARE[dtype], (
        f"{name} is off by {share:.2g} of its largest value, allowed {MAP_SHARE[dtype]:g}"
    )


def assert_gradients_of_models_agree(
    name: str, got: Tensor, expected: Tensor, whole: Tensor
) -> None:
    """Holds a parameter's gradient to the original's; `whole` is the length of all gradients."""
    error = (got - expected).norm().item()
    bound = MODEL_GRADIENT_SHARE * expected.norm().item() + MODEL_GRADIENT_FLOOR * whole.item()
    require(error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}")
