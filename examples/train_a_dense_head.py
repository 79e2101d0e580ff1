# SPDX-License-Identifier: Apache-2.0
"""A step of semantic segmentation: a ViT-Adapter under a head of one convolution per map."""

import torch
import torch.nn.functional as F
from torch import nn

from vitadapter import create_model

CLASSES = 19
torch.manual_seed(0)
# checkpoint= takes a pre-trained ViT's file; without it all weights are random.
backbone = create_model("vit_adapter_tiny", task="segmentation")
heads = nn.ModuleList(nn.LazyConv2d(CLASSES, 1) for _ in range(4))
images, labels = torch.randn(2, 3, 96, 128), torch.randint(CLASSES, (2, 96, 128))


def loss() -> torch.Tensor:
    maps = backbone(images)  # strides 4, 8, 16, 32
    size = images.shape[2:]
    logits = sum(
        F.interpolate(head(each), size, mode="bilinear")
        for head, each in zip(heads, maps, strict=True)
    )
    return F.cross_entropy(logits, labels)


first = loss()  # also what makes the heads' weights
optimizer = torch.optim.AdamW([*backbone.parameters(), *heads.parameters()], lr=1e-4)
first.backward()
optimizer.step()
print(f"loss {first.item():.3f}, after a step {loss().item():.3f}")
