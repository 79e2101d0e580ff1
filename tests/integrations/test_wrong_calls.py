# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of everything in compat: an error that names the argument as the caller does.

Every call below is right; then one argument after the other gets what it can not take.
"""

import functools
import importlib
import re
import types

import pytest
import torch
from optional import require_integration

from vitadapter_ops.compat import dcnv4, detrex, functions, kernels, mmcv, msda, rfdetr, rtdetr
from vitadapter_ops.compat.transformers import patch_transformers

SHAPES = [(3, 4), (2, 2)]
TENSOR = torch.tensor(SHAPES)
STARTS = torch.tensor([0, 12])
PIXELS, BATCH, QUERIES, HEADS, WIDTH, POINTS = 16, 2, 5, 3, 4, 2
CHANNELS = HEADS * WIDTH
VALUE = torch.randn(BATCH, PIXELS, HEADS, WIDTH)
LOCATIONS = torch.rand(BATCH, QUERIES, HEADS, 2, POINTS, 2)
WEIGHTS = torch.rand(BATCH, QUERIES, HEADS, 2, POINTS)
OUTPUT = torch.randn(BATCH, QUERIES, CHANNELS)
QUERY, TOKENS = torch.randn(BATCH, QUERIES, CHANNELS), torch.randn(BATCH, PIXELS, CHANNELS)
REFERENCE = torch.rand(BATCH, QUERIES, 2, 2)
PADDING = torch.zeros(BATCH, PIXELS, dtype=torch.bool)

# What the arguments of each name are, whatever the function.
SIZES = ("value_spatial_shapes", "spatial_shapes", "value_spatial_shapes_list")
FIRST = ("value_level_start_index", "level_start_index")
STEPS = ("im2col_step", "img2col_step", "K")
COUNTS = ("num_points_list",)
MASKS = ("key_padding_mask", "attention_mask")
NUMBERS = ("value_mask",)  # any dtype
ADDED = ("query_pos", "identity", "position_embeddings")  # of any shape that broadcasts


def located(shapes, starts=None, points=("sampling_locations", "attention_weights"), step=False):
    """The arguments of the functions that are given locations."""
    arguments = {"value": VALUE, shapes: TENSOR}
    if starts:
        arguments[starts] = STARTS
    arguments |= dict(zip(points, (LOCATIONS, WEIGHTS), strict=True))
    return arguments | ({"im2col_step": 64} if step else {})


BY_POINT = {
    "value": VALUE,
    "value_spatial_shapes": SHAPES,
    "sampling_locations": LOCATIONS.flatten(3, 4),
    "attention_weights": WEIGHTS.flatten(3),
    "num_points_list": [POINTS, POINTS],
}
EXTENSION = located("spatial_shapes", "level_start_index", ("sampling_loc", "attn_weight"), True)
OF_MMCV = located("value_spatial_shapes", "value_level_start_index", step=True)
TARGETS = {"grad_value": VALUE, "grad_sampling_loc": LOCATIONS, "grad_attn_weight": WEIGHTS}
OF_MODULE = {
    "query": QUERY,
    "value": TOKENS,
    "query_pos": QUERY,
    "key_padding_mask": PADDING,
    "reference_points": REFERENCE,
    "spatial_shapes": TENSOR,
    "level_start_index": STARTS,
}
OF_RTDETR = {
    "query": QUERY,
    "reference_points": REFERENCE,
    "value": TOKENS,
    "value_spatial_shapes": SHAPES,
}


def by_position(function):
    """For `Function.apply`, which takes no keywords in the originals."""
    return lambda **arguments: function(*arguments.values())


def in_mmcv(batch_first, **arguments):
    module = mmcv.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, POINTS, batch_first=batch_first)
    return module(**arguments)


def second(names, arguments):
    """With the batch second, as mmcv's module takes it at first."""
    return arguments | {name: arguments[name].transpose(0, 1) for name in names}


