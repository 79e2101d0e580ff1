# SPDX-License-Identifier: Apache-2.0
"""The checks of the smoke stage: many small ones by the gate, and what only a device shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from vitadapter_ops import ms_deform_attn
from vitadapter_ops.testing import cases, gate

# Of heads: those with kernels of their own, and two for the general kernel.
WIDTHS = (32, 64, 128, 16, 24, 40, 12, 8, 31)
SHAPES = ((16, 20), (8, 10), (4, 5))
SPECIAL = "special"  # the shard of SPECIALS

Check = tuple[str, Callable[[], None]]


def checks_of(shard: str, backend: str, device: str) -> Iterator[Check]:
    """The checks of a shard: SPECIAL, or an operator and dtypes such as "located bf16"."""
    if shard == SPECIAL:
        for name, check in SPECIALS.items():
            yield name, partial(check, backend, device)
        return
    operator, dtypes = shard.split()
    deterministic = (False, True) if backend == "cuda" else (False,)
    for case in _located() if operator == "located" else _from_offsets():
        for mode in deterministic:
            name = f"{shard} {case.name}{', deterministic' * mode}"
            yield name, partial(_gate, case, dtypes, backend, device, mode)


def _gate(
    case: cases.Case | cases.OffsetCase,
    dtypes: str,
    backend: str,
    device: str,
    deterministic: bool,
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        if isinstance(case, cases.Case):
            gate.check_backend(case, dtypes, backend, device)
        else:
            gate.check_offsets_backend(case, dtypes, backend, device)
    finally:
        torch.use_deterministic_algorithms(False)


def _located() -> Iterator[cases.Case]:
    pixels = sum(height * width for height, width in SHAPES)
    for width in WIDTHS:
        # 4 x 67 x 3 = 804 rows: no multiple of the rows of a warp or a block.
        yield cases.Case(f"D={width}", SHAPES, 4, 67, 3, width)
    for width in (32, 64):
        yield cases.Case(
            f"D={width}, grids", SHAPES, 2, pixels, 8, width, locations="local", grids=SHAPES
        )
        yield cases.Case(f"D={width}, one point", SHAPES[:1], 2, 320, 4, width, 1, grids=SHAPES[:1])
        yield cases.Case(f"D={width}, 33 points", SHAPES[:2], 2, 19, 4, width, 33)
        yield cases.Case(f"D={width}, far outside", SHAPES, 2, 100, 4, width, spread=1.5)
        # Thousands of terms for each of nine pixels.
        yield cases.Case(f"D={width}, contention", ((3, 3),), 1, 2000, 2, width, spread=0.0)


def _from_offsets() -> Iterator[cases.OffsetCase]:
    pixels = sum(height * width for height, width in SHAPES)
    for width in WIDTHS:
        yield cases.OffsetCase(
            f"D={width}, masked boxes",
            SHAPES,
            (4, 2, 3),
            3,
            67,
            3,
            width,
            boxes=True,
            scaled=True,
            masked=True,
        )
    for width in (32, 64):
        yield cases.OffsetCase(
            f"D={width}, grids",
            SHAPES,
            (4, 4, 4),
            2,
            pixels,
            8,
            width,
            shared_batch=True,
            shared_levels=True,
            grids=SHAPES,
        )


def _inputs(device: str, seed: int = 0, queries: int = 400) -> cases.Inputs:
    case = cases.Case("special", SHAPES, 2, queries, 8, 32, locations="local", grids=SHAPES)
    return case.inputs(seed).to(torch.float32, device)


def _step(
    inputs: cases.Inputs, backend: str, leaves: Sequence[torch.Tensor] | None = None
) -> Callable[[], list[torch.Tensor]]:
    """Output and gradients of `leaves`, or else of copies of the inputs."""
    if leaves is None:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors]
    value, *points = leaves

    def step() -> list[torch.Tensor]:
        out = ms_deform_attn(value, inputs.spatial_shapes, *points, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return step


def _same(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], what: str) -> None:
    """Up to the order of sums; output and gradients of points have none that could change."""
    for name, one, other in zip(gate.NAMES, got, wanted, strict=True):
        exact = name != "gradient of value"
        close = torch.equal(one, other) if exact else torch.allclose(one, other, 1e-4, 1e-4)
        assert close, f"{what}: {name} differs by {(one - other).abs().max().item():.3g}"


def _elsewhere_in_memory(backend: str, device: str) -> None:
    """Tensors that begin at odd elements, and are slices of wider ones."""
    inputs = _inputs(device)
    expected = _step(inputs, backend)()
    value, where, weights = inputs.tensors
    wide = torch.nn.functional.pad(value, (0, 0, 1, 2))[:, :, 1:-2]  # between other heads
    shifted = []
    for tensor in (where, weights):
        longer = torch.cat((torch.zeros(1, device=device), tensor.flatten()))
        shifted.append(longer[1:].view(tensor.shape))
    for moved, what in (
        ((wide, where, weights), "value between other heads"),
        ((value.transpose(1, 2).contiguous().transpose(1, 2), where, weights), "head-major value"),
        ((value, *shifted), "points at odd addresses"),
    ):
        out = ms_deform_attn(moved[0], inputs.spatial_shapes, *moved[1:], backend=backend)
        assert torch.allclose(out, expected[0], 1e-5, 1e-5), what
        leaves = [tensor.detach().requires_grad_() for tensor in moved]
        _, *grads = _step(inputs, backend, leaves)()
        for name, one, other in zip(gate.NAMES[1:], grads, expected[1:], strict=True):
            assert torch.allclose(one, other, 1e-4, 1e-4), f"{what}: {name}"


def _same_bits(backend: str, device: str) -> None:
    """Everything but the gradient of value repeats; in deterministic mode that too."""
    step = _step(_inputs(device), backend)
    first = step()
    for _ in range(5):
        _same(step(), first, "another run")
    if backend == "triton":  # has no deterministic backward
        return
    torch.use_deterministic_algorithms(True)
    try:
        first = step()
        for _ in range(5):
            assert all(map(torch.equal, step(), first)), "deterministic runs differ"
    finally:
        torch.use_deterministic_algorithms(False)


def _captured(backend: str, device: str) -> None:
    """A graph that replays forward and backward, with other numbers in the same memory."""
    if device == "cpu":
        return
    here, other = _inputs(device, 1), _inputs(device, 2)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in here.tensors]
    step = _step(here, backend, leaves)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = step()
        with torch.no_grad():
            for leaf, number in zip(leaves, other.tensors, strict=True):
                leaf.copy_(number)
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    _same(results, _step(other, backend)(), "replayed")


def _two_streams(backend: str, device: str) -> None:
    """Two streams at once disturb each other in nothing."""
    if device == "cpu":
        return
    steps = [_step(_inputs(device, seed), backend) for seed in (3, 4)]
    expected = [step() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for number, (stream, step) in enumerate(zip(streams, steps, strict=True)):
            with torch.cuda.stream(stream):
                results[number] = step()
    torch.cuda.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        _same(got, wanted, "beside another stream")


def _another_device(backend: str, device: str) -> None:
    """Tensors of a device that is not the current one."""
    if device == "cpu" or torch.cuda.device_count() < 2:
        return
    got = _step(_inputs("cuda:1"), backend)()
    expected = _step(_inputs("cuda:0"), backend)()
    _same([tensor.to("cuda:0") for tensor in got], expected, "on another device")


def _many_elements(backend: str, device: str) -> None:
    """A value of more than 2^31 elements, of which the last corner of the map is sampled."""
    side, corner, heads, channels = (2910, 64, 8, 32) if device != "cpu" else (90, 64, 2, 32)
    dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    small = torch.randn(
        1, corner, corner, heads, channels, generator=generator, device=device, dtype=dtype
    )
    large = torch.zeros(1, side, side, heads, channels, device=device, dtype=dtype)
    large[:, -corner:, -corner:] = small
    # Positions in pixels of the corner, multiples of 1/4 that fp32 holds on either map.
    size = (1, 500, heads, 1, 4, 2)
    place = torch.randint(0, 4 * (corner - 2), size, generator=generator, device=device) / 4 + 0.625
    weights = torch.rand(size[:-1], generator=generator, device=device) / 4
    results = []
    for value, length in ((small, corner), (large, side)):
        where = ((place + (length - corner) + 0.5) / length).requires_grad_()
        leaf = value.flatten(1, 2).requires_grad_()
        out = ms_deform_attn(leaf, [(length, length)], where, weights, backend=backend)
        grads = torch.autograd.grad(out, (leaf, where), torch.ones_like(out))
        grad = grads[0].view(value.shape)
        results.append((out.detach(), grad[:, -corner:, -corner:], grad.float().abs().sum()))
        del leaf, grads
    (out, grad, total), (large_out, large_grad, large_total) = results
    for name, one, other in (("output", large_out, out), ("gradient of value", large_grad, grad)):
        one, other = one.float(), other.float()
        error = (one - other).abs().max() / other.abs().max()
        assert error < 0.02, f"{name}: {error:.3g} of the largest value apart"
    share = (large_total / total - 1).abs().item()
    assert share < 0.01, f"gradient of value beside the corner: {share:.3g} of all"


SPECIALS = {
    "slices and odd addresses": _elsewhere_in_memory,
    "repeats": _same_bits,
    "graph": _captured,
    "two streams": _two_streams,
    "another device": _another_device,
    "more than 2^31 elements": _many_elements,
}
