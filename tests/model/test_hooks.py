# SPDX-License-Identifier: Apache-2.0
"""What hooks on a model's parts see and keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from families import FAMILIES, build

IMAGES = torch.randn(2, 3, 64, 64)


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for part in value for each in _tensors(part)] if isinstance(value, tuple) else []


def _keep_outputs(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What each part returns, with a copy made then; filled by the next forward."""
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, out, name=name: kept.setdefault(name, []).extend(
                (tensor, tensor.detach().clone()) for tensor in _tensors(out)
            )
        )
    return kept


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_part_changes_what_another_one_returned(family, training):
    model = build(family).train(training)
    kept = _keep_outputs(model)
    with torch.set_grad_enabled(training):
        model(IMAGES)
    changed = [
        name
        for name, pairs in kept.items()
        if not all(torch.equal(now, then) for now, then in pairs)
    ]
    assert changed == []
    assert kept.keys() >= {name for name, module in model.named_modules() if not _is_list(module)}


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


# Embeddings take integers, which have no gradient; the images have one, for the first layers.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients")
@pytest.mark.parametrize("family", FAMILIES)
def test_full_backward_hooks_on_every_part(family):
    model = build(family)
    seen = set()
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda module, given, got, name=name: seen.add(name))
    sum(m.square().mean() for m in model(IMAGES.clone().requires_grad_())).backward()
    assert seen == {name for name, module in model.named_modules() if not _is_list(module)}


@pytest.mark.parametrize("family", FAMILIES)
def test_auxiliary_losses_on_every_part(family):
    model = build(family)
    kept = _keep_outputs(model)
    maps = model(IMAGES)
    losses = [out.square().mean() for pairs in kept.values() for out, _ in pairs]
    (sum(losses) + sum(m.square().mean() for m in maps)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("hook", ["each part's", "all modules'"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_change_no_map(family, hook):
    model = build(family).double().eval()
    images = IMAGES.double()
    with torch.no_grad():
        expected = model(images)
        handle = None
        if hook == "all modules'":
            handle = register_module_forward_hook(lambda module, args, out: None)
        else:
            _keep_outputs(model)
        try:
            maps = model(images)
        finally:
            if handle is not None:
                handle.remove()
    for got, want in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_with_parameters_is_called(family, training):
    model = build(family).train(training)
    layers = {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and name
    }
    called = set()
    for name, module in layers.items():
        module.register_forward_hook(lambda module, args, out, name=name: called.add(name))
    with torch.set_grad_enabled(training):
        model(IMAGES)
    assert called == layers.keys()


def test_what_a_hook_returns_for_the_upsampled_map_counts():
    model = build("plain").eval()
    model.up.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    sums = []
    model._add_resized = lambda base, vit_map, index: sums.append(base) or base
    kept = _keep_outputs(model)
    with torch.no_grad():
        model(IMAGES)
    assert torch.equal(sums[0], kept["spm.fc1"][0][0])


def test_what_a_hook_returns_for_queries_keys_and_values_counts():
    for family in ("plain", "beit", "beit, windows"):
        model = build(family).eval()
        with torch.no_grad():
            before = model(IMAGES)
            handle = model.blocks[0].attn.qkv.register_forward_hook(lambda m, args, out: 2 * out)
            assert not torch.allclose(model(IMAGES)[0], before[0]), family
            handle.remove()
            assert torch.equal(model(IMAGES)[0], before[0]), family


@pytest.mark.parametrize("part", ["stem", "up"])
def test_another_module_may_take_a_parts_place(part):
    """It keeps what it returned, as nothing but its class says."""

    class Keeping(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            self.kept, self.copy = out, out.detach().clone()
            return out

    model = build("plain").eval()
    with torch.no_grad():
        expected = model(IMAGES)
        owner = model.spm if part == "stem" else model
        keeping = Keeping(getattr(owner, part))
        setattr(owner, part, keeping)
        for got, want in zip(model(IMAGES), expected, strict=True):
            torch.testing.assert_close(got, want)
    assert torch.equal(keeping.kept, keeping.copy)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_function_in_torchs_transposed_convolution_is_called(gradients, monkeypatch):
    model = build("plain").eval()
    own, shapes = torch.nn.ConvTranspose2d.forward, []

    def forward(layer, x, *args):
        shapes.append(tuple(x.shape))
        return own(layer, x, *args)

    monkeypatch.setattr(torch.nn.ConvTranspose2d, "forward", forward)
    with torch.set_grad_enabled(gradients):
        model(IMAGES)
    assert len(shapes) == 1
