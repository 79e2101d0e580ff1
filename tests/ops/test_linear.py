# SPDX-License-Identifier: Apache-2.0
"""Linear layers by oneDNN are torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitadapter_ops.linear import _onednn_dtypes, linear, project

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
