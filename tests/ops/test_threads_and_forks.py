# SPDX-License-Identifier: Apache-2.0
"""Modules that serve several threads at once, and processes forked after threads were used."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader

from vitadapter_ops import MSDeformAttn, _extension

THREADS = 4


@pytest.fixture(autouse=True)
def _two_threads(threads):
    """The kernels' own threads."""
    threads(2)


def inputs(index):
    """Of a size of its own for each index."""
    shapes = [(6 + index, 9), (3, 5 + index)]
    pixels = sum(height * width for height, width in shapes)
    generator = torch.Generator().manual_seed(index)
    make = torch.rand(1, 8, 2, 2, generator=generator)
    query, feature = (torch.randn(1, n, 32, generator=generator) for n in (8, pixels))
    return query, make, feature, shapes


def attention():
    module = MSDeformAttn(32, 2, 4, 3)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    return module.eval()


def test_four_threads_serve_at_once():
    module = attention()

    def serve(index):
        with torch.no_grad():  # each thread has a mode of its own
            return module(*inputs(index % 8))

    expected = [serve(index) for index in range(8)]
    with ThreadPoolExecutor(THREADS) as pool:
        for index, got in enumerate(pool.map(serve, range(200))):
            assert torch.equal(got, expected[index % 8])


def test_four_threads_train_copies_at_once():
    modules = [attention() for _ in range(THREADS)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())

    def train(module):
        for index in range(8):
            module(*inputs(index)).sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    expected = train(modules[0])
    for parameter in modules[0].parameters():
        parameter.grad = None
    with ThreadPoolExecutor(THREADS) as pool:
        for got in pool.map(train, modules):
            for mine, theirs in zip(got, expected, strict=True):
                assert torch.equal(mine, theirs)


class Outputs(torch.utils.data.Dataset):
    """What a module makes of inputs, and the gradients of its parameters, as samples."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.module.zero_grad()
        out = self.module(*inputs(index))
        out.sum().backward()
        with torch.no_grad():
            without = self.module(*inputs(index))
        return out.detach(), without, *[p.grad.clone() for p in self.module.parameters()]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_forked_after_threads_were_used_compute_the_same():
    """As a loader of data that runs a model; torch gives its workers one thread each."""
    samples = Outputs(attention())
    expected = [samples[index] for index in range(len(samples))]
    loader = DataLoader(
        samples, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for got, theirs in zip(loader, expected, strict=True):
        for mine, its in zip(got, theirs, strict=True):
            torch.testing.assert_close(mine, its)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_a_worker_forked_while_another_thread_compiles_does_not_wait_for_it():
    compiling, forked = threading.Event(), threading.Event()

    def compile_for_long():
        with _extension._lock:
            compiling.set()
            forked.wait(60)

    thread = threading.Thread(target=compile_for_long)
    thread.start()
    compiling.wait()
    child = multiprocessing.get_context("fork").Process(target=_extension.load, args=("cpu",))
    child.start()
    child.join(30)
    try:
        assert child.exitcode == 0
    finally:
        forked.set()
        thread.join()
        child.kill()
