# SPDX-License-Identifier: Apache-2.0
"""Linear layers by oneDNN are torch's."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitadapter_ops.linear import _onednn_dtypes, is_untouched, linear, project

bf16_by_onednn = pytest.mark.skipif(torch.bfloat16 not in _onednn_dtypes(), reason="needs AVX-512")


@pytest.fixture
def refuse_onednn(monkeypatch):
    """Calling oneDNN's product raises TypeError."""
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)


def layer_and_input(*shape, bias=True):
    return nn.Linear(8, 6, bias=bias), torch.randn(*shape, 8)


@pytest.mark.parametrize("shape", [(2, 5), (0,), (), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_product_is_that_of_torch(shape, bias):
    layer, x = layer_and_input(*shape, bias=bias)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))


X, WEIGHT, BIAS = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
ODD = {
    "bias, every second number": (X, WEIGHT, torch.randn(12)[::2]),
    "bias, a column": (X, WEIGHT, torch.randn(6, 3)[:, 1]),
    "bias, backwards through memory": (X, WEIGHT, torch.randn(6, 2).t()[1]),
    "bias, one number expanded": (X, WEIGHT, torch.randn(1).expand(6)),
    "bias, from the middle of its memory": (X, WEIGHT, torch.randn(13)[7:]),
    "bias, of one number with a stride": (X, WEIGHT[:1], torch.randn(3)[::3]),
    "bias, negated when read": (X, WEIGHT, torch._neg_view(BIAS)),
    "weight, transposed": (X, torch.randn(8, 6).t(), BIAS),
    "weight, every second column": (X, torch.randn(6, 16)[:, ::2], BIAS),
    "weight, one row expanded": (X, torch.randn(1, 8).expand(6, 8), BIAS),
    "weight, one number expanded": (X, torch.randn(1, 1).expand(6, 8), None),
    "weight, rows that overlap": (X, torch.randn(20).as_strided((6, 8), (2, 1)), BIAS),
    "weight, negated when read": (X, torch._neg_view(WEIGHT), BIAS),
    "x, every second number": (torch.randn(5, 16)[:, ::2], WEIGHT, BIAS),
    "x, one row expanded": (torch.randn(1, 8).expand(5, 8), WEIGHT, BIAS),
    "x, rows that overlap": (torch.randn(20).as_strided((3, 5, 8), (2, 1, 1)), WEIGHT, BIAS),
    "x, negated when read": (torch._neg_view(X), WEIGHT, BIAS),
    "x, zeros that are not stored": (torch._efficientzerotensor((5, 8)), WEIGHT, BIAS),
    "no rows": (torch.randn(2, 0, 8), WEIGHT, BIAS),
    "no outputs": (X, torch.randn(0, 8), torch.randn(0)),
    "nothing to sum": (torch.randn(2, 5, 0), torch.randn(6, 0), BIAS),
    "nothing to sum, no bias": (torch.randn(5, 0), torch.randn(6, 0), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("case", ODD)
def test_memory_of_any_form_is_read_as_torch_reads_it(case, autocast, dtype):
    x, weight, bias = (
        t if t is None or dtype == torch.float32 else like(t, dtype) for t in ODD[case]
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, autocast):
        got, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    rounding = torch.finfo(expected.dtype).eps * expected.abs().max().item() if got.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=0.0, atol=4 * rounding)


def like(tensor, dtype):
    """The tensor in another dtype, with the strides that it has."""
    if tensor.is_neg() or tensor._is_zerotensor():
        return tensor.to(dtype)
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def test_a_bias_is_not_read_past_its_end():
    with torch.no_grad():
        y = linear(torch.zeros(1, 3), torch.zeros(4096, 3), torch.zeros(1).expand(4096))
    assert y.abs().max() == 0


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.parametrize("position", [0, 1, 2], ids=["x", "weight", "bias"])
def test_other_layouts_are_left_to_torch(position, layout, refuse_onednn):
    tensors = [X, WEIGHT, BIAS]
    if tensors[position].dim() < 2 and layout == "to_sparse_csr":
        tensors[position] = torch.randn(1, 6)  # rows are what it compresses
    tensors[position] = getattr(tensors[position], layout)()
    results = []
    for function in (F.linear, linear):
        try:
            with torch.no_grad():
                results.append(function(*tensors).to_dense())
        except (RuntimeError, NotImplementedError) as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize("position", [0, 1, 2], ids=["x", "weight", "bias"])
def test_tangents_of_forward_mode_come_out_under_no_grad(position):
    tensors, tangent = [X, WEIGHT, BIAS], torch.randn_like((X, WEIGHT, BIAS)[position])
    with forward_ad.dual_level(), torch.no_grad():
        tensors[position] = forward_ad.make_dual(tensors[position], tangent)
        got, expected = (
            forward_ad.unpack_dual(function(*tensors)).tangent for function in (linear, F.linear)
        )
    torch.testing.assert_close(got, expected)


def test_tokens_that_are_not_contiguous_are_served():
    layer, x = nn.Linear(8, 6), torch.randn(2, 8, 5).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(project(layer, x), layer(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_once(dtype):
    layer, x = nn.Linear(64, 48), torch.randn(5, 64).to(dtype)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            got, usual = project(layer, x), layer(x)
        rounded = [t.bfloat16().double() for t in (x, layer.weight, layer.bias)]
        exact = F.linear(*rounded)
    assert got.dtype == usual.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= exact.abs().max() * 2**-8
    torch.testing.assert_close(got, usual)


@bf16_by_onednn
def test_16_bits_go_to_onednn(refuse_onednn):
    layer, x = layer_and_input(5)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError):
            project(layer, x)
        with pytest.raises(TypeError):
            project(layer.bfloat16(), x.bfloat16())


def test_gradients_and_other_dtypes_go_to_torch(refuse_onednn):
    layer, x = layer_and_input(5)
    project(layer, x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.float16):
            assert project(layer, x).dtype == torch.float16
        with pytest.raises(TypeError):
            project(layer, x)
        assert project(layer.double(), x.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert project(layer, x.double()).dtype == layer(x.double()).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.randn(5, 7), None),
        (torch.randn(5, 16), None),
        (torch.randn(5, 8), torch.randn(5)),
        (torch.randn(5, 8), torch.randn(6).double()),
        (torch.randn(5, 8), torch.empty(6, device="meta")),
    ],
    ids=["narrow", "wide", "bias", "bias's dtype", "bias's device"],
)
def test_wrong_arguments_get_torchs_errors(x, bias, dtype):
    weight = torch.randn(6, 8).to(dtype)
    bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)
    messages = []
    for function in (F.linear, linear):
        with torch.no_grad(), pytest.raises(RuntimeError) as caught:
            function(x.to(dtype), weight, bias)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_who_looks_at_what_is_called_sees_torch(refuse_onednn):
    layer, x = layer_and_input(5)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            project(layer, x)
        assert counter.get_total_flops() == 2 * 5 * 8 * 6
        layer.requires_grad_(False)
        graph = torch.jit.trace(lambda x: project(layer, x), x, check_trace=False).graph
        assert "aten::linear" in str(graph)
        mapped = torch.vmap(lambda x: project(layer, x))(x)
        torch.testing.assert_close(mapped, layer(x))