def in_transformers(**arguments):
    module = importlib.import_module("transformers.models.oneformer.modeling_oneformer")
    attention = module.OneFormerPixelDecoderEncoderMultiscaleDeformableAttention
    with patch_transformers("oneformer"):
        return attention(CHANNELS, HEADS, 2, POINTS)(**arguments)


CALLS = {
    "MSDeformAttnFunction.apply": (
        by_position(functions.MSDeformAttnFunction.apply),
        located("value_spatial_shapes", "value_level_start_index", step=True),
    ),
    **{
        name: (getattr(functions, name), located("value_spatial_shapes"))
        for name in (
            "ms_deform_attn_core_pytorch",
            "multi_scale_deformable_attn_pytorch",
            "multi_scale_deformable_attention",
            "deformable_attention_core_func",
        )
    },
    **{
        f"{name}, {method}": (getattr(functions, name), {**BY_POINT, "method": method})
        for name in ("deformable_attention_core_func_v2", "multi_scale_deformable_attention_v2")
        for method in ("default", "discrete")
    },
    "msda.ms_deform_attn_forward": (msda.ms_deform_attn_forward, EXTENSION),
    "msda.ms_deform_attn_backward": (
        msda.ms_deform_attn_backward,
        EXTENSION | {"grad_output": OUTPUT},
    ),
    "mmcv.ms_deform_attn_forward": (mmcv.ms_deform_attn_forward, OF_MMCV),
    "mmcv.ms_deform_attn_backward": (
        mmcv.ms_deform_attn_backward,
        OF_MMCV | {"grad_output": OUTPUT} | TARGETS,
    ),
    "mmcv": (
        functools.partial(in_mmcv, False),
        second(("query", "value", "query_pos"), OF_MODULE) | {"identity": QUERY.transpose(0, 1)},
    ),
    "mmcv, batch first": (functools.partial(in_mmcv, True), OF_MODULE | {"identity": QUERY}),
    "groundingdino": (
        lambda **arguments: detrex.GroundingDinoAttention(
            CHANNELS, HEADS, 2, POINTS, batch_first=True
        )(**arguments),
        OF_MODULE,
    ),
    "dcnv4": (
        by_position(dcnv4.FlashDeformAttnFunction.apply),
        {
            "value": VALUE,
            "value_spatial_shapes": TENSOR,
            "value_level_start_index": STARTS,
            "sampling_loc_attn": torch.rand(BATCH, QUERIES, HEADS, 2 * POINTS * 3),
            "im2col_step": 64,
            "K": POINTS,
        },
    ),
    "rtdetr": (
        lambda **arguments: rtdetr.MSDeformableAttention(CHANNELS, HEADS, 2, POINTS)(**arguments),
        OF_RTDETR | {"value_mask": ~PADDING},
    ),
    "rtdetr, discrete": (
        lambda **arguments: rtdetr.MSDeformableAttention(
            CHANNELS, HEADS, 2, POINTS, method="discrete"
        )(**arguments),
        OF_RTDETR | {"value_mask": ~PADDING},
    ),
    "d-fine": (
        lambda **arguments: rtdetr.DFineMSDeformableAttention(CHANNELS, HEADS, 2, POINTS)(
            **arguments
        ),
        OF_RTDETR | {"value": VALUE},
    ),
    "rfdetr": (
        rfdetr.ms_deform_attn_core_pytorch,
        located("value_spatial_shapes") | {"value": VALUE.permute(0, 2, 3, 1)},
    ),
    "kernels": (
        lambda **arguments: kernels.MultiScaleDeformableAttention()(
            value_spatial_shapes=TENSOR, level_start_index=STARTS, **arguments
        ),
        located("value_spatial_shapes_list", step=True),
    ),
    "transformers": (
        in_transformers,
        {
            "hidden_states": QUERY,
            "attention_mask": PADDING,
            "encoder_hidden_states": TOKENS,
            "position_embeddings": QUERY,
            "reference_points": REFERENCE,
            "spatial_shapes": TENSOR,
        },
    ),
}
OPTIONAL = {*FIRST, *MASKS, *NUMBERS, *ADDED}


