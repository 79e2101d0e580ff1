# SPDX-License-Identifier: Apache-2.0
"""Linear layers by oneDNN are torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitadapter.layers import linear


@pytest.mark.parametrize("shape", [(2, 5, 8), (0, 8), (8,), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_product_is_that_of_torch(shape, bias):
    layer = linear.Linear(8, 6, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_tokens_that_are_not_contiguous_are_served():
    layer, x = linear.Linear(8, 6), torch.randn(2, 8, 5).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_gradients_and_other_dtypes_go_to_torch(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)  # calling it would raise
    layer, x = linear.Linear(8, 6), torch.randn(5, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert layer.double()(x.double()).dtype == torch.float64
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with pytest.raises(TypeError):
            layer(x)
