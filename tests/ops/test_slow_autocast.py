# SPDX-License-Identifier: Apache-2.0
"""Training in 16 bits on a processor that multiplies them slowly warns, once."""

from __future__ import annotations

import platform
import warnings

import pytest
import torch

from vitadapter_ops import MSDeformAttn
from vitadapter_ops import linear as linear_module

INPUTS = (torch.randn(1, 5, 16), torch.rand(1, 5, 1, 2), torch.randn(1, 20, 16), [(4, 4), (2, 2)])


@pytest.fixture(params=["bfloat16", "float16"])
def dtype(request, monkeypatch):
    """A dtype of autocast that the processor does not multiply."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(linear_module, "_multiplies_fp16", lambda: False)
    linear_module._warn_if_slow.cache_clear()
    yield getattr(torch, request.param)
    linear_module._warn_if_slow.cache_clear()


def messages(dtype, call, enabled=True):
    with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", dtype, enabled):
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if "autocast" in str(each.message)]


def module():
    return MSDeformAttn(16, 2, 2, 2)


def test_training_warns_once(dtype):
    attention = module()
    got = messages(dtype, lambda: [attention(*INPUTS) for _ in range(3)] and module()(*INPUTS))
    assert len(got) == 1
    assert str(dtype) in got[0]
    assert {torch.bfloat16: "no AMX", torch.float16: "no AVX512-FP16"}[dtype] in got[0]


def test_nothing_warns_without_training_or_autocast(dtype):
    attention = module()
    with torch.no_grad():
        assert messages(dtype, lambda: attention(*INPUTS)) == []
    assert messages(dtype, lambda: attention(*INPUTS), enabled=False) == []
    assert messages(dtype, lambda: module().requires_grad_(False)(*INPUTS)) == []


def test_nothing_warns_on_a_processor_that_multiplies_them(dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(linear_module, "_multiplies_fp16", lambda: True)
    assert messages(dtype, lambda: module()(*INPUTS)) == []


def test_compiled_and_exported_graphs_are_whole(dtype):
    attention = module()

    def step():
        graph = torch.compile(attention, fullgraph=True, backend="aot_eager")
        graph(*INPUTS).float().sum().backward()
        torch.export.export(attention, INPUTS)

    assert messages(dtype, step) == []
    assert attention.value_proj.weight.grad is not None
