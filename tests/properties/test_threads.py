# SPDX-License-Identifier: Apache-2.0
"""Several threads at once: each gets what it gets alone, bit for bit."""

import threading

import pytest
import torch

import cumo_kernels as ck
from cumo.nn import MoEMLP
from cumo_kernels.backend import backend_for
from cumo_kernels.kernels.launch import record_launches
from tests.numerics import assert_bitwise_equal
from tests.properties.jobs import in_threads, work


def on_a_stream(job):
    """The job on a stream of its own."""

    def run():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            results = job()
        stream.synchronize()
        return results

    return run


def assert_same_as_alone(jobs, repeats):
    alone = [job() for job in jobs]
    for expected, results in zip(alone, in_threads(jobs, repeats), strict=True):
        assert len(results) == repeats
        for actual in results:
            assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("count", [2, 4])
def test_layers_and_operations(count, backend, device):
    place = str(device) if backend == "triton" else "cpu"
    assert_same_as_alone([lambda seed=seed: work(backend, seed, place) for seed in range(count)], repeats=4 // count)


@pytest.mark.gpu
def test_streams_of_two_threads(device):
    with ck.use_backend("triton"):
        jobs = [on_a_stream(lambda seed=seed: work("triton", seed, str(device), scale=32)) for seed in range(2)]
        assert_same_as_alone(jobs, repeats=20)


@pytest.mark.usefixtures("backend")
def test_one_layer_for_all(device):
    moe = MoEMLP(12, 20, num_experts=4, top_k=2).to(device)
    inputs = [torch.randn(5 + 7 * index, 12, device=device, requires_grad=True) for index in range(2)]

    def step(x):
        y, routing = moe(x)
        grads = torch.autograd.grad(y.square().sum() + routing.z_S.sum(), [x, *moe.parameters()])
        return {"y": y.detach(), **{str(index): grad for index, grad in enumerate(grads)}}

    assert_same_as_alone([lambda x=x: step(x) for x in inputs], repeats=2)


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # Dynamo, of its own accord
@pytest.mark.usefixtures("backend")
def test_a_compiled_layer_for_all(device):
    moe = MoEMLP(12, 20, num_experts=4, top_k=2).to(device)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = [torch.randn(5 + 7 * index, 12, device=device) for index in range(2)]
    for x in inputs:
        x.requires_grad_()
        compiled(x)  # Dynamo itself compiles in one thread at a time

    def step(x):
        y, _ = compiled(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])
        return {"y": y.detach(), **{str(index): grad for index, grad in enumerate(grads)}}

    assert_same_as_alone([lambda x=x: step(x) for x in inputs], repeats=2)


def test_autocast_is_of_its_thread_and_the_backend_of_the_process(device):
    """The latter since backward passes run in threads of their own, and since torch.compile can guard it."""
    seen = []

    def look():
        seen.append((backend_for(torch.zeros(1, device=device)), torch.is_autocast_enabled(device.type)))

    with ck.use_backend("triton"), torch.autocast(device.type, dtype=torch.bfloat16):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [("triton", False)]


def test_launches_of_every_thread_are_recorded(device):
    x = torch.randn(9, 12, device=device)
    layers = [MoEMLP(12, 20, num_experts=4, top_k=2).to(device) for _ in range(2)]
    with ck.use_backend("triton"), record_launches() as alone:
        layers[0](x)
    with ck.use_backend("triton"), record_launches() as together:
        in_threads([lambda moe=moe: moe(x)[1]._asdict() for moe in layers])
    assert len(together) == 2 * len(alone) > 0
