# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels in the emulation of tests/cuda_emulation: compiled, called as csrc/cuda launches
them, and held to the fp64 reference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

import children
from vitadapter_ops.testing import cases, gate
from vitadapter_ops.testing.tolerances import Inaccurate

CXX = os.environ.get("CXX", "c++")
_FOLDER = children.ROOT / "tests" / "cuda_emulation"
# Queries are the pixels, more of them than a run has (rows.cuh), and a band is lower than others.
ENCODER = cases.Case("encoder", ((9, 8), (4, 5)), queries=92, heads=2, channels=32)


def build(folder: Path, source: Path, *defines: str, include: Path | None = None) -> None:
    """Compiles the emulated kernels from a copy of csrc into a folder.

    Args:
        defines: macros that kernels.cpp and csrc know.
        include: read before everything else.
    """
    import pybind11

    folders = [pybind11.get_include(), sysconfig.get_path("include"), str(source)]
    flags = ["-Og", "-std=c++17", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    flags += [*(f"-D{define}" for define in defines), *(f"-I{path}" for path in folders)]
    if include is not None:
        flags += ["-include", str(include)]
    command = [CXX, *flags, str(_FOLDER / "kernels.cpp"), "-o", str(_library(folder))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated_kernels", _library(folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _library(folder: Path) -> Path:
    return folder / f"emulated_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"


def levels_of(inputs, starts, points):
    rows = zip(inputs.spatial_shapes, starts, points, strict=True)
    return [number for size, start, count in rows for number in (*size, start, count)]


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def grad_value_memory(value, dtype, fixed):
    """Zeros, which the kernels add to; or anything, which the deterministic ones write over."""
    return torch.full(value.shape, float("nan") if fixed else 0.0, dtype=dtype)


def fixed_sums(kernels, grad_value):
    """The integer sums of fixed_point.cuh, and their state."""
    state = torch.zeros(kernels.state_size(grad_value.numel()), dtype=torch.int32)
    return [torch.zeros(grad_value.shape, dtype=torch.int64), state]


def emulate(
    kernels, dtypes, inputs, cotangent, general=False, needs=(True, True, True), fixed=False
):
    """Output and gradients, as the launchers of csrc/ would compute them."""
    value, locations, weights = inputs.tensors
    batch, pixels, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sizes = [batch, pixels, queries, heads, channels]
    levels = levels_of(inputs, inputs.starts, [points] * len(inputs.spatial_shapes))
    shape = [sizes, levels, list(value.stride()[:3]), []]
    where = [address(locations), address(weights)]
    nan = float("nan")
    out = torch.full((batch, queries, heads * channels), nan, dtype=value.dtype)
    rest = [address(value), 0, address(out), 0]
    getattr(kernels, f"forward_{dtypes}")(*shape, where, rest, general)
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    grads = [
        grad_value_memory(value, compute, fixed),
        torch.full_like(locations, nan),
        torch.full_like(weights, nan),
    ]
    wanted = [address(t) if need else 0 for t, need in zip(grads, needs, strict=True)]
    rest = [address(value), 0, address(cotangent), wanted[0]]
    sums = fixed_sums(kernels, grads[0]) if fixed else []
    arguments = [*shape, where, rest, wanted[1:], [t.data_ptr() for t in sums], general]
    getattr(kernels, f"backward_{dtypes}")(*arguments)
    grads[0] = grads[0].to(value.dtype)
    return [out, *grads]


def emulate_offsets(kernels, dtypes, inputs, cotangents, general=False, fixed=False):
    """As `emulate`, for the fused operator; to what gate.OFFSET_NAMES lists."""
    value, reference, offsets, logits = inputs.tensors
    batch, pixels, heads, channels = value.shape
    queries = offsets.shape[1]
    starts = cases.first_pixels(inputs.spatial_shapes, inputs.level_start_index)
    sizes = [batch, pixels, queries, heads, channels]
    levels = levels_of(inputs, starts, inputs.points_per_level)
    layout = [*offsets.stride()[:2], *logits.stride()[:2]]
    layout += [reference.shape[0], *reference.shape[2:], queries]
    shape = [sizes, levels, list(value.stride()[:3]), layout]
    where = [address(t) for t in (offsets, logits, reference, inputs.offset_scale)]
    nan, mask = float("nan"), inputs.padding_mask
    out = torch.full((batch, queries, heads * channels), nan, dtype=value.dtype)
    weights = torch.full_like(logits, nan)
    rest = [address(value), address(mask), address(out), address(weights)]
    getattr(kernels, f"offsets_forward_{dtypes}")(*shape, where, rest, general)
    compute = reference.dtype
    grad_value = grad_value_memory(value, compute, fixed)
    by_head = torch.full((batch, queries, heads, *reference.shape[2:]), nan, dtype=compute)
    grad_offsets, grad_logits = torch.full_like(offsets, nan), torch.full_like(logits, nan)
    grads = [address(t) for t in (grad_offsets, grad_logits, by_head, cotangents[1])]
    rest = [address(value), address(mask), address(cotangents[0]), address(grad_value)]
    sums = fixed_sums(kernels, grad_value) if fixed else []
    arguments = [*shape, where, rest, grads, [t.data_ptr() for t in sums], general]
    getattr(kernels, f"offsets_backward_{dtypes}")(*arguments)
    grad_reference = by_head.sum(2)
    if reference.shape[0] == 1:
        grad_reference = grad_reference.sum(0, keepdim=True)
    return [out, weights, grad_value.to(value.dtype), grad_reference, grad_offsets, grad_logits]


def check(kernels, case, dtypes, **how):
    gate.check(case, dtypes, lambda *args: emulate(kernels, dtypes, *args, **how))


def check_offsets(kernels, case, dtypes, **how):
    gate.check_offsets(case, dtypes, lambda *args: emulate_offsets(kernels, dtypes, *args, **how))


# Times its bound: correct sums miss theirs by less, wrong ones by far more.
NEAR = 4


def first_error(kernels):
    """What some checks in fp32 say of kernels first, or None; not of an error near its bound."""
    located = (cases.SMALL[3], cases.SMALL[7], ENCODER)
    # With 16 channels several rows for each warp.
    offsets = [replace(case, channels=d) for case in cases.OFFSETS[:8] for d in (case.channels, 16)]
    checks = [(check, case) for case in located] + [(check_offsets, case) for case in offsets]
    for one, case in checks:
        try:
            one(kernels, case, "fp32")
        except Inaccurate as error:
            if error.times > NEAR:
                return f"{case}: {error}"
        except (AssertionError, RuntimeError) as error:
            return f"{case}: {error}"
    return None


# Rows for all warps of a block, with all points on the map.
FULL = cases.Case("full", ((5, 7), (3, 4)), queries=13, points=40, spread=0)
FULL_OFFSETS = cases.OffsetCase(
    "full", FULL.shapes, (40, 40), queries=13, spread=0.1, grids=FULL.shapes
)


def errors_of_full_blocks(kernels):
    """What the emulation says of each operator and kernel when blocks use all of their memory."""
    for channels, general in ((12, 0), (16, 0), (32, 0), (64, 0), (128, 0), (20, 0), (32, 1)):
        for case, run in ((FULL, emulate), (FULL_OFFSETS, emulate_offsets)):
            inputs = replace(case, channels=channels).inputs().to(torch.float32)
            cotangent = torch.randn(case.batch, case.queries, case.heads * channels)
            if run is emulate_offsets:
                cotangent = [cotangent, torch.randn(inputs.attention_logits.shape)]
            try:
                run(kernels, "fp32", inputs, cotangent, general)
                yield None
            except RuntimeError as error:
                yield str(error)
