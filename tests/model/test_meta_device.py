# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and models whose tensors have no values."""

from __future__ import annotations

import pytest
import torch

from families import build
from vitadapter import load_checkpoint


def _on_meta(family: str = "plain"):
    return build(family).to("meta")


def test_loading_into_a_model_without_values_is_refused():
    state = build("plain").state_dict()
    with pytest.raises(
        ValueError,
        match=r"model: expected tensors that have values, got (\d+) of \1 on "
        r"the meta device \(.*\); call model\.to_empty",
    ):
        load_checkpoint(_on_meta(), state)


@pytest.mark.parametrize("part", ["up", "blocks", "norm1"])
def test_loading_into_a_model_with_a_part_without_values_is_refused(part):
    model = build("plain")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    getattr(model, part).to("meta")
    with pytest.raises(
        ValueError, match=rf"model: .* got \d+ of \d+ on the meta device \({part}\."
    ):
        load_checkpoint(model, state)


def test_a_checkpoint_without_values_is_refused():
    model = build("plain")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="checkpoint: expected tensors that have values, got"):
        load_checkpoint(model, _on_meta().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_was_given_memory_is_loaded():
    state = build("plain").state_dict()
    model = _on_meta().to_empty(device="cpu")
    assert load_checkpoint(model, state, strict=True).missing == ()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
