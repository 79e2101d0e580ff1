# SPDX-License-Identifier: Apache-2.0
"""Graphs by torch.jit.trace."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, build
from optional import require_integration
from vitadapter import ViTAdapter

pytestmark = pytest.mark.filterwarnings(
    # Sizes become constants, and torch would rather compile.
    "ignore:Converting a tensor to a Python",
    "ignore:Iterating over a tensor",
    "ignore:`torch.jit.trace",
)
MODELS = [(family, {}) for family in FAMILIES]
MODELS += [("plain", {"attention": attention}) for attention in ("dense", "cswin")]
# Nothing in these asks for Python's numbers.
ANY_SIZE = ("spm", "baseline", "vitdet")


def _trace(model, *size: int):
    with torch.no_grad():
        return torch.jit.trace(model, torch.randn(*size), check_trace=False)


def _assert_same(traced, model, *size: int) -> None:
    images = torch.randn(*size)
    with torch.no_grad():
        for got, expected in zip(traced(images), model(images), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("family", "options"), MODELS, ids=str)
def test_a_traced_model_is_right_for_every_size_that_it_takes(family, options):
    model = build(family, **options).eval()
    traced = _trace(model, 2, 3, 64, 64)
    for batch in (1, 3):
        _assert_same(traced, model, batch, 3, 64, 64)
    refused = {}
    # The second has as many tokens, the last as many after padding.
    for size in ((96, 96), (32, 128), (32, 32), (64, 33)):
        try:
            _assert_same(traced, model, 1, 3, *size)
        except RuntimeError as error:
            refused[size] = str(error)
    assert all("The expanded size of the tensor" in error for error in refused.values())
    if family in ANY_SIZE or "attention" in options:
        assert refused == {}
    else:
        assert {(96, 96), (32, 128), (32, 32)} <= refused.keys()


def test_a_traced_model_pads_and_crops():
    model = build("plain").eval()
    _assert_same(_trace(model, 1, 3, 70, 101), model, 2, 3, 70, 101)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "beit_base_patch16_224"])
def test_an_adapter_around_timm_traces(name):
    require_integration("timm")
    sizes = {"depth": 4, "embed_dim": 96, "num_heads": 3}
    model = ViTAdapter.from_timm(
        name, task="segmentation", img_size=64, model_args=sizes, conv_inplane=8
    ).eval()
    traced = _trace(model, 2, 3, 64, 64)
    _assert_same(traced, model, 3, 3, 64, 64)
    with pytest.raises(RuntimeError, match="The expanded size of the tensor"):
        traced(torch.randn(1, 3, 128, 32))
