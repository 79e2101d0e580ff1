# SPDX-License-Identifier: Apache-2.0
"""What every test shares: fixed seeds, and the one place that decides what may be skipped."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch

import children
import vitadapter_ops
from optional import require_cuda

# One of several processes of pytest-xdist, and its children: a thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

if children.INTERPRETED:
    children.patch_triton_once_a_launch()

# For `benchmarks`. Last, so that an installed package comes before the checkout's.
sys.path.append(str(children.ROOT))


# Those with tests of a minute.
_LONG = ("test_triton_interpreted", "test_mutants", "test_cuda_compiles", "test_install")


def pytest_collection_modifyitems(items):
    """Long ones first: at the end no process of pytest-xdist is left alone with one."""
    items.sort(key=lambda item: not item.path.stem.startswith(_LONG))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads; what it was comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New tensors start as NaN, so that reading what was never written shows.

    torch fills them in deterministic mode only, which would put the reference's backward in the
    place of a GPU's kernels: whoever asks is told that the mode is off.
    """
    mode = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    # Only a warning from an operator of eager torch that has no deterministic way.
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = mode


def _backends() -> list:
    """(device, backend): every backend on every device that there is, or must be."""
    pairs = [("cpu", "reference"), ("cpu", "cpu")]
    if torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pairs += [("cuda", "reference"), ("cuda", "cuda"), ("cuda", "triton")]
    if children.INTERPRETED:
        pairs = [("cpu", "triton")]
    return [
        pytest.param(
            (device, name),
            marks=[pytest.mark.gpu] if device == "cuda" else [],
            id=f"{name}-on-{device}",
        )
        for device, name in pairs
    ]


@pytest.fixture(params=_backends())
def backend(request) -> tuple[str, str]:
    device, name = request.param
    if device == "cuda":
        require_cuda()
    if name not in vitadapter_ops.available_backends():
        if name == "triton":
            pytest.fail(vitadapter_ops.explain_backend(device))
        if shutil.which(os.environ.get("CXX", "c++")) is not None:
            pytest.fail(vitadapter_ops.explain_backend(device))
        pytest.skip("needs a C++ compiler")
    return device, name
