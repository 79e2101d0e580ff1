# SPDX-License-Identifier: Apache-2.0
"""The functions under all their names, the compiled extension's shim, and patching."""

import functools
import importlib
import sys
import types

import pytest
import torch
from torch import nn

import drop_in_checks
from drop_in_checks import (
    BATCH,
    HEADS,
    PIXELS,
    POINTS,
    QUERIES,
    SHAPES,
    STARTS,
    TENSOR,
    WIDTH,
    original,
    tensors,
)
from vitadapter_ops.compat import deformable_detr, functions, kernels, msda, rfdetr
from vitadapter_ops.compat._patch import Patch, Replacement
from vitadapter_ops.testing import oracles

MANY = [3, 6, 2]


def their_function(extension, in_fp32=False):
    """How repositories wrap the compiled extension; some cast to fp32 under autocast."""

    class TheirFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights, step):
            ctx.step = step
            ctx.save_for_backward(value, shapes, starts, locations, weights)
            return extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, step)

        @staticmethod
        def backward(ctx, grad):
            value, locations, weights = extension.ms_deform_attn_backward(
                *ctx.saved_tensors, grad, ctx.step
            )
            return value, None, None, locations, weights, None

    if in_fp32:
        TheirFunction.forward = torch.amp.custom_fwd(
            TheirFunction.forward, device_type="cpu", cast_inputs=torch.float32
        )
        TheirFunction.backward = torch.amp.custom_bwd(TheirFunction.backward, device_type="cpu")
    return TheirFunction


TheirFunction = their_function(msda)


def rfdetr_core(value, shapes, locations, weights):
    return rfdetr.ms_deform_attn_core_pytorch(
        value.permute(0, 2, 3, 1), TENSOR, locations, weights.flatten(3), shapes
    )


def rfdetr_core_merged(value, shapes, locations, weights):
    return rfdetr_core(value, None, locations.flatten(3, 4), weights)


def layer(value, shapes, locations, weights):
    return kernels.MultiScaleDeformableAttention()(
        value, TENSOR, shapes, STARTS, locations, weights, 64
    )


def applied(function):
    return lambda value, shapes, *points: function.apply(value, TENSOR, STARTS, *points, 64)


