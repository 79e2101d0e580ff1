# SPDX-License-Identifier: Apache-2.0
"""Modules whose weights torchao quantised: nn.Linear stays, its weight is of another type."""

import copy

import pytest
import torch
from optional import require_integration
from torch import nn

from vitadapter_ops import MSDeformAttn
from vitadapter_ops.compat.transformers import patch_transformers

CONFIGS = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "IntxWeightOnlyConfig",
    "Int8DynamicActivationIntxWeightConfig",
)
SHAPES = [(6, 5), (3, 4)]

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own deprecations


@pytest.fixture(params=CONFIGS)
def quantised(request):
    """Quantises a module in place."""
    quantization = require_integration("torchao.quantization")
    config = getattr(quantization, request.param)()
    return lambda module: quantization.quantize_(module, config)


def with_seen_offsets(module):
    for name in ("sampling_offsets", "attention_weights"):
        nn.init.normal_(module.get_submodule(name).weight, std=0.05)
    return module.eval()


@pytest.mark.parametrize("grad", [True, False])
def test_quantised_attention_is_its_layers_one_after_the_other(quantised, grad):
    attention = with_seen_offsets(MSDeformAttn(64, 2, 4, 4))
    inputs = torch.randn(1, 3, 64), torch.rand(1, 3, 2, 2), torch.randn(1, 42, 64), SHAPES
    full = attention(*inputs)
    quantised(attention)
    with torch.set_grad_enabled(grad):
        got = attention(*inputs)
        for layer in attention.children():
            layer.register_forward_hook(lambda *_: None)  # hooked layers are called
        assert torch.equal(got, attention(*inputs))
    assert 0 < (got - full).norm() < 0.05 * full.norm()


def test_patched_attention_of_transformers_is_the_unpatched_one(quantised):
    require_integration("transformers")
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr import modeling_deformable_detr as modeling

    config = DeformableDetrConfig(d_model=64, num_feature_levels=2)
    attention = modeling.DeformableDetrMultiscaleDeformableAttention(config, 4, 4)
    attention = with_seen_offsets(attention)
    quantised(attention)
    arguments = {
        "hidden_states": torch.randn(1, 3, 64),
        "encoder_hidden_states": torch.randn(1, 42, 64),
        "reference_points": torch.rand(1, 3, 2, 2),
        "spatial_shapes": torch.tensor(SHAPES),
        "spatial_shapes_list": SHAPES,
        "level_start_index": torch.tensor([0, 30]),
    }
    with torch.no_grad():
        expected = copy.deepcopy(attention)(**arguments)
        with patch_transformers("deformable_detr"):
            got = attention(**arguments)
    # Codes of 8 bits of what comes into a layer may fall to the neighbouring one.
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).norm() < 0.01 * theirs.norm()
