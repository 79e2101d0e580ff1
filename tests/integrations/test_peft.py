# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft on MSDeformAttn: it puts a module of its own in the place of a layer."""

import pytest
import torch
from torch import nn

from optional import require_integration
from vitadapter_ops import MSDeformAttn
from vitadapter_ops.testing import tolerances

LAYERS = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
INPUTS = (torch.randn(1, 5, 16), torch.rand(1, 5, 2, 2), torch.randn(1, 20, 16), [(4, 4), (2, 2)])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MSDeformAttn(16, 2, 4, 3)

    def forward(self, *inputs):
        return self.attention(*inputs)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("layers", [LAYERS, LAYERS[:1], LAYERS[2:3]], ids="+".join)
def test_adapters_are_used_and_merge(layers, grad):
    peft = require_integration("peft")
    base = Model()
    before = base(*INPUTS)
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    with torch.set_grad_enabled(grad):
        adapted = model(*INPUTS)
    assert not torch.allclose(adapted, before)
    if grad:
        adapted.sum().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * len(layers)
    merged = model.merge_and_unload()
    assert all(type(layer) is nn.Linear for layer in merged.attention.children())
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(merged(*INPUTS), adapted, **tolerances.CLOSE)
