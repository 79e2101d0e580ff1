# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of MSDeformAttn get errors that speak of its own arguments."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from vitadapter_ops import MSDeformAttn
from vitadapter_ops._names import rename

RIGHT = {
    "query": torch.randn(2, 5, 16),
    "reference_points": torch.rand(2, 5, 1, 2),
    "input_flatten": torch.randn(2, 20, 16),
    "input_spatial_shapes": [(4, 4), (2, 2)],
    "input_level_start_index": [0, 16],
    "input_padding_mask": torch.zeros(2, 20, dtype=torch.bool),
}
OPERATORS_WORDS = re.compile(r"\b(value|spatial_shapes|level_start_index|padding_mask|logits)\b")
TENSORS = ("query", "reference_points", "input_flatten", "input_padding_mask")


def error_of(**changes):
    module = MSDeformAttn(16, 2, 2, 2)
    with pytest.raises((TypeError, ValueError)) as caught:
        module(**{**RIGHT, **changes})
    message = str(caught.value)
    assert not OPERATORS_WORDS.search(message), message
    return type(caught.value), message


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (name, wrong)
        for name in TENSORS
        for wrong in (None, [1.0], 5, "x", np.zeros(3))
        if not (wrong is None and name == "input_padding_mask")  # which means no mask
    ],
    ids=repr,
)
def test_what_is_no_tensor_is_named(name, wrong):
    kind, message = error_of(**{name: wrong})
    assert kind is TypeError
    assert message.startswith(f"{name}: expected a torch.Tensor, got ")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    "change",
    [lambda t: t.double(), lambda t: t.long(), lambda t: t.to("meta"), lambda t: t[0]],
    ids=["fp64", "int64", "meta", "rank"],
)
def test_wrong_tensors_are_named(name, change, grad):
    with torch.set_grad_enabled(grad):
        kind, message = error_of(**{name: change(RIGHT[name])})
    assert kind is ValueError
    assert message.startswith(f"{name}: expected ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"query": RIGHT["query"].double()},
            "query: expected dtype float32 (that of sampling_offsets.weight), got float64",
        ),
        (
            {"input_flatten": RIGHT["input_flatten"].to("meta")},
            "input_flatten: expected device cpu (from value_proj.weight), got meta",
        ),
        (
            {"input_spatial_shapes": [(4, 4)]},
            "input_spatial_shapes: expected 2 levels (n_levels), got 1",
        ),
        (
            {"input_spatial_shapes": [(4, 4), (2, -1)]},
            "input_spatial_shapes[1]: expected H, W >= 0, got (2, -1)",
        ),
        (
            {"input_level_start_index": [0, 17]},
            "input_level_start_index[1]: expected 2 x 2 pixels (from input_spatial_shapes) from it "
            "to lie inside the 20 of input_flatten, got 17",
        ),
        (
            {"input_padding_mask": torch.zeros(2, 19, dtype=torch.bool)},
            "input_padding_mask: expected [2, 20] (from B, S of input_flatten), got [2, 19]",
        ),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_message(changes, expected):
    assert error_of(**changes) == (ValueError, expected)


@pytest.mark.parametrize("name", ["input_spatial_shapes", "input_level_start_index"])
@pytest.mark.parametrize(
    "wrong",
    [5, "16", {4: 4, 2: 2}, list, torch.tensor(4), torch.zeros(2, 2, device="meta")],
    ids=repr,
)
def test_what_are_no_levels_is_named(name, wrong):
    kind, message = error_of(**{name: wrong})
    assert kind is (ValueError if isinstance(wrong, torch.Tensor) and wrong.dim() else TypeError)
    assert message.startswith(f"{name}: expected ")


def test_no_levels_at_all_are_named():
    assert error_of(input_spatial_shapes=None)[1].startswith("input_spatial_shapes: expected ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_that_autocast_converts_are_right(dtype):
    module = MSDeformAttn(16, 2, 2, 2).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for other in (torch.float32, torch.bfloat16, torch.float16):
            inputs = {**RIGHT, "query": RIGHT["query"].to(other)}
            assert module(**inputs).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"^query: expected dtype .*, got float64$"):
            module(**{**RIGHT, "query": RIGHT["query"].double()})


def test_other_errors_of_a_projection_are_left_alone():
    module = MSDeformAttn(16, 2, 2, 2)

    def fails(layer, inputs):
        raise RuntimeError("not enough memory for a value")

    module.value_proj.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match=r"^not enough memory for a value$"):
        module(**RIGHT)


@pytest.mark.parametrize("name", ["d_model", "n_levels", "n_heads", "n_points"])
@pytest.mark.parametrize(
    "wrong", ["16", 16.0, True, None, [16], np.True_, torch.tensor(True)], ids=repr
)
def test_what_is_no_integer_is_named(name, wrong):
    with pytest.raises(TypeError, match=f"^{name}: expected an integer, got "):
        MSDeformAttn(**{name: wrong})


@pytest.mark.parametrize("name", ["d_model", "n_levels", "n_heads", "n_points"])
@pytest.mark.parametrize("wrong", [0, -1])
def test_numbers_that_are_not_positive_are_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}: expected a positive number, got {wrong}$"):
        MSDeformAttn(**{name: wrong})


@pytest.mark.parametrize("wrong", ["1", True, None, 1j], ids=repr)
def test_a_ratio_that_is_no_number_is_named(wrong):
    with pytest.raises(TypeError, match=r"^ratio: expected a number, got "):
        MSDeformAttn(ratio=wrong)


@pytest.mark.parametrize("wrong", [0, -0.5, float("nan"), float("inf"), 10**400], ids=str)
def test_a_ratio_that_is_not_positive_and_finite_is_named(wrong):
    with pytest.raises(ValueError, match=r"^ratio: expected a positive finite number, got "):
        MSDeformAttn(ratio=wrong)


def test_integers_of_numpy_are_integers():
    module = MSDeformAttn(np.int64(16), np.int32(2), np.uint8(2), torch.tensor(2), np.float32(0.5))
    assert [type(n) for n in (module.d_model, module.n_heads, module.n_points)] == [int] * 3
    assert module.value_proj.out_features == 8
    assert module(**RIGHT).shape == (2, 5, 16)


def test_only_whole_names_are_replaced():
    error = ValueError("value: expected [2] (from key_value and value.shape), got value_")
    rename(error, {"value": "key", "shape": "form"})
    assert str(error) == "key: expected [2] (from key_value and key.form), got value_"