LIST_OF_SHAPES = (
    "ms_deform_attn_core_pytorch",
    "multi_scale_deformable_attn_pytorch",
    "multi_scale_deformable_attention",
    "deformable_attention_core_func",
    "layer of the kernels package",
)
NAMES = {
    "MSDeformAttnFunction": applied(functions.MSDeformAttnFunction),
    "MultiScaleDeformableAttnFunction": applied(functions.MultiScaleDeformableAttnFunction),
    "MultiScaleDeformableAttentionFunction": applied(
        functions.MultiScaleDeformableAttentionFunction
    ),
    "extension": applied(TheirFunction),
    "extension-in-fp32": applied(their_function(msda, in_fp32=True)),
    "rfdetr": rfdetr_core,
    "rfdetr-merged": rfdetr_core_merged,
    "layer of the kernels package": layer,
    **{name: getattr(functions, name) for name in LIST_OF_SHAPES if hasattr(functions, name)},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_outputs_and_gradients_are_the_originals(name, precision):
    def ours(module, value, *points):
        return NAMES[name](value, SHAPES, *points)

    drop_in_checks.check(original, ours, nn.Module(), tensors(), precision)


def module_sampling_with(function, module, query, value, reference):
    """Deformable DETR's module around a function: with autocast, tensors of several dtypes."""
    shape = (BATCH, QUERIES, HEADS, 3, POINTS)
    offsets = module.sampling_offsets(query).view(*shape, 2)
    weights = module.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
    locations = reference[:, :, None, :, None] + offsets / TENSOR.flip(1)[:, None]
    value = module.value_proj(value).view(BATCH, PIXELS, HEADS, WIDTH)
    return module.output_proj(function(value, SHAPES, locations, weights))


def published_module(module, query, value, reference):
    return drop_in_checks.published_module(
        module, query, value, reference, SHAPES, HEADS, [POINTS] * 3
    )


def module_and_tensors():
    module = deformable_detr.MSDeformAttn(HEADS * WIDTH, 3, HEADS, POINTS)
    query = torch.randn(BATCH, QUERIES, HEADS * WIDTH)
    value = torch.randn(BATCH, PIXELS, HEADS * WIDTH)
    reference = torch.rand(BATCH, QUERIES, 3, 2)
    return drop_in_checks.perturbed(module), (query, value, reference)


@pytest.mark.parametrize("name", NAMES)
def test_functions_in_a_module_under_autocast(name):
    ours = functools.partial(module_sampling_with, NAMES[name])
    drop_in_checks.check(published_module, ours, *module_and_tensors(), "bf16-autocast")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_may_be_a_tensor_and_the_call_compiles(name):
    def ours(module, value, *points):
        return NAMES[name](value, TENSOR, *points)

    drop_in_checks.check(original, drop_in_checks.in_one_graph(ours), nn.Module(), tensors())


def test_one_graph_where_shapes_are_a_list():
    value, *points = tensors()
    expected = oracles.grid_sample(value, SHAPES, *points)
    torch.compiler.reset()
    inductor = torch.compile(functions.ms_deform_attn_core_pytorch, fullgraph=True)
    torch.testing.assert_close(inductor(value, SHAPES, *points), expected)
    for name in LIST_OF_SHAPES:
        compiled = drop_in_checks.in_one_graph(NAMES[name])
        torch.testing.assert_close(compiled(value, SHAPES, *points), expected, msg=name)


def test_one_graph_for_any_im2col_step():
    compiled = drop_in_checks.in_one_graph(functions.MSDeformAttnFunction.apply)
    value, *points = tensors()
    expected = oracles.grid_sample(value, SHAPES, *points)
    for step in (64, 32, 16):  # symbolic from the second on
        torch.testing.assert_close(compiled(value, SHAPES, None, *points, step), expected)


@pytest.mark.parametrize(
    ("shapes", "step", "expected"),
    [
        (SHAPES, 0, "im2col_step: expected a positive number, got 0"),
        (SHAPES[:2], 64, "spatial_shapes: expected levels with 56 pixels in all"),
    ],
    ids=["im2col_step", "shapes"],
)
def test_errors_in_one_graph_say_what_is_wrong(shapes, step, expected):
    compiled = drop_in_checks.in_one_graph(functions.MSDeformAttnFunction.apply)
    value, *points = tensors()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=expected):
        compiled(value, shapes, None, *points, step)