@pytest.mark.filterwarnings("ignore:TF32")
def test_who_switched_onednn_off_does_not_get_it(refuse_onednn):
    layer, x = layer_and_input(5)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(project(layer, x), layer(x))


def test_modes_and_replacements_see_torchs_function(refuse_onednn, monkeypatch):
    layer, x = layer_and_input(5)
    calls = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.linear:
                calls.append("mode")
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        with Mode():
            project(layer, x)
        original = F.linear
        monkeypatch.setattr(F, "linear", lambda *args: calls.append("function") or original(*args))
        project(layer, x)
    assert calls == ["mode", "function"]


def test_layers_that_do_more_are_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = layer_and_input(5)
    other = Doubled(8, 6)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        once = project(layer, x)
        torch.testing.assert_close(project(other, x), 2 * once)
        handle = layer.register_forward_hook(lambda module, inputs, output: 3 * output)
        torch.testing.assert_close(project(layer, x), 3 * once)
        handle.remove()
        layer.forward = lambda x: once + 1
        torch.testing.assert_close(project(layer, x), once + 1)


def wrapped(function, calls):
    """The function within another that looks like it, as profilers and tracers have it."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("name", ["forward", "__call__", "_call_impl"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Module])
def test_functions_put_into_classes_are_called(kind, name, monkeypatch):
    layer, x, calls = nn.Linear(8, 6), torch.randn(5, 8), []
    assert is_untouched(layer)
    monkeypatch.setattr(kind, name, wrapped(getattr(kind, name), calls))
    with torch.no_grad():
        project(layer, x)
    replaced = not (kind is nn.Module and name == "forward")  # which nn.Linear has its own of
    assert calls == [1] * replaced
    assert is_untouched(nn.Sequential(layer)) != replaced


@pytest.mark.parametrize(
    "register",
    [
        lambda call: global_hooks.register_module_forward_hook(lambda *_: call()),
        lambda call: global_hooks.register_module_forward_hook(
            lambda *_: call(), with_kwargs=True, always_call=True
        ),
        lambda call: global_hooks.register_module_forward_pre_hook(lambda *_: call()),
        lambda call: global_hooks.register_module_full_backward_hook(lambda *_: None),
        lambda call: global_hooks.register_module_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "kwargs, always", "pre", "backward", "backward pre"],
)
def test_hooks_of_all_modules_are_called(register, refuse_onednn):
    layer, x = layer_and_input(5)
    calls = []
    handle = register(lambda: calls.append(1))
    try:
        assert not is_untouched(nn.Sequential(layer))
        with torch.no_grad():
            project(layer, x)
    finally:
        handle.remove()
        global_hooks._global_forward_hooks_with_kwargs.clear()  # which remove() forgets
    assert is_untouched(nn.Sequential(layer))
    assert len(calls) <= 1
    with torch.no_grad(), pytest.raises(TypeError):
        project(layer, x)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    "register",
    [
        lambda layer, call: layer.register_forward_hook(lambda *_: call(), always_call=True),
        lambda layer, call: layer.register_forward_hook(lambda *_: call(), with_kwargs=True),
        lambda layer, call: layer.register_forward_pre_hook(lambda *_: call()),
        lambda layer, call: layer.register_full_backward_hook(lambda *_: call()),
        lambda layer, call: layer.register_full_backward_pre_hook(lambda *_: call()),
    ],
    ids=["always", "kwargs", "pre", "backward", "backward pre"],
)
def test_hooks_of_a_layer_are_called(register):
    layer, x = layer_and_input(5)
    calls = []
    register(layer, lambda: calls.append(1))
    assert not is_untouched(nn.Sequential(nn.Sequential(layer)))
    project(layer, x).sum().backward()
    assert calls == [1]


def test_a_layer_that_was_compiled_on_its_own_is_called():
    layer, x = layer_and_input(5)
    calls = []
    # What layer.compile() sets; torch does not compile its own layers by themselves.
    layer._compiled_call_impl = wrapped(layer._call_impl, calls)
    assert not is_untouched(nn.Sequential(layer))
    with torch.no_grad():
        project(layer, x)
    assert calls == [1]


@pytest.mark.parametrize("grad", [True, False])
def test_checks_leave_compiled_graphs_whole(grad):
    layer, x = layer_and_input(5)
    compiled = torch.compile(
        lambda x: (project(layer, x), is_untouched(layer)), backend="eager", fullgraph=True
    )
    with torch.set_grad_enabled(grad):
        y, untouched = compiled(x)
        torch.testing.assert_close(y, layer(x))
    assert untouched


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_layers_of_torchscript_are_called(kind):
    layer, x = layer_and_input(5)
    expected = layer(x)
    other = torch.jit.script(layer) if kind == "script" else torch.jit.trace(layer, x)
    assert not is_untouched(nn.Sequential(other))
    with torch.no_grad():
        torch.testing.assert_close(project(other, x), expected)


def test_results_of_training_are_no_views_and_have_the_layers_gradients():
    layer = torch.nn.Linear(8, 6)
    for x in (torch.randn(2, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(0, 5, 8)):
        tensors = (x.requires_grad_(), layer.weight, layer.bias)
        results = [call(x) for call in (lambda x: project(layer, x), layer)]
        assert not results[0]._is_view()
        assert torch.equal(*results)
        grads = [torch.autograd.grad(result.sin().sum(), tensors) for result in results]
        assert all(map(torch.equal, *grads))
