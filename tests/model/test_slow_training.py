# SPDX-License-Identifier: Apache-2.0
"""Models say where 16-bit autocast trains slower than fp32."""

from __future__ import annotations

import pytest
import torch

import vitadapter_ops.linear
from families import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_models_ask_whether_autocast_is_slow_when_they_train(family, monkeypatch):
    asked = []
    monkeypatch.setattr(vitadapter_ops.linear, "_warn_if_slow", asked.append)
    model, images = build(family), torch.randn(2, 3, 64, 64)
    model(images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert asked == []
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert asked
    assert set(asked) == {torch.bfloat16}
