# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_distributed_attention.py do; started by torch.multiprocessing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from vitadapter_ops import MSDeformAttn
from vitadapter_ops.testing.tolerances import (
    SPREAD_BF16_OUTPUT_SHARE,
    SPREAD_BF16_PARAMETER_SHARE,
    SPREAD_FP64_SHARE,
)

IMAGES = 4
SHAPES = [(4, 4), (2, 2)]


class Block(nn.Module):
    """Two modules after each other, the second with a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MSDeformAttn(16, 2, 4, 3), MSDeformAttn(16, 2, 4, 3, ratio=0.5)
        self.second.value_proj.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        points = x.new_full((1, x.shape[1], 1, 2), 0.4)
        x = x + self.first(x, points, x, SHAPES)
        return x + self.second(x, points, x, SHAPES)


def build() -> Block:
    """The same weights in every process; fp64, so that the order of sums does not show."""
    torch.manual_seed(0)
    block = Block()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block.double()


def batch() -> Tensor:
    return torch.randn(IMAGES, 20, 16, generator=torch.Generator().manual_seed(1)).double()


def step(block: nn.Module, x: Tensor) -> None:
    """One step on the mean over the images, whose mean over processes is that of the batch."""
    block(x).sin().sum((1, 2)).mean().backward()
    update(block)


def update(block: nn.Module) -> None:
    parameters = [p for p in block.parameters() if p.requires_grad]
    torch.optim.SGD(parameters, lr=0.1).step()


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def replicated(**options: bool) -> Callable[[Block, DeviceMesh], nn.Module]:
    def run(block: Block, mesh: DeviceMesh) -> nn.Module:
        step(DistributedDataParallel(block, **options), mine(batch()))
        return block

    return run


def accumulated(block: Block, mesh: DeviceMesh) -> nn.Module:
    """Two halves of a process's images, the gradients exchanged with the second."""
    parallel = DistributedDataParallel(block)
    halves = mine(batch()).chunk(2)
    with parallel.no_sync():
        (parallel(halves[0]).sin().sum((1, 2)).mean() / 2).backward()
    (parallel(halves[1]).sin().sum((1, 2)).mean() / 2).backward()
    update(block)
    return block


def sharded(parts: str, **options: bool) -> Callable[[Block, DeviceMesh], nn.Module]:
    """fully_shard of the whole, of each module, or of each layer, and of what remains."""

    def run(block: Block, mesh: DeviceMesh) -> nn.Module:
        kinds = {"whole": (), "modules": (MSDeformAttn,), "layers": (MSDeformAttn, nn.Linear)}
        inner_first = list(block.modules())[:0:-1]
        for part in inner_first:
            if isinstance(part, kinds[parts]):
                fully_shard(part, mesh=mesh, **options)
        step(fully_shard(block, mesh=mesh, **options), mine(batch()))
        return block

    return run


def sharded_in_16_bits(block: Block, mesh: DeviceMesh) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    step(fully_shard(block.float(), mesh=mesh, mp_policy=policy), mine(batch().float()))
    return block


def tensor_parallel(block: Block, mesh: DeviceMesh) -> nn.Module:
    """The rows of each weight on their own process, the whole batch on all."""
    plan = {
        name: ColwiseParallel(output_layouts=Replicate())
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    parallelize_module(block, mesh, plan)
    step(block, batch())
    return block


FORMS = {
    "DDP": replicated(),
    "DDP, static graph": replicated(static_graph=True),
    "DDP, gradients in buckets": replicated(gradient_as_bucket_view=True),
    "DDP, accumulated": accumulated,
    "FSDP2, whole": sharded("whole"),
    "FSDP2, modules": sharded("modules"),
    "FSDP2, layers": sharded("layers"),
    "FSDP2, layers kept": sharded("layers", reshard_after_forward=False),
    "FSDP2, bf16": sharded_in_16_bits,
    "tensor parallel": tensor_parallel,
}


def run(rank: int) -> None:
    """Holds a step in each form, and inference after it, to those without other processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    single = build()
    before = {name: value.clone() for name, value in single.state_dict().items()}
    step(single, batch())
    expected = single.state_dict()
    assert sum(not torch.equal(expected[name], before[name]) for name in before) >= 14
    for form, train in FORMS.items():
        block = train(build(), mesh)
        in_16_bits = "bf16" in form
        share = SPREAD_BF16_PARAMETER_SHARE if in_16_bits else SPREAD_FP64_SHARE
        for name, value in block.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            assert_close(f"{form}: {name}", whole.double(), expected[name], share)
        with torch.no_grad():
            dtype = next(block.parameters()).dtype
            out = block(batch().to(dtype)).double()
            share = SPREAD_BF16_OUTPUT_SHARE if in_16_bits else SPREAD_FP64_SHARE
            assert_close(f"{form}: output", out, single(batch()), share)


def assert_close(name: str, got: Tensor, expected: Tensor, share: float) -> None:
    error = (got - expected).norm() / expected.norm()
    assert error <= share, f"{name}: {error:.3g}"
