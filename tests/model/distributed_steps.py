# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_distributed.py do; started by torch.multiprocessing."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vitadapter

SMALL = {
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "conv_inplane": 8,
    "pretrain_size": 64,
    "drop_path_rate": 0.0,
}
RANKS = 2


def build() -> nn.Module:
    """The same weights in every process; nothing is zero, so that all parts take part."""
    torch.manual_seed(0)
    model = vitadapter.create_model("vit_adapter_tiny", task="segmentation", **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double()


def global_batch() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    """A mean over the batch, so that the mean over ranks is that of the whole batch."""
    return sum((index + 1) * m.sin().mean() for index, m in enumerate(model(images)))


def step(model: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, images).backward()
    optimizer.step()


class _GlooSyncBatchNorm(nn.BatchNorm2d):
    """In the place of SyncBatchNorm, which refuses CPUs: batch statistics over all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = distributed.all_reduce(x.mean((0, 2, 3), keepdim=True)) / RANKS
        variance = distributed.all_reduce((x - mean).square().mean((0, 2, 3), keepdim=True)) / RANKS
        x = (x - mean) / (variance + self.eps).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def _join(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)


def data_parallel(rank: int, folder: Path) -> None:
    """One step under DistributedDataParallel; rank 0 saves the weights after it."""
    _join(rank, folder)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = _GlooSyncBatchNorm
    wrapped = DistributedDataParallel(model)
    step(wrapped, global_batch().chunk(RANKS)[rank])
    if rank == 0:
        torch.save(dict(model.named_parameters()), folder / "weights.pth")
    dist.destroy_process_group()


def fully_sharded(rank: int, folder: Path) -> None:
    """One step with each interaction, each ViT block and the rest sharded on their own.

    Batch statistics are those of a rank, so both ranks see the same images here.
    """
    _join(rank, folder)
    model = build()
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in (*model.blocks, *model.interactions, model):
        fully_shard(part, mesh=mesh)
    step(model, global_batch())
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(weights, folder / "weights.pth")
    dist.destroy_process_group()
