# SPDX-License-Identifier: Apache-2.0
"""What tests may do without: packages, and a GPU."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch


def require_integration(module: str) -> ModuleType:
    """Imports another project, or skips; with REQUIRE_INTEGRATIONS=1 it must be there."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        if os.environ.get("REQUIRE_INTEGRATIONS") == "1":
            pytest.fail(f"REQUIRE_INTEGRATIONS=1, and {module} is not importable: {missing}")
        pytest.skip(f"needs {module.split('.')[0]}: {missing}")


def require_cuda() -> None:
    """Skips without a GPU, unless FAIL_WITHOUT_CUDA says that there must be one."""
    if not torch.cuda.is_available():
        if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail("FAIL_WITHOUT_CUDA=1, and torch sees no GPU")
        pytest.skip("needs a GPU")
