# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_distributed.py do; started by torch.multiprocessing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
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
DIMS = (0, 2, 3)  # of what a batch norm averages over


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
    maps = model(images)
    return sum((index + 1) * m.sin().sum((1, 2, 3)).mean() for index, m in enumerate(maps))


def step(model: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, images).backward()
    optimizer.step()


# What torch.nn.SyncBatchNorm calls, and torch has for GPUs only. Its module, autograd function and
# collectives then run as they are. x is [B, C, H, W].


def batch_norm_stats(x, eps):
    """Mean and 1 / standard deviation of this rank's channels."""
    return x.mean(DIMS), (x.var(DIMS, correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, means, invstds, mean, var, momentum, eps, counts):
    """The same of all ranks together, from those of each; updates the running ones."""
    share = (counts / counts.sum())[:, None]
    all_mean = (share * means).sum(0)
    all_var = (share * (invstds**-2 - eps + means**2)).sum(0) - all_mean**2
    mean.lerp_(all_mean, momentum)
    var.lerp_(all_var * counts.sum() / (counts.sum() - 1), momentum)
    return all_mean, (all_var + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    """Normalises."""
    return (x - _map(mean)) * _map(invstd * weight) + _map(bias)


def batch_norm_backward_reduce(grad, x, mean, invstd, weight, *needed):
    """Sums over this rank, and the gradients of weight and bias."""
    grad_bias, product = grad.sum(DIMS), (grad * (x - _map(mean))).sum(DIMS)
    return grad_bias, product, product * invstd, grad_bias


def batch_norm_backward_elemt(grad, x, mean, invstd, weight, grad_sum, product, counts):
    """The gradient of x from the sums over all ranks."""
    constant, slope = grad_sum / counts.sum(), invstd**2 * product / counts.sum()
    return (grad - _map(constant) - (x - _map(mean)) * _map(slope)) * _map(invstd * weight)


def _map(channels: Tensor) -> Tensor:
    return channels[:, None, None]


@contextmanager
def _sync_batch_norm_on_cpu() -> Iterator[None]:
    """Lets torch.nn.SyncBatchNorm run on a CPU, which it and DistributedDataParallel refuse."""
    library = torch.library.Library("aten", "IMPL")
    for function in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):
        library.impl(function.__name__, function, "CPU")
    forward = nn.SyncBatchNorm.forward

    def on_cpu(module: nn.Module, x: Tensor) -> Tensor:
        # Besides GPUs it takes the type of device that a plug-in of torch names.
        with mock.patch("torch._C._get_privateuse1_backend_name", return_value="cpu"):
            return forward(module, x)

    check = mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle")
    with check, mock.patch.object(nn.SyncBatchNorm, "forward", on_cpu):
        yield


def data_parallel(rank: int, folder: Path) -> None:
    """One step under DistributedDataParallel; rank 0 saves the state after it."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    with _sync_batch_norm_on_cpu():
        step(DistributedDataParallel(model), global_batch().chunk(RANKS)[rank])
    if rank == 0:
        torch.save(model.state_dict(), folder / "state.pth")


def data_parallel_warnings(rank: int, folder: Path) -> None:
    """Saves what a user is told in two steps of fp32, whose convolutions are oneDNN's."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = DistributedDataParallel(build().float())
        for _ in range(2):
            step(model, global_batch().float())
    if rank == 0:
        torch.save([str(each.message) for each in told], folder / "warnings.pth")


def fully_sharded(rank: int, folder: Path) -> None:
    """One step with each interaction, each ViT block and the rest sharded on their own.

    Batch statistics are those of a rank, so both ranks see the same images here.
    """
    model = build()
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in (*model.blocks, *model.interactions, model):
        fully_shard(part, mesh=mesh)
    step(model, global_batch())
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    if rank == 0:
        torch.save(state, folder / "state.pth")


PARTS = (
    *("spm", "spm.stem", "spm.stem.0", "spm.stem.1", "spm.conv2", "spm.fc1", "up", "norm1"),
    *("patch_embed", "blocks.0", "blocks.0.attn", "blocks.0.attn.qkv", "blocks.0.mlp"),
    *("interactions.0", "interactions.0.injector", "interactions.0.injector.attn"),
    *("interactions.3", "interactions.3.extractor", "interactions.3.extractor.attn"),
    *("interactions.3.extractor.ffn", "interactions.3.extractor.ffn.dwconv.dwconv"),
    "interactions.3.extractor.attn.sampling_offsets",
)
# torch.nn.Linear itself returns a view, and upsampling one of what it moved.
VIEWS = ("qkv", "up", "sampling_offsets")


def each_part_sharded(rank: int, folder: Path) -> None:
    """The loss and the gradients' length of each part sharded alone, beside the whole model."""
    mesh = init_device_mesh("cpu", (RANKS,))
    results = {}
    for part in (None, *PARTS):
        model = build()
        if part is not None:
            fully_shard(model.get_submodule(part), mesh=mesh)
            fully_shard(model, mesh=mesh)
        with warnings.catch_warnings():
            if part is None or part.rpartition(".")[2] not in VIEWS:
                warnings.filterwarnings("error", "FSDP2-wrapped module .* returned a view")
            loss = loss_of(model, global_batch())
            loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
        length = torch.stack([grad.norm() for grad in whole]).norm()
        results[part] = torch.stack([loss.detach(), length])
    if rank == 0:
        torch.save(results, folder / "results.pth")


def wait(rank: int) -> None:
    """Far longer than any limit."""
    time.sleep(1e4)


def fail(rank: int, *others: object) -> None:
    """In one process only; the other goes on."""
    if rank == 1:
        raise ValueError(f"{rank} wrong")
    wait(rank)


def fail_beside_a_collective(rank: int) -> None:
    """In one process only; the other waits for it."""
    if rank == 1:
        raise ValueError(f"{rank} wrong")
    dist.barrier()
