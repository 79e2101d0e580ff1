# SPDX-License-Identifier: Apache-2.0
"""Packages that tests may do without."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def require_integration(module: str) -> ModuleType:
    """Imports another project, or skips; with REQUIRE_INTEGRATIONS=1 it must be there."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        if os.environ.get("REQUIRE_INTEGRATIONS") == "1":
            pytest.fail(f"REQUIRE_INTEGRATIONS=1, and {module} is not importable: {missing}")
        pytest.skip(f"needs {module.split('.')[0]}: {missing}")
