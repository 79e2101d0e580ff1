# SPDX-License-Identifier: Apache-2.0
"""Which missing projects are an error, and which only skip."""

import pytest
from optional import require_integration

MISSING = "no_such_project.part"


@pytest.mark.parametrize("setting", ["1", "no_such_project", "transformers, no_such_project"])
def test_a_required_project_must_be_there(monkeypatch, setting):
    monkeypatch.setenv("REQUIRE_INTEGRATIONS", setting)
    with pytest.raises(pytest.fail.Exception, match=r"no_such_project\.part is not importable"):
        require_integration(MISSING)


@pytest.mark.parametrize("setting", ["", "0", "transformers,onnx"])
def test_another_project_is_skipped(monkeypatch, setting):
    monkeypatch.setenv("REQUIRE_INTEGRATIONS", setting)
    with pytest.raises(pytest.skip.Exception, match="needs no_such_project"):
        require_integration(MISSING)
