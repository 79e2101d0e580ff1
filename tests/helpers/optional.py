# SPDX-License-Identifier: Apache-2.0
"""What tests may do without: packages, a GPU, and in the quick tier most of a sweep."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
import torch


def require_integration(module: str) -> ModuleType:
    """Imports another project, or skips; REQUIRE_INTEGRATIONS may say that it must be there."""
    project = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        required = os.environ.get("REQUIRE_INTEGRATIONS", "")
        if is_required(project, required):
            pytest.fail(
                f"REQUIRE_INTEGRATIONS={required}, and {module} is not importable: {missing}"
            )
        pytest.skip(f"needs {project}: {missing}")


def is_required(project: str, setting: str) -> bool:
    """Whether REQUIRE_INTEGRATIONS names a project: "1" for all, or "transformers,onnx"."""
    named = {each.strip() for each in setting.split(",")}
    return "1" in named or project in named


def require_cuda() -> None:
    """Skips without a GPU, unless FAIL_WITHOUT_CUDA says that there must be one."""
    if not torch.cuda.is_available():
        if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail("FAIL_WITHOUT_CUDA=1, and torch sees no GPU")
        pytest.skip("needs a GPU")


def sweep(values: Iterable[Any], *quick: str) -> list[Any]:
    """Parameters of a test, by their names; all but those named are `exhaustive`."""
    named = {str(value): value for value in values}
    assert named.keys() >= set(quick), f"none of {list(named)}: {set(quick) - named.keys()}"
    marks = {name: () if name in quick else pytest.mark.exhaustive for name in named}
    return [pytest.param(value, id=name, marks=marks[name]) for name, value in named.items()]
