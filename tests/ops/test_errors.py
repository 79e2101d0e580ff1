# SPDX-License-Identifier: Apache-2.0
"""Bad input: an error that names the argument, what was expected and what came."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from vitadapter_ops import (
    BackendUnavailable,
    MSDeformAttn,
    _calls,
    explain_backend,
    ms_deform_attn,
    ms_deform_attn_from_offsets,
)
from vitadapter_ops.testing import cases

CASE = cases.Case("errors", ((4, 6), (2, 3)))


def call(**changes):
    inputs = CASE.inputs().to(torch.float32)
    arguments = {
        "value": inputs.value,
        "spatial_shapes": inputs.spatial_shapes,
        "sampling_locations": inputs.sampling_locations,
        "attention_weights": inputs.attention_weights,
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return ms_deform_attn(**arguments)


BAD = {
    "value of rank 3": (
        {"value": lambda v: v.flatten(2)},
        r"value: expected 4 dimensions \[B, S, M, D\], got shape \[2, 30, 24\]",
    ),
    "locations of rank 5": (
        {"sampling_locations": lambda t: t.flatten(3, 4)},
        r"sampling_locations: expected 6 dimensions .* got shape \[2, 7, 3, 8, 2\]",
    ),
    "weights of rank 4": (
        {"attention_weights": lambda t: t.flatten(3)},
        r"attention_weights: expected 5 dimensions .* got shape \[2, 7, 3, 8\]",
    ),
    "weights for other points": (
        {"attention_weights": lambda t: t[..., :3]},
        r"attention_weights: expected \[2, 7, 3, 2, 4\] \(from sampling_locations\), "
        r"got \[2, 7, 3, 2, 3\]",
    ),
    "locations of another batch": (
        {"sampling_locations": lambda t: t[:1]},
        r"sampling_locations: expected \[2, 7, 3, 2, 4, 2\] .* got \[1, 7, 3, 2, 4, 2\]",
    ),
    "locations of other heads": (
        {"sampling_locations": lambda t: t[:, :, :2]},
        r"sampling_locations: expected \[2, 7, 3, 2, 4, 2\]",
    ),
    "locations with three coordinates": (
        {"sampling_locations": lambda t: torch.cat((t, t[..., :1]), -1)},
        r"sampling_locations: expected \[2, 7, 3, 2, 4, 2\] .* got \[2, 7, 3, 2, 4, 3\]",
    ),
    "locations with another number of levels": (
        {"spatial_shapes": [(5, 6)]},
        r"sampling_locations: expected \[2, 7, 3, 1, 4, 2\] \(from value and spatial_shapes\)",
    ),
    "levels that do not sum to S": (
        {"spatial_shapes": [(4, 6), (2, 2)]},
        r"spatial_shapes: expected levels with 30 pixels in all \(S of value\), got 28",
    ),
    "no levels": ({"spatial_shapes": []}, r"spatial_shapes: expected at least one level"),
    "a level of negative height": (
        {"spatial_shapes": [(-1, 6), (6, 6)]},
        r"spatial_shapes\[0\]: expected H, W >= 0, got \(-1, 6\)",
    ),
    "a level of floats": (
        {"spatial_shapes": [(4.0, 6.0), (2, 3)]},
        r"spatial_shapes: expected integers|spatial_shapes\[0\]: expected integers, got 4.0",
    ),
    "a flat list of sizes": (
        {"spatial_shapes": [4, 6]},
        r"spatial_shapes\[0\]: expected \(H, W\), got 4",
    ),
    "a float tensor of sizes": (
        {"spatial_shapes": torch.tensor([[4.0, 6.0], [2.0, 3.0]])},
        r"spatial_shapes: expected integers, got torch.float32",
    ),
    "a tensor of sizes of rank 1": (
        {"spatial_shapes": torch.tensor([4, 6])},
        r"spatial_shapes: expected a tensor \[L, 2\], got shape \[2\]",
    ),
    "a level that starts too late": (
        {"level_start_index": [0, 25]},
        r"level_start_index\[1\]: expected 2 x 3 pixels \(from spatial_shapes\) .* "
        r"the 30 of value, got 25",
    ),
    "a level that starts before the value": (
        {"level_start_index": [-1, 24]},
        r"level_start_index\[0\]: .* got -1",
    ),
    "too few starts": (
        {"level_start_index": [0]},
        r"level_start_index: expected 2 entries \(from spatial_shapes\), got 1",
    ),
    "integer value": (
        {"value": lambda v: v.long()},
        r"value: expected dtype float64, float32, float16, bfloat16, got int64",
    ),
    "integer locations": (
        {"sampling_locations": lambda t: t.int()},
        r"sampling_locations: expected dtype float32 .* got int32",
    ),
    "16-bit locations beside fp32 values": (
        {"sampling_locations": lambda t: t.bfloat16()},
        r"sampling_locations: expected dtype float32 \(that of value, or float32\), got bfloat16",
    ),
    "weights of another 16-bit type": (
        {"value": lambda v: v.half(), "attention_weights": lambda t: t.bfloat16()},
        r"attention_weights: expected dtype float16, float32 .* got bfloat16",
    ),
    "mixed devices": (
        {"attention_weights": lambda t: t.to("meta")},
        r"attention_weights: expected device cpu \(from value\), got meta",
    ),
    "a sparse value": (
        {"value": lambda v: v.to_sparse()},
        r"value: expected a dense tensor, got one of layout sparse_coo",
    ),
    "sparse weights": (
        {"attention_weights": lambda t: t.to_sparse()},
        r"attention_weights: expected a dense tensor, got one of layout sparse_coo",
    ),
    "nested weights": (
        {"attention_weights": torch.nested.nested_tensor([torch.zeros(7, 3), torch.zeros(5, 3)])},
        r"attention_weights: expected a dense tensor, got one of layout nested",
    ),
    "a value of 8 bits": (
        {"value": lambda v: v.to(torch.float8_e5m2)},
        r"value: expected dtype float64, float32, float16, bfloat16, got float8_e5m2",
    ),
    "complex locations": (
        {"sampling_locations": lambda t: t.to(torch.complex64)},
        r"sampling_locations: expected dtype float32 .* got complex64",
    ),
    "value on another device than the rest": (
        {"value": lambda v: v.to("meta")},
        r"sampling_locations: expected device meta \(from value\), got cpu",
    ),
    "no heads": (
        {"value": lambda v: v[:, :, :0], "sampling_locations": lambda t: t[:, :, :0]},
        r"value: expected M, D >= 1, got shape \[2, 30, 0, 8\]",
    ),
    "unknown backend": (
        {"backend": "cuda11"},
        r"backend: expected one of auto, cuda, triton, cpu, reference, got 'cuda11'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_good_input_passes():
    assert call().shape == (2, 7, 24)


KNOWN = {"fresh": _calls.forget, "after the same call": lambda: None}


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("name", ["value", "sampling_locations", "attention_weights"])
@pytest.mark.parametrize(("what", "got"), [([1.0], "list"), (None, "None"), (1.0, "float")])
def test_what_is_no_tensor(name, what, got, known):
    call()
    KNOWN[known]()
    with pytest.raises(TypeError, match=rf"^{name}: expected a torch.Tensor, got {got}"):
        call(**{name: what})


@pytest.mark.parametrize("known", KNOWN)
def test_a_sparse_tensor_is_refused_whatever_was_called_before(known):
    call()
    KNOWN[known]()
    with pytest.raises(ValueError, match=r"^sampling_locations: expected a dense tensor"):
        call(sampling_locations=lambda t: t.to_sparse())


@pytest.mark.parametrize("flag", [None, 1, "yes", torch.tensor(True)])
def test_return_weights_that_is_no_bool(flag):
    with pytest.raises(TypeError, match=r"^return_weights: expected a bool, got \w+"):
        call_from_offsets(return_weights=flag)


@pytest.mark.parametrize("backend", [["cpu"], None, 3, ("cpu",), {"cpu"}, b"cpu", np.zeros(2)])
def test_a_backend_that_is_no_name(backend):
    for function in (call, call_from_offsets):
        with pytest.raises(TypeError, match=r"^backend: expected a str, got \w+"):
            function(backend=backend)


def test_backend_that_cannot_run_says_why():
    message = r"backend 'cuda' cannot run: it needs tensors on cuda, these are on cpu"
    with pytest.raises(BackendUnavailable, match=message):
        call(backend="cuda")


def test_explain_backend_has_a_line_for_every_backend():
    text = explain_backend()
    assert "chosen by auto" in text
    for name in ("cuda", "triton", "cpu", "reference"):
        assert f"\n  {name} " in text


def test_raw_operator_never_reads_out_of_bounds():
    inputs = CASE.inputs().to(torch.float32)
    op = torch.ops.vitadapter_ops.ms_deform_attn
    value, locations, weights = inputs.tensors
    for shapes, starts in (
        ([4, 6, 2, 3], [0, 25]),
        ([4, 6, 2, 3], [-1, 24]),
        ([4, 6, 2, 300], [0, 24]),
        ([1 << 40, 1 << 40, 2, 3], [0, 24]),
        ([4, 6, 2], [0, 24]),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            op(value, shapes, starts, locations, weights)


OFFSET_CASE = cases.OffsetCase("errors", ((4, 6), (2, 3)), (4, 4), boxes=True, masked=True)


def call_from_offsets(**changes):
    inputs = OFFSET_CASE.inputs().to(torch.float32)
    arguments = {
        "value": inputs.value,
        "spatial_shapes": inputs.spatial_shapes,
        "reference_points": inputs.reference_points,
        "sampling_offsets": inputs.sampling_offsets,
        "attention_logits": inputs.attention_logits,
        "padding_mask": inputs.padding_mask,
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return ms_deform_attn_from_offsets(**arguments)


BAD_OFFSETS = {
    "value of rank 3": ({"value": lambda v: v.flatten(2)}, r"value: expected 4 dimensions"),
    "levels that do not sum to S": (
        {"spatial_shapes": [(4, 6), (2, 2)]},
        r"spatial_shapes: expected levels with 30 pixels",
    ),
    "offsets with a dimension for levels": (
        {"sampling_offsets": lambda t: t.unflatten(3, (2, 4))},
        r"sampling_offsets: expected 5 dimensions \[B, Q, M, K, 2\], "
        r"got shape \[2, 7, 3, 2, 4, 2\]",
    ),
    "offsets of another batch": (
        {"sampling_offsets": lambda t: t[:1]},
        r"sampling_offsets: expected \[2, 7, 3, 8, 2\] \(from value\), got \[1, 7, 3, 8, 2\]",
    ),
    "logits for other points": (
        {"attention_logits": lambda t: t[..., :7]},
        r"attention_logits: expected \[2, 7, 3, 8\] \(from sampling_offsets\), "
        r"got \[2, 7, 3, 7\]",
    ),
    "references of width 3": (
        {"reference_points": lambda t: t[..., :3]},
        r"reference_points: expected \[2 or 1, 7, 2 or 1, 2 or 4\], got \[2, 7, 2, 3\]",
    ),
    "references without levels": (
        {"reference_points": lambda t: t[:, :, 0]},
        r"reference_points: expected 4 dimensions \[B or 1, Q, L or 1, 2 or 4\]",
    ),
    "references of other queries": (
        {"reference_points": lambda t: t[:, :5]},
        r"reference_points: expected \[2 or 1, 7, 2 or 1, 2 or 4\], got \[2, 5, 2, 4\]",
    ),
    "integer offsets": (
        {"sampling_offsets": lambda t: t.long()},
        r"sampling_offsets: expected dtype float32, float16, bfloat16 .* got int64",
    ),
    "fp64 logits beside an fp32 value": (
        {"attention_logits": lambda t: t.double()},
        r"attention_logits: expected dtype float32, float16, bfloat16 \(beside a float32 value\), "
        r"got float64",
    ),
    "mixed devices": (
        {"attention_logits": lambda t: t.to("meta")},
        r"attention_logits: expected device cpu \(from value\), got meta",
    ),
    "a mask of floats": (
        {"padding_mask": lambda m: m.float()},
        r"padding_mask: expected dtype bool \(True where value is padding\), got float32",
    ),
    "a mask of another size": (
        {"padding_mask": lambda m: m[:, :29]},
        r"padding_mask: expected \[2, 30\] \(from B, S of value\), got \[2, 29\]",
    ),
    "points that do not add up": (
        {"points_per_level": [4, 3]},
        r"points_per_level: expected 2 numbers .* that add up to 8 "
        r"\(sampling_offsets.shape\[3\]\), got \[4, 3\]",
    ),
    "points of another number of levels": (
        {"points_per_level": [8]},
        r"points_per_level: expected 2 numbers .* got \[8\]",
    ),
    "negative points": ({"points_per_level": [9, -1]}, r"points_per_level: .* got \[9, -1\]"),
    "points that levels cannot share": (
        {
            "sampling_offsets": lambda t: t[:, :, :, :7],
            "attention_logits": lambda t: t[..., :7],
        },
        r"sampling_offsets: expected a multiple of 2 points .* got 7",
    ),
    "a scale beside points": (
        {"reference_points": lambda t: t[..., :2], "offset_scale": 0.5},
        r"offset_scale: expected None beside reference_points of width 2 .* got 0.5",
    ),
    "a scale for other points": (
        {"offset_scale": torch.ones(7)},
        r"offset_scale: expected \[8\] \(from one for each point of sampling_offsets\), got \[7\]",
    ),
    "a scale that is not a number": (
        {"offset_scale": float("nan")},
        r"offset_scale: expected a finite number in float32, got nan",
    ),
    "a scale beyond floats": (
        {"offset_scale": 10**400},
        r"offset_scale: expected a finite number in float32, got one too large for it",
    ),
    "a scale beyond fp32": (
        {"offset_scale": 1e39},
        r"offset_scale: expected a finite number in float32, got 1e\+39",
    ),
    "an integer too long to print": (
        {"offset_scale": 10**5000},
        r"offset_scale: expected a finite number in float32, got one too large for it",
    ),
    "a sparse scale": (
        {"offset_scale": torch.ones(8).to_sparse()},
        r"offset_scale: expected a dense tensor",
    ),
    "a sparse mask": (
        {"padding_mask": lambda m: m.to_sparse()},
        r"padding_mask: expected a dense tensor",
    ),
    "a scale on another device": (
        {"offset_scale": torch.ones(8, device="meta")},
        r"offset_scale: expected device cpu \(from value\), got meta",
    ),
    "a mask on another device": (
        {"padding_mask": lambda m: m.to("meta")},
        r"padding_mask: expected device cpu \(from value\), got meta",
    ),
    "unknown backend": ({"backend": "gpu"}, r"backend: expected one of auto, .* got 'gpu'"),
}


@pytest.mark.parametrize("name", BAD_OFFSETS)
def test_bad_input_of_the_fused_operator_names_the_argument(name):
    changes, message = BAD_OFFSETS[name]
    with pytest.raises(ValueError, match=message):
        call_from_offsets(**changes)


@pytest.mark.parametrize("name", ["sampling_offsets", "padding_mask", "offset_scale"])
def test_fused_arguments_that_are_no_tensors(name):
    with pytest.raises(TypeError, match=rf"{name}: expected .*torch.Tensor.*, got list"):
        call_from_offsets(**{name: [1.0]})


@pytest.mark.parametrize(
    "name", ["value", "reference_points", "sampling_offsets", "attention_logits"]
)
def test_fused_arguments_that_are_none(name):
    with pytest.raises(TypeError, match=rf"^{name}: expected a torch.Tensor, got None"):
        call_from_offsets(**{name: None})


def test_a_number_of_numpy_as_scale():
    expected = call_from_offsets(offset_scale=0.25)
    for number in (np.float32(0.25), np.float64(0.25), Fraction(1, 4)):
        assert torch.equal(call_from_offsets(offset_scale=number), expected)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_entry_of_the_scale_that_is_not_finite_places_its_point_nowhere(number, backend):
    device, name = backend
    inputs = OFFSET_CASE.inputs().to(torch.float64, device)
    scale = torch.full((8,), 0.25, dtype=torch.float64, device=device)
    value, reference, offsets, logits = inputs.tensors
    far = offsets.clone()
    far[:, :, :, 3] = float("inf")

    def compute(offsets, scale):
        offsets = offsets.clone().requires_grad_()
        out = ms_deform_attn_from_offsets(
            value,
            inputs.spatial_shapes,
            reference,
            offsets,
            logits,
            padding_mask=inputs.padding_mask,
            offset_scale=scale,
            backend=name,
        )
        return out, *torch.autograd.grad(out.sum(), offsets)

    expected = compute(far, scale)
    scale = scale.clone()
    scale[3] = number
    for got, want in zip(compute(offsets, scale), expected, strict=True):
        assert torch.equal(got, want)


def test_good_input_of_the_fused_operator_passes():
    assert call_from_offsets().shape == (2, 7, 24)
    assert call_from_offsets(offset_scale=0.25).shape == (2, 7, 24)


def test_raw_fused_operator_never_reads_out_of_bounds():
    inputs = OFFSET_CASE.inputs().to(torch.float32)
    op = torch.ops.vitadapter_ops.ms_deform_attn_from_offsets
    good = inputs.arguments
    assert op(*good, False)[0].shape == (2, 7, 24)
    for index, bad in (
        (1, [4, 6, 2, 300]),
        (2, [0, 25]),
        (3, [4, 5]),
        (3, [9, -1]),
        (4, inputs.reference_points[:, :5]),
        (4, inputs.reference_points[..., :3]),
        (5, inputs.sampling_offsets[:, :, :2]),
        (6, inputs.attention_logits[..., :7]),
        (7, inputs.padding_mask[:, :29]),
        (7, inputs.padding_mask.float()),
        (8, torch.ones(7)),
    ):
        arguments = [bad if i == index else argument for i, argument in enumerate(good)]
        with pytest.raises((RuntimeError, ValueError)):
            op(*arguments, False)


def test_explain_backend_of_what_is_no_dtype():
    with pytest.raises(TypeError, match=r"dtype: expected a torch.dtype, got 'fp32'"):
        explain_backend(dtype="fp32")


def test_explain_backend_of_an_unknown_operator():
    with pytest.raises(ValueError, match=r"op: expected one of ms_deform_attn, .* got 'attn'"):
        explain_backend(op="attn")


BAD_MODULES = {
    "heads that do not divide": ({"n_heads": 7}, r"n_heads: expected a divisor of d_model = 256"),
    "ratio that leaves no width": ({"ratio": 0.001}, r"int\(ratio \* d_model\) = 0"),
    "no points": ({"n_points": 0}, r"n_points: expected a positive number, got 0"),
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_bad_module_arguments(name):
    changes, message = BAD_MODULES[name]
    with pytest.raises(ValueError, match=message):
        MSDeformAttn(**changes)


BAD_FORWARDS = {
    "query width": ({"query": torch.zeros(2, 5, 8)}, r"query: expected \[2, 5, 16\]"),
    "input batch": ({"input_flatten": torch.zeros(1, 30, 16)}, r"input_flatten: expected \[2, 30"),
    "levels": ({"input_spatial_shapes": [(5, 6)]}, r"input_spatial_shapes: expected 2 levels"),
    "reference rank": ({"reference_points": torch.zeros(2, 5, 2)}, r"reference_points: expected 4"),
    "reference size": (
        {"reference_points": torch.zeros(2, 5, 3, 2)},
        r"reference_points: expected \[2 or 1, 5, 2 or 1, 2 or 4\], got \[2, 5, 3, 2\]",
    ),
    "mask": (
        {"input_padding_mask": torch.zeros(2, 29, dtype=torch.bool)},
        r"input_padding_mask: expected \[2, 30\] \(from B, S of input_flatten\), got \[2, 29\]",
    ),
    "mask of floats": (
        {"input_padding_mask": torch.zeros(2, 30)},
        r"input_padding_mask: expected dtype bool \(True where input_flatten is padding\), "
        r"got float32",
    ),
}


@pytest.mark.parametrize("name", BAD_FORWARDS)
def test_bad_module_inputs(name):
    changes, message = BAD_FORWARDS[name]
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=4)
    arguments = {
        "query": torch.zeros(2, 5, 16),
        "reference_points": torch.zeros(2, 5, 1, 2),
        "input_flatten": torch.zeros(2, 30, 16),
        "input_spatial_shapes": [(4, 6), (2, 3)],
    }
    with pytest.raises(ValueError, match=message):
        module(**{**arguments, **changes})