def test_points_beside_a_wider_value_are_widened():
    value, *points = (tensor.double() for tensor in tensors())
    points = [tensor.float() for tensor in points]
    grad = torch.randn(BATCH, QUERIES, HEADS * WIDTH, dtype=torch.float64)
    exact = (value, TENSOR, STARTS, *(tensor.double() for tensor in points))
    expected = msda.ms_deform_attn_forward(*exact)
    assert torch.equal(msda.ms_deform_attn_forward(value, TENSOR, STARTS, *points), expected)
    gradients = msda.ms_deform_attn_backward(value, TENSOR, STARTS, *points, grad)
    for got, whole in zip(gradients, msda.ms_deform_attn_backward(*exact, grad), strict=True):
        assert torch.equal(got, whole.to(got.dtype))
    assert [each.dtype for each in gradients] == [torch.float64, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precisions_are_widened(dtype):
    value, locations, weights = tensors()
    points = (locations.to(dtype), weights.to(dtype))
    torch.testing.assert_close(
        functions.ms_deform_attn_core_pytorch(value, SHAPES, *points),
        oracles.grid_sample(value, SHAPES, *(each.float() for each in points)),
    )
    gradients = msda.ms_deform_attn_backward(
        value, TENSOR, STARTS, *points, torch.ones(BATCH, QUERIES, HEADS * WIDTH)
    )
    assert [each.dtype for each in gradients] == [torch.float32, dtype, dtype]


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("step", [1, 2, 64])
def test_any_positive_im2col_step_is_accepted(batch, step):
    value, locations, weights = (t[:1].expand(batch, *t.shape[1:]).contiguous() for t in tensors())
    out = msda.ms_deform_attn_forward(value, TENSOR, STARTS, locations, weights, step)
    assert torch.equal(out, out[:1].expand_as(out))


def test_extension_records_no_gradient_and_checks_its_arguments():
    value, locations, weights = tensors()
    assert not msda.ms_deform_attn_forward(
        value.requires_grad_(), TENSOR, STARTS, locations, weights, 64
    ).requires_grad
    with pytest.raises(ValueError, match="grad_output: expected"):
        msda.ms_deform_attn_backward(
            value, TENSOR, STARTS, locations, weights, torch.ones(BATCH, QUERIES, 5), 64
        )


# --- points that differ from level to level


def many():
    locations = torch.rand(BATCH, QUERIES, HEADS, sum(MANY), 2) * 1.4 - 0.2
    logits = torch.randn(BATCH, QUERIES, HEADS, sum(MANY))
    return torch.randn(BATCH, PIXELS, HEADS, WIDTH), locations, logits


def original_many(method):
    def function(module, value, locations, logits):
        sides = locations.new_tensor(
            [(w, h) for (h, w), points in zip(SHAPES, MANY, strict=True) for _ in range(points)]
        )
        nowhere = locations.new_zeros(BATCH, QUERIES, 1, 2)
        if method != "default":  # rounding has no gradient
            locations = locations.detach()
        return drop_in_checks.attend(
            value, SHAPES, nowhere, locations * sides, logits, MANY, method=method
        )

    return function


@pytest.mark.parametrize("precision", drop_in_checks.PRECISIONS)
@pytest.mark.parametrize(
    ("function", "method", "same_as"),
    [
        (functions.deformable_attention_core_func_v2, "default", "default"),
        (functions.deformable_attention_core_func_v2, "discrete", "discrete-by-height"),
        (functions.multi_scale_deformable_attention_v2, "default", "default"),
        (functions.multi_scale_deformable_attention_v2, "discrete", "discrete"),
    ],
)
def test_levels_with_their_own_points(function, method, same_as, precision):
    def ours(module, value, locations, logits):
        return function(value, SHAPES, locations, logits.softmax(-1), MANY, method)

    drop_in_checks.check(original_many(same_as), ours, nn.Module(), many(), precision)


@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize(
    "function",
    [functions.deformable_attention_core_func_v2, functions.multi_scale_deformable_attention_v2],
)
def test_levels_with_their_own_points_in_one_graph(function, method):
    value, locations, logits = many()
    arguments = (value, SHAPES, locations, logits.softmax(-1), MANY, method)
    compiled = drop_in_checks.in_one_graph(function)
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize(
    "function",
    [functions.deformable_attention_core_func_v2, functions.multi_scale_deformable_attention_v2],
)
def test_locations_that_are_not_finite_contribute_zero(function, method):
    """Also where they would be rounded to integers, of which NaN is none."""
    value, locations, logits = many()
    weights = logits.softmax(-1)
    for coordinate, number in ((0, torch.nan), (1, torch.inf), (0, -torch.inf)):
        bad = locations.clone()
        bad[:, ::2, :, 4, coordinate] = number
        without = weights.clone()
        without[:, ::2, :, 4] = 0
        leaves = [each.clone().requires_grad_() for each in (value, weights)]
        got = function(leaves[0], SHAPES, bad, leaves[1], MANY, method)
        torch.testing.assert_close(got, function(value, SHAPES, locations, without, MANY, method))
        got.sum().backward()
        assert leaves[0].grad.isfinite().all()
        assert not leaves[1].grad[:, ::2, :, 4].any()


def test_discrete_locations_beyond_the_integers_are_limited():
    value, locations, logits = many()
    function = functions.multi_scale_deformable_attention_v2
    for far, limit in ((1e30, 1.0), (-1e30, 0.0)):
        moved, edge = locations.clone(), locations.clone()
        moved[..., 4, 0], edge[..., 4, 0] = far, limit
        arguments = (logits.softmax(-1), MANY, "discrete")
        assert torch.equal(
            function(value, SHAPES, moved, *arguments), function(value, SHAPES, edge, *arguments)
        )


def test_value_as_a_list_of_levels():
    value, locations, logits = many()
    levels = value.permute(0, 2, 3, 1).split([40, 12, 4], -1)
    weights = logits.softmax(-1)
    function = functions.deformable_attention_core_func_v2
    assert torch.equal(
        function(levels, TENSOR, locations, weights, MANY),
        function(value, TENSOR, locations, weights, MANY),
    )


def test_errors_name_the_argument():
    value, locations, logits = many()
    function = functions.deformable_attention_core_func_v2
    with pytest.raises(ValueError, match="method: expected 'default' or 'discrete', got 'cubic'"):
        function(value, SHAPES, locations, logits, MANY, "cubic")
    with pytest.raises(ValueError, match="num_points_list: expected 3 positive numbers"):
        function(value, SHAPES, locations, logits, [4, 7])
    with pytest.raises(ValueError, match="sampling_locations: expected 12 points"):
        function(value, SHAPES, locations, logits, [4, 4, 4])
    levels = list(value.permute(0, 2, 3, 1).split([40, 12, 4], -1))
    for wrong, message in (
        (None, "value: expected a torch.Tensor, or one for each level, got None"),
        ([], "value: expected a torch.Tensor, or one for each level, got list"),
        ([levels[0], None, levels[2]], r"value\[1\]: expected a torch.Tensor, got None"),
        ([levels[0], levels[1].double(), levels[2]], r"value\[1\]: expected dtype float32"),
        ([levels[0], levels[1][:1], levels[2]], r"value\[1\]: expected \[2, 3, 8, 12\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            function(wrong, SHAPES, locations, logits, MANY)


# --- the extension's name


def test_code_that_imports_the_extension_finds_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "MultiScaleDeformableAttention", raising=False)
    with msda.install():
        module = importlib.import_module("MultiScaleDeformableAttention")
        assert module.ms_deform_attn_forward is msda.ms_deform_attn_forward
        assert module.ms_deform_attn_backward is msda.ms_deform_attn_backward
        assert importlib.util.find_spec("MultiScaleDeformableAttention") is module.__spec__
        with pytest.raises(AttributeError, match="has only ms_deform_attn_forward"):
            module.dcnv3_forward  # noqa: B018
    assert "MultiScaleDeformableAttention" not in sys.modules


@pytest.mark.parametrize("package", ["groundingdino", "detrex"])
def test_extension_inside_a_package(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    before = types.ModuleType(f"{package}._C")
    monkeypatch.setitem(sys.modules, f"{package}._C", before)
    handle = msda.install(f"{package}._C")
    namespace = {}
    exec(f"from {package} import _C", namespace)
    assert namespace["_C"].ms_deform_attn_forward is msda.ms_deform_attn_forward
    handle.restore()
    assert sys.modules[f"{package}._C"] is before


@pytest.mark.parametrize(
    ("name", "in_fp32"),
    [
        ("MultiScaleDeformableAttention", False),
        ("MultiScaleDeformableAttention", True),
        ("groundingdino._C", False),
        ("detrex._C", False),
    ],
)
def test_their_module_trains_with_the_installed_extension(name, in_fp32, monkeypatch):
    package, _, inner = name.rpartition(".")
    if package:
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    namespace = {}
    with msda.install(name):
        exec(f"from {package} import {inner}" if package else f"import {inner}", namespace)
    their = applied(their_function(namespace[inner], in_fp32))
    ours = functools.partial(module_sampling_with, their)
    module, given = module_and_tensors()
    for precision in drop_in_checks.PRECISIONS:
        drop_in_checks.check(published_module, ours, module, given, precision)
    compiled = drop_in_checks.in_one_graph(ours)
    drop_in_checks.check(published_module, compiled, module, given)


# --- patching


def copied_module():
    """A module as repositories copy it, with a function of their own beside ours."""
    module = types.ModuleType("copied")
    module.ms_deform_attn_core_pytorch = original
    module.MSDeformAttnFunction = TheirFunction
    module.other = original
    return module


def test_patch_module_replaces_known_names_and_restores_the_same_objects():
    module = copied_module()
    with functions.patch_module(module) as patch:
        assert module.ms_deform_attn_core_pytorch is functions.ms_deform_attn_core_pytorch
        assert module.MSDeformAttnFunction is functions.MSDeformAttnFunction
        assert module.other is original
        assert sorted(patch.replaced) == [
            "copied.MSDeformAttnFunction",
            "copied.ms_deform_attn_core_pytorch",
        ]
    assert module.ms_deform_attn_core_pytorch is original
    assert module.MSDeformAttnFunction is TheirFunction


def test_a_model_that_calls_a_patched_module_trains_alike():
    module = copied_module()
    module.ms_deform_attn_core_pytorch = oracles.grid_sample
    model, given = module_and_tensors()

    def loss(model):
        function = module.ms_deform_attn_core_pytorch
        return module_sampling_with(function, model, *given).square().mean()

    drop_in_checks.check_training(model, loss, lambda: functions.patch_module(module))


def test_patch_module_needs_something_to_replace():
    with pytest.raises(ValueError, match="module: expected one with at least one of"):
        functions.patch_module(types.ModuleType("empty"))


def test_patches_end_in_any_order():
    module = copied_module()
    first, second = functions.patch_module(module), functions.patch_module(module)
    first.restore()
    first.restore()
    assert module.MSDeformAttnFunction is functions.MSDeformAttnFunction
    second.restore()
    assert module.MSDeformAttnFunction is TheirFunction


def test_a_patch_ends_with_an_error_too():
    module = copied_module()
    with pytest.raises(KeyError), functions.patch_module(module):
        raise KeyError
    assert module.MSDeformAttnFunction is TheirFunction


def test_an_attribute_that_was_inherited_is_removed_again():
    class Base:
        def forward(self):
            return 1

    class Derived(Base):
        pass

    with Patch([Replacement(Derived, "forward", lambda self: 2)]):
        assert (Derived().forward(), Base().forward()) == (2, 1)
    assert "forward" not in vars(Derived)


def test_someone_elses_later_patch_is_left_alone():
    module = copied_module()
    patch = functions.patch_module(module)
    module.MSDeformAttnFunction = "theirs"
    with pytest.raises(RuntimeError, match=r"copied\.MSDeformAttnFunction: replaced by someone"):
        patch.restore()
    assert module.MSDeformAttnFunction == "theirs"
    assert module.ms_deform_attn_core_pytorch is original


def test_importing_the_package_imports_no_project(tmp_path):
    import children

    code = (
        "import sys, vitadapter_ops.compat\n"
        "from vitadapter_ops.compat import deformable_detr, dcnv4, detrex, functions, mmcv, msda\n"
        "from vitadapter_ops.compat import kernels, onnx, rfdetr, rtdetr, transformers\n"
        "others = {'transformers', 'mmcv', 'mmengine', 'rfdetr', 'onnx', 'onnxscript', 'kernels'}\n"
        "print(sorted(others & set(sys.modules)))\n"
    )
    done = children.python(["-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
