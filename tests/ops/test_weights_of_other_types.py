# SPDX-License-Identifier: Apache-2.0
"""Weights that are no plain tensors go the way that their layer itself goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from vitadapter_ops import MSDeformAttn
from vitadapter_ops.linear import is_plain, project
from vitadapter_ops.testing import tolerances

INPUTS = (torch.randn(2, 5, 16), torch.rand(2, 5, 1, 2), torch.randn(2, 30, 16), [(4, 6), (2, 3)])
LAYERS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


class Rounded(torch.Tensor):
    """A weight of 8 bits, as torchao's are: it knows F.linear and nothing else.

    codes [N, K] int8, scale [N, 1].
    """

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def plain(self):
        return self.codes * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.plain(), bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"Rounded: no {function}")


def module():
    attention = MSDeformAttn(16, 2, 4, 3)
    for name in LAYERS[:2]:
        nn.init.normal_(attention.get_submodule(name).weight, std=0.3)
    return attention


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rounded", [LAYERS, *((name,) for name in LAYERS)], ids="+".join)
def test_quantised_weights_are_used_as_their_layer_uses_them(rounded, grad):
    attention, expected = module(), module()
    expected.load_state_dict(attention.state_dict())
    for name in rounded:
        layer, same = attention.get_submodule(name), expected.get_submodule(name)
        weight = Rounded.of(layer.weight.detach())
        same.weight.data.copy_(weight.plain())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        assert type(layer.weight) is Rounded
        assert not is_plain(layer)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(attention(*INPUTS), expected(*INPUTS))


class LowRank(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(0.1 * torch.randn(2, weight.shape[1]))
        self.up = nn.Parameter(0.1 * torch.randn(weight.shape[0], 2))

    def forward(self, weight):
        return weight + self.up @ self.down


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", ["adapter", "parametrization", "pruning", "merged"])
def test_adapted_weights_are_used(change, grad):
    attention, expected = module(), module()
    expected.load_state_dict(attention.state_dict())
    for name in LAYERS:
        layer = attention.get_submodule(name)
        if change == "adapter":
            setattr(attention, name, Adapted(layer))
            weight = layer.weight + getattr(attention, name).low_rank(0 * layer.weight)
        elif change == "parametrization":
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
            weight = layer.weight
        elif change == "pruning":
            prune.random_unstructured(layer, "weight", 0.5)
            assert (layer.weight == 0).any()
            layer.weight_orig.data.mul_(2)  # as a step of training would
            weight = layer.weight_orig * layer.weight_mask
        else:
            weight = LowRank(layer.weight)(layer.weight)
            layer.weight = nn.Parameter(weight.detach())
        expected.get_submodule(name).weight.data.copy_(weight)
    with torch.set_grad_enabled(grad):
        out = attention(*INPUTS)
        torch.testing.assert_close(out, expected(*INPUTS))
    if grad:
        out.sum().backward()
        assert all(p.grad is not None for p in attention.parameters() if p.requires_grad)
    if change == "pruning":
        for name in LAYERS:
            prune.remove(attention.get_submodule(name), "weight")
            assert is_plain(attention.get_submodule(name))
        torch.testing.assert_close(attention(*INPUTS), expected(*INPUTS))


class Adapted(nn.Module):
    """A layer with an adapter beside it (LoRA: Hu et al., 2022)."""

    def __init__(self, base):
        super().__init__()
        self.base, self.low_rank = base.requires_grad_(False), LowRank(base.weight)

    def forward(self, x):
        return self.base(x) + x @ self.low_rank.down.t() @ self.low_rank.up.t()


@pytest.mark.parametrize("grad", [True, False])
def test_weights_of_a_functional_call_are_used(grad):
    attention, other = module(), module()
    with torch.set_grad_enabled(grad):
        got = torch.func.functional_call(attention, dict(other.named_parameters()), INPUTS)
        torch.testing.assert_close(got, other(*INPUTS))
    if grad:
        got.sum().backward()
        assert attention.value_proj.weight.grad is None
        assert other.value_proj.weight.grad is not None


def test_several_modules_are_mapped_at_once():
    """An ensemble: vmap over stacked parameters, alone and without gradients."""
    members = [module().requires_grad_(False) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(members)
    got = torch.vmap(lambda p: torch.func.functional_call(members[0], p, INPUTS))(parameters)
    for member, out in zip(members, got, strict=True):
        torch.testing.assert_close(out, member(*INPUTS), **tolerances.CLOSE)


@pytest.mark.parametrize("grad", [True, False])
def test_buffers_in_the_place_of_parameters_are_used(grad):
    attention, expected = module(), module()
    expected.load_state_dict(attention.state_dict())
    for layer in map(attention.get_submodule, LAYERS):
        for name in ("weight", "bias"):
            tensor = getattr(layer, name).detach()
            delattr(layer, name)
            layer.register_buffer(name, tensor)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(attention(*INPUTS), expected(*INPUTS))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_without_weight_or_bias_is_called(name):
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    setattr(layer, name, None)
    assert not is_plain(layer)
    if name == "bias":
        torch.testing.assert_close(project(layer, x), F.linear(x, layer.weight))
    else:
        with pytest.raises(TypeError, match="linear"):
            project(layer, x)


class Tagged(torch.Tensor):
    """A tensor of a class of its own, as data may come."""


@pytest.mark.parametrize("grad", [True, False])
def test_inputs_of_another_type_stay_that_type(grad):
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    with torch.set_grad_enabled(grad):
        got = project(layer, x.as_subclass(Tagged))
        assert type(got) is Tagged
        torch.testing.assert_close(got.as_subclass(torch.Tensor), layer(x))
