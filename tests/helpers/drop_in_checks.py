# SPDX-License-Identifier: Apache-2.0
"""What a drop-in is held to: outputs and gradients of the original, in three precisions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_ops.testing import oracles
from vitadapter_ops.testing.tolerances import (
    DROP_IN_FP64_ULPS,
    DROP_IN_ULPS,
    MODEL_LOSS_SHARE,
    assert_as_accurate_as_eager,
    assert_close_but_for_crossings,
    assert_gradients_of_models_agree,
    assert_same_definition,
)

PRECISIONS = ("fp64", "fp32", "bf16-autocast")

# What restores the originals at its end, such as what patch_mmcv returns.
Patch = Callable[[], contextlib.AbstractContextManager[object]]

# Takes the module and the tensors, returns a tensor or several.
Function = Callable[..., Tensor | tuple[Tensor, ...]]

# The losses, and the first gradient of each parameter.
Training = tuple[list[float], dict[str, Tensor | None]]


def under(patch: Patch, function: Function) -> Function:
    """The function, with the patch while it runs."""

    def patched(*arguments: object) -> Tensor | tuple[Tensor, ...]:
        with patch():
            return function(*arguments)

    return patched


def in_one_graph(function: Function) -> Function:
    """The function compiled through AOTAutograd, as one graph or not at all."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def results(
    function: Function, module: nn.Module, tensors: Sequence[Tensor], precision: str
) -> dict[str, Tensor]:
    """Outputs, and gradients of the tensors and parameters, of one forward and backward pass."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    module = copy.deepcopy(module).to(dtype)
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    autocast = (
        torch.autocast("cpu", torch.bfloat16)
        if precision == "bf16-autocast"
        else contextlib.nullcontext()
    )
    with autocast:
        outputs = function(module, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (output.to(dtype) * torch.randn(output.shape, generator=generator).to(dtype)).sum()
        for output in outputs
    )
    loss.backward()
    found = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    for number, leaf in enumerate(leaves):
        if leaf.grad is not None:
            found[f"gradient of tensor {number}"] = leaf.grad
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return found


def check(
    original: Function,
    ours: Function,
    module: nn.Module,
    tensors: Sequence[Tensor],
    precision: str = "fp32",
) -> None:
    """Holds ours to the original's results: in fp64 to the bit or nearly, else to its accuracy."""
    exact = results(original, module, tensors, "fp64")
    got = results(ours, module, tensors, precision)
    eager = exact if precision == "fp64" else results(original, module, tensors, precision)
    assert got.keys() == eager.keys()
    for name in eager:
        assert got[name].dtype == eager[name].dtype, f"{name}: {got[name].dtype}"
        if precision == "fp64":
            assert_same_definition(name, got[name], exact[name], DROP_IN_FP64_ULPS)
        elif precision == "bf16-autocast" and name.startswith("gradient"):
            assert_close_but_for_crossings(name, got[name], eager[name], exact[name])
        else:
            assert_as_accurate_as_eager(name, got[name], eager[name], exact[name], DROP_IN_ULPS)


def sgd(model: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = 2) -> Training:
    """Steps of SGD on a copy of the model: the loss before and after each, the first gradients."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    gradients: dict[str, Tensor | None] = {}
    for step in range(steps + 1):
        torch.manual_seed(0)  # the same dropout and denoising noise for everyone
        value = loss(model)
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        if step == 0:
            gradients = {
                name: None if parameter.grad is None else parameter.grad.clone()
                for name, parameter in model.named_parameters()
            }
        optimizer.step()
    return losses, gradients


def assert_trained_alike(got: Training, expected: Training) -> None:
    """Holds losses and first gradients of `sgd` to another's."""
    losses, gradients = expected
    assert losses[0] != losses[-1]
    torch.testing.assert_close(
        torch.tensor(got[0]), torch.tensor(losses), rtol=MODEL_LOSS_SHARE, atol=0
    )
    whole = torch.stack([each.norm() for each in gradients.values() if each is not None]).norm()
    for name, theirs in gradients.items():
        ours = got[1][name]
        assert (ours is None) == (theirs is None), f"{name}: only one of the two has a gradient"
        if ours is not None and theirs is not None:
            assert_gradients_of_models_agree(name, ours, theirs, whole)


def check_training(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    patch: Patch,
) -> None:
    """Holds two steps of training under the patch to the losses and gradients without."""
    expected = sgd(model, loss)
    with patch():
        got = sgd(model, loss)
    assert_trained_alike(got, expected)