def longer(tensor, dim):
    """One more entry along a dimension."""
    return torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)


def wrong_tensors(name, right):
    yield "5", 5
    yield "a list", [1.0, 2.0]
    if name not in ADDED:
        yield "0-d", torch.tensor(1.0)
    yield "on meta", right.to("meta")
    yield "sparse", right.to_sparse()
    yield "one dimension more", right.unsqueeze(0).expand(2, *right.shape)
    if name not in NUMBERS:
        yield "of integers", right.to(torch.int64)
        yield "complex", right.to(torch.complex64)
    if name in MASKS:
        yield "of floats", right.float()
        yield "of bytes", right.to(torch.uint8)
    if name.startswith("grad_"):
        yield "of another precision", right.double()


def wrong_values(name, given):
    """What is wrong, and a value of which that is true; `given` are all arguments of the call."""
    if name not in OPTIONAL and not (name == "value" and "query_pos" in given):
        yield "None", None
    right = given[name]
    if name in SIZES:
        yield "5", 5
        yield "a string", "ab"
        yield "0-d", torch.tensor(5)
        yield "of floats", TENSOR.float()
        yield "on meta", TENSOR.to("meta")
        yield "three sides", [(3, 4, 1), (2, 2, 1)]
        yield "floats", [(3.0, 4.0), (2.0, 2.0)]
        if not set(given) & set(FIRST):
            yield "other pixels", [(3, 4), (2, 30)]
        yield "another level", [(3, 4), (2, 1), (2, 1)]
    elif name in FIRST:
        yield "5", 5
        yield "0-d", torch.tensor(5)
        yield "of floats", STARTS.float()
        yield "on meta", STARTS.to("meta")
        yield "outside", [0, 13]
        yield "too many", [0, 12, 16]
    elif name in STEPS:
        for each in (0, -1, 2.5, "64"):
            yield repr(each), each
    elif name in COUNTS:
        for each in (5, "ab", [2.0, 2.0], [4, 0], [4], [3, 2], torch.tensor(4), [True, 3]):
            yield repr(each), each
    elif name == "method":
        yield "another", "cubic"
    else:
        yield from wrong_tensors(name, right)


def assert_refused(call, name, wrong, *words):
    """Holds the error to begin with an argument of the call and to have these words.

    Of two arguments that disagree either may be the wrong one.
    """
    function, arguments = CALLS[call]
    with pytest.raises((TypeError, ValueError)) as error:
        function(**{**arguments, name: wrong})
    message = str(error.value)
    begin = re.match(r"(\w+)(\[\d+\])*: expected ", message)
    assert begin, message
    assert begin[1] in arguments, message
    for word in words:
        assert re.search(rf"\b{word}\b", message), f"no {word} in {message!r}"


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_are_right(call):
    if call == "transformers":
        require_integration("transformers")
    function, arguments = CALLS[call]
    function(**arguments)


@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, (_, arguments) in CALLS.items() for name in arguments]
)
def test_error_names_the_argument(call, name):
    if call == "transformers":
        require_integration("transformers")
    for what, wrong in wrong_values(name, CALLS[call][1]):
        try:
            assert_refused(call, name, wrong, name)
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"{name} {what}: {error}") from error


def free(call, arguments):
    """Dimensions that nothing else depends on."""
    if call == "rfdetr":
        return {("value", 2)}
    if call == "dcnv4":
        return {("value", 1), ("value", 3), ("sampling_loc_attn", 1)}
    if "query" in arguments or "hidden_states" in arguments:
        return set()
    last = {("value", 1)} if set(arguments) & set(FIRST) else set()  # pixels behind the last level
    return last if "grad_output" in arguments else last | {("value", 3)}


@pytest.mark.parametrize("call", CALLS)
def test_sizes_that_disagree_are_refused(call):
    if call == "transformers":
        require_integration("transformers")
    arguments = CALLS[call][1]
    for name, right in arguments.items():
        if isinstance(right, torch.Tensor) and name not in SIZES + FIRST:
            for dim in range(right.dim()):
                if (name, dim) not in free(call, arguments):
                    assert_refused(call, name, longer(right, dim))


