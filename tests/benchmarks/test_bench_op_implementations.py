# SPDX-License-Identifier: Apache-2.0
"""benchmarks/op/implementations.py: others are called as they want it, or named as missing."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.op.implementations import COMPILED, OURS, RIVALS
from op_results import TINY, rival
from vitadapter_ops.testing import cases, oracles


def test_every_rival_that_is_installed_agrees_with_ours():
    inputs = TINY.inputs(dtype=torch.float32)
    expected = OURS.bind(inputs)(*inputs.tensors)
    for each in RIVALS:
        if each.missing() is None and each is not COMPILED:
            torch.testing.assert_close(each.bind(inputs)(*inputs.tensors), expected)


@pytest.fixture(params=["roulbac", "rziga"])
def msda_triton(request, monkeypatch):
    """A stand-in for either of the two projects of this name, with its calling convention."""

    def sample(value, shapes, locations, weights):
        assert value.dtype == locations.dtype == weights.dtype
        return oracles.grid_sample(value, [tuple(s) for s in shapes.tolist()], locations, weights)

    def roulbac(value, shapes, starts, locations, weights):
        assert starts.tolist() == cases.first_pixels(shapes.tolist(), None)
        return sample(value, shapes, locations, weights)

    def rziga(value, shapes, locations, weights, padding_mode, align_corners):
        assert (padding_mode, align_corners) == ("zeros", False)
        return sample(value, shapes, locations, weights).unflatten(2, value.shape[2:])

    module, frontend = ModuleType("msda_triton"), ModuleType("msda_triton.frontend")
    if request.param == "roulbac":
        module.multi_scale_deformable_attention = roulbac
    else:
        module.multiscale_deformable_attention = None  # runs grid_sample: not to be called
        frontend.triton_multiscale_deformable_attention = rziga
        monkeypatch.setitem(sys.modules, "msda_triton.frontend", frontend)
    monkeypatch.setitem(sys.modules, "msda_triton", module)
    return request.param


def test_triton_rivals_are_called_as_they_want_it(msda_triton):
    inputs = cases.SMALL[3].inputs().to(torch.float32)
    rivals = {each.name: each for each in RIVALS}
    got = rivals[f"{msda_triton}-msda-triton"].bind(inputs)(*inputs.tensors)
    torch.testing.assert_close(got, OURS.bind(inputs)(*inputs.tensors))
    other = {"roulbac": "rziga", "rziga": "roulbac"}[msda_triton]
    assert "another project's" in rivals[f"{other}-msda-triton"].missing()


@pytest.fixture
def deformops(monkeypatch):
    """A stand-in with its calling convention and its checks; returns the backends asked for."""
    asked = []

    def msda(value, shapes, starts, locations, weights, *, backend=None):
        asked.append(backend)
        assert value.dtype == locations.dtype == weights.dtype
        assert (shapes.dtype, starts.dtype) == (torch.int32, torch.int32)
        assert starts.tolist() == cases.first_pixels(shapes.tolist(), None)
        assert weights.shape[:3] == locations.shape[:3]
        weights = weights.unflatten(3, locations.shape[3:5])  # [B, Q, M, L * P]
        return oracles.grid_sample(value, [tuple(s) for s in shapes.tolist()], locations, weights)

    module = ModuleType("deformops.registry")
    module.msda, module.Backend = msda, SimpleNamespace(TRITON="triton")
    monkeypatch.setitem(sys.modules, "deformops", ModuleType("deformops"))
    monkeypatch.setitem(sys.modules, "deformops.registry", module)
    return asked


def test_deformops_is_called_by_its_own_choice_and_with_fp32_sums(deformops):
    exact = cases.SMALL[3].inputs().to(torch.float32)
    inputs = dataclasses.replace(exact, attention_weights=exact.attention_weights.double())
    rivals = {each.name: each for each in RIVALS}
    expected = OURS.bind(exact)(*exact.tensors)
    for name in ("deformops", "deformops-fp32"):
        got = rivals[name].bind(inputs)(*inputs.tensors)
        torch.testing.assert_close(got, expected)
        assert torch.float64 not in rivals[name].dtypes  # it would run its eager code
    assert deformops == [None, "triton"]
    assert torch.float32 not in rivals["deformops-fp32"].dtypes  # the same kernel as by choice
    if not torch.cuda.is_available():
        assert rivals["deformops"].missing() == "it is for a GPU"


def test_a_rival_for_a_newer_python_is_missing(tmp_path, monkeypatch):
    (tmp_path / "for_newer_python.py").write_text("class Registry[Call: ...] pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "invalid syntax" in rival("newer", None, "for_newer_python").missing()