# --- the operator, as compiled extensions have it -----------------------------------------------

SHAPES = [(5, 8), (3, 4), (2, 2)]
TENSOR = torch.tensor(SHAPES)
STARTS = torch.tensor([0, 40, 52])
PIXELS, BATCH, QUERIES, HEADS, WIDTH, POINTS = 56, 2, 7, 3, 8, 4


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """value, locations and weights of `original`."""
    locations = torch.rand(BATCH, QUERIES, HEADS, 3, POINTS, 2) * 1.4 - 0.2
    weights = torch.randn(BATCH, QUERIES, HEADS, 3 * POINTS).softmax(-1)
    return torch.randn(BATCH, PIXELS, HEADS, WIDTH), locations, weights.unflatten(3, (3, POINTS))


def original(module: nn.Module, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator's definition, as a function of a module without layers."""
    return oracles.grid_sample(value, SHAPES, locations, weights)


# --- originals of projects that no registry has -------------------------------------------------


def attend(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    points: Sequence[int],
    scale: float = 0.5,
    method: str = "default",
) -> Tensor:
    """Locations, softmax and sampling as the published modules compute them, level by level.

    value [B, S, M, D], reference [B, Q, L or 1, 2 or 4], offsets [B, Q, M, sum(points), 2], logits
    [B, Q, M, sum(points)]; "discrete" limits x by the width and y by the height of a level,
    "discrete-by-height" both by the height.
    """
    batch, _, heads, channels = value.shape
    queries = offsets.shape[1]
    weights = logits.softmax(-1)
    out = 0
    start = first = 0
    for level, ((height, width), count) in enumerate(zip(shapes, points, strict=True)):
        here = reference[:, :, level if reference.shape[2] > 1 else 0, None, None]
        offset = offsets[:, :, :, first : first + count]
        if reference.shape[-1] == 2:
            location = here + offset / offset.new_tensor([width, height])
        else:
            location = here[..., :2] + offset / count * here[..., 2:] * scale
        pixels = value[:, start : start + height * width]
        if method == "default":
            maps = pixels.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
            grid = 2 * location.transpose(1, 2).flatten(0, 1) - 1
            maps, grid = (t.to(torch.promote_types(maps.dtype, grid.dtype)) for t in (maps, grid))
            found = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
            found = found.view(batch, heads, channels, queries, count).permute(0, 3, 1, 4, 2)
        else:
            nearest = (location * location.new_tensor([width, height]) + 0.5).long()
            right = (width if method == "discrete" else height) - 1
            index = nearest[..., 1].clamp(0, height - 1) * width + nearest[..., 0].clamp(0, right)
            index = index.permute(0, 1, 3, 2).reshape(batch, queries * count, heads, 1)
            found = pixels.gather(1, index.expand(-1, -1, -1, channels))
            found = found.view(batch, queries, count, heads, channels).transpose(2, 3)
        out = out + (found * weights[..., first : first + count, None]).sum(3)
        start, first = start + height * width, first + count
    return out.flatten(2)


def linear(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    layer = module.get_submodule(name)
    return F.linear(tensor, layer.weight, layer.bias)


def published_module(
    module: nn.Module,
    query: Tensor,
    value: Tensor,
    reference: Tensor,
    shapes: Sequence[tuple[int, int]],
    heads: int,
    points: Sequence[int],
    padding: Tensor | None = None,
    scale: float = 0.5,
    method: str = "default",
) -> Tensor:
    """The chain of a published module with the parameters of `module`; batch first."""
    batch, queries, _ = query.shape
    if hasattr(module, "value_proj"):
        value = linear(module, "value_proj", value)
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0.0)
    offsets = linear(module, "sampling_offsets", query).view(batch, queries, heads, -1, 2)
    logits = linear(module, "attention_weights", query).view(batch, queries, heads, -1)
    value = value.reshape(*value.shape[:2], heads, -1)
    out = attend(value, shapes, reference, offsets, logits, points, scale, method)
    return linear(module, "output_proj", out) if hasattr(module, "output_proj") else out


def perturbed(module: nn.Module, std: float = 0.2) -> nn.Module:
    """The module or model with offsets and weights that depend on the query, as after training.

    At first all points of an encoder are at pixels' centres, where gradients jump.
    """
    for name, parameter in module.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(parameter, std=std)
    return module