# --- constructors and patches

CONSTRUCTORS = {
    "mmcv": (
        mmcv.MultiScaleDeformableAttention,
        ("embed_dims", "num_heads", "num_levels", "num_points", "im2col_step"),
    ),
    "detrex": (
        detrex.MultiScaleDeformableAttention,
        ("embed_dim", "num_heads", "num_levels", "num_points", "img2col_step"),
    ),
    "groundingdino": (
        detrex.GroundingDinoAttention,
        ("embed_dim", "num_heads", "num_levels", "num_points", "img2col_step"),
    ),
    **{
        name: (
            getattr(rtdetr, name),
            ("embed_dim", "num_heads", "num_levels", "num_points"),
        )
        for name in (
            "MSDeformableAttention",
            "MSDeformableAttentionV1",
            "DFineMSDeformableAttention",
        )
    },
}


@pytest.mark.parametrize("wrong", [0, -4, 2.5, None, "8"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(make, name, id=f"{project}-{name}")
        for project, (make, names) in CONSTRUCTORS.items()
        for name in names
    ],
)
def test_constructors_name_the_size(make, name, wrong):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        make(**{name: wrong})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmcv.MultiScaleDeformableAttention(10, 3), "num_heads: .* embed_dims = 10"),
        (lambda: detrex.MultiScaleDeformableAttention(10, 3), "num_heads: .* embed_dim = 10"),
        (lambda: mmcv.MultiScaleDeformableAttention(value_proj_ratio=0.0), "value_proj_ratio: "),
        (lambda: mmcv.MultiScaleDeformableAttention(value_proj_ratio="1"), "value_proj_ratio: "),
        (lambda: mmcv.MultiScaleDeformableAttention(dropout=None), "dropout: expected a number"),
        (lambda: mmcv.MultiScaleDeformableAttention(dropout=2.0), "dropout "),
        (lambda: rtdetr.MSDeformableAttention(offset_scale=None), "offset_scale: expected"),
        (lambda: rtdetr.MSDeformableAttention(offset_scale=float("nan")), "offset_scale: expect"),
        (lambda: rtdetr.MSDeformableAttention(num_points=[4, 4, 4, 4.5]), "num_points: expected"),
        (lambda: rtdetr.MSDeformableAttention(num_points=[4, 4, 4, 0]), "num_points: expected"),
        (lambda: functions.patch_module("mmcv"), "module: expected an imported module, got str"),
        (lambda: functions.patch_module(types.ModuleType("empty")), "module: expected one with"),
        (lambda: patch_transformers(5), "models: expected names from .*; got int"),
        (lambda: patch_transformers("detr"), "models: expected names from .*; got 'detr'"),
        (lambda: msda.install(5), "name: expected the name of a module, got int"),
    ],
)
def test_other_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


def test_an_error_of_someone_elses_is_left_alone():
    """Only messages of ours are put into the caller's words."""
    module = mmcv.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, POINTS, batch_first=True)

    class Theirs(torch.nn.Module):
        in_features = CHANNELS

        def forward(self, x):
            raise ValueError("the padding_mask of my own layer")

    module.value_proj = Theirs()
    with pytest.raises(ValueError, match=r"^the padding_mask of my own layer$"):
        module(**OF_MODULE)


@pytest.mark.parametrize("name", ["query", "value"])
def test_tokens_of_another_dtype_than_the_layers_are_named(name):
    given = {**OF_MODULE, "key_padding_mask": None}
    module = mmcv.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, POINTS, batch_first=True)
    message = rf"^{name}: expected dtype float32 \(that of \w+\.weight\), got float64"
    with pytest.raises(ValueError, match=message):
        module(**{**given, name: given[name].double(), "identity": QUERY})
    module = rtdetr.MSDeformableAttention(CHANNELS, HEADS, 2, POINTS)
    with pytest.raises(ValueError, match=message):
        module(**{**OF_RTDETR, name: OF_RTDETR[name].double()})
