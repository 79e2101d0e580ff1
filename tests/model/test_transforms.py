# SPDX-License-Identifier: Apache-2.0
"""Derivatives of whole models in forward mode and by torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from families import FAMILIES, build
from vitadapter.layers.attention import ATTENTIONS

STEP = 1e-6
# Central differences of fp64: their own error is of the order of STEP**2, rounding 1e-16 / STEP.
SHARE = 1e-6
MODELS = [(family, {}) for family in FAMILIES]
MODELS += [("plain", {"attention": attention}) for attention in list(ATTENTIONS)[1:]]


def _function(model: nn.Module):
    buffers = dict(model.named_buffers())

    def maps(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        out = functional_call(model, (parameters, buffers), (images,))
        return torch.cat([m.flatten(1) for m in out], dim=1)

    return maps


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("family", "options"), MODELS, ids=str)
def test_forward_mode_gives_the_derivative(family, options, gradients):
    model = build(family, **options).double().eval()
    function, parameters = _function(model), _parameters(model)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    direction = {name: 0.1 * torch.randn_like(each) for name, each in parameters.items()}
    towards = torch.randn_like(images)
    # torch's fused attention on a CPU has no forward mode, and says so.
    with torch.set_grad_enabled(gradients), sdpa_kernel(SDPBackend.MATH):
        out, tangent = jvp(function, (parameters, images), (direction, towards))

    def moved(step: float) -> Tensor:
        there = {name: each + step * direction[name] for name, each in parameters.items()}
        return function(there, images + step * towards)

    with torch.no_grad():
        torch.testing.assert_close(out, function(parameters, images))
        expected = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    assert (tangent - expected).norm() <= SHARE * expected.norm()


def test_forward_mode_through_fused_attention_is_refused_and_not_zero():
    model = build("plain").eval()
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(NotImplementedError, match="forward AD"), torch.no_grad():
        jvp(lambda x: model(x)[0], (images,), (images,))


@pytest.mark.parametrize(("family", "options"), MODELS, ids=str)
def test_gradients_by_torch_func_are_those_of_backward(family, options):
    model = build(family, **options).double().eval()
    function, parameters = _function(model), _parameters(model)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    got = grad(lambda p: function(p, images).sin().sum())(parameters)
    sum(m.sin().sum() for m in model(images)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_vmap_over_the_weights_of_an_ensemble():
    models = [build("plain").double().eval() for _ in range(2)]
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    stacked = {
        name: torch.stack([_parameters(model)[name] for model in models])
        for name in _parameters(models[0])
    }
    with torch.no_grad():
        got = vmap(lambda p: _function(models[0])(p, images))(stacked)
        for one, model in zip(got, models, strict=True):
            expected = torch.cat([m.flatten(1) for m in model(images)], dim=1)
            torch.testing.assert_close(one, expected)
