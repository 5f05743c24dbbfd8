# SPDX-License-Identifier: Apache-2.0
"""A piece of work whose result is the same to the bit wherever it is done, and places to do it: threads, forks, fresh
processes, workers of a DataLoader. `tests.properties.test_processes` calls these in processes of their own."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

PATIENCE = 100.0  # seconds for what takes a few, so that waiting for ever is a failure


def work(backend: str, seed: int = 0, device: str = "cpu", scale: int = 1) -> dict[str, Tensor]:
    """A layer and every operation by itself, forward and backward. Imports the package, if nobody has yet.

    The backend is that of the caller, who may be one of several threads; `backend` says which it is, and is checked.
    """
    import cumo_kernels as ck
    from cumo.nn import MoEMLP
    from cumo_kernels.backend import backend_for

    generator = torch.Generator().manual_seed(seed)
    T, D, F, O, E = (9 + 5 * seed) * scale, (12 + seed) * scale, (20 + 3 * seed) * scale, (7 + seed) * scale, 3 + seed
    moe = MoEMLP(D, F, O, num_experts=E, top_k=2, activation="silu", gated=True)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * D**-0.5)
    moe = moe.to(device)
    x = torch.randn(T, D, generator=generator).to(device).requires_grad_()
    dy, dout = (torch.randn(T, width, generator=generator).to(device) for width in (O, F))
    assert backend_for(x) == backend
    y, routing = moe(x)
    leaves = [x, *moe.parameters()]
    grads = torch.autograd.grad((y, routing.balance_S, routing.z_S), leaves, (dy, *torch.ones(2, 1, device=device)))
    plan = ck.plan_dispatch(routing.expert_TK, E)
    h = ck.grouped_gemm(ck.permute(x, plan), moe.up_proj[:, :F], plan, activation="gelu")
    out = ck.combine(h, ck.topk_gating(x[:, :E], 2).weight_TK, plan)
    results = [y, *routing, *grads, *plan, out, *torch.autograd.grad(out, [x, moe.up_proj], dout)]
    return {str(index): result.detach() for index, result in enumerate(results)}


def digest(backend: str, seed: int = 0) -> str:
    """The bits of what `work` gives on this backend in one thread of torch: with more, a product may be summed in
    another order, and the threads of OpenMP do not survive a fork, so that a child that wants them waits for ever."""
    from cumo_kernels import use_backend

    torch.set_num_threads(1)
    with use_backend(backend):
        return digest_of(work(backend, seed))


def digest_of(results: dict[str, Tensor]) -> str:
    """The bits of all results."""
    return hashlib.sha256(b"".join(result.contiguous().numpy().tobytes() for result in results.values())).hexdigest()


def in_threads(jobs: list[Callable[[], dict[str, Tensor]]], repeats: int = 1) -> list[list[dict[str, Tensor]]]:
    """What each job gives, time after time, while the others run in threads beside it; they all start at once.

    Raises:
        Exception: the first that a job raised.
    """
    results: list[list[dict[str, Tensor]]] = [[] for _ in jobs]
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def run(index: int) -> None:
        try:
            barrier.wait(PATIENCE)
            for _ in range(repeats):
                results[index].append(jobs[index]())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(jobs))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as many turns as there can be
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    return results


def first_use_in_threads(backend: str) -> None:
    """Four threads that all import the package, compile and run its operators for the first time."""
    os.environ["CUMO_BACKEND"] = backend
    assert not any(name.partition(".")[0] in ("cumo", "cumo_kernels", "triton") for name in sys.modules)
    torch.set_num_threads(1)
    together = in_threads([lambda seed=seed: work(backend, seed) for seed in range(4)])  # type: ignore[misc]
    for seed, (results,) in enumerate(together):
        assert digest_of(results) == digest(backend, seed), f"another result in thread {seed}"


def _in_a_fork(backend: str, expected: str) -> None:
    child = os.fork()
    if child == 0:
        os._exit(int(digest(backend) != expected))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "another result in the child"


def fork(backend: str) -> None:
    """Children forked after the import, after use, after use by several torch threads, and while a thread is at it."""
    import cumo_kernels  # noqa: F401  (before the first fork)

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        expected = pool.apply(digest, (backend,))  # before this process did anything
    _in_a_fork(backend, expected)
    assert digest(backend) == expected
    _in_a_fork(backend, expected)
    busy_torch()
    _in_a_fork(backend, expected)
    stop, started = threading.Event(), threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            digest(backend)
            started.set()

    thread = threading.Thread(target=go_on)
    thread.start()
    assert started.wait(PATIENCE)
    _in_a_fork(backend, expected)
    stop.set()
    thread.join()


def busy_torch() -> None:
    """Lets several threads of torch do something."""
    torch.set_num_threads(2)
    x = torch.randn(600, 600)
    torch.nn.functional.gelu(x @ x).sum()


def spawn(backend: str) -> None:
    """Two fresh processes at once."""
    expected = [digest(backend, seed) for seed in range(2)]
    busy_torch()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(digest, [(backend, seed) for seed in range(2)]) == expected


class Digests(Dataset[str]):
    """Digests of every example of a data set, and of `work` on both backends."""

    def __init__(self, examples: Dataset[dict[str, Tensor]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> str:
        return digest_of(self.examples[index]) + digest("reference", index) + digest("triton")


def loader(start: str) -> None:
    """Workers of a DataLoader that read conversations and run the operators, after their parent did both."""
    from cumo.data import ConversationDataset
    from tests.data.samples import Files, byte_processor, llava

    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        rows = [llava(f"q{n}", f"a{n}", images=files.picture(f"{n}.png", seed=n)) for n in range(3)]
        examples = ConversationDataset([files.json(rows)], byte_processor(), "plain", progress=False)
        dataset = Digests(examples)
        expected = [dataset[index] for index in range(len(dataset))]
        busy_torch()
        workers = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=PATIENCE)
        assert list(workers) == expected
        assert len(set(expected)) == len(expected)
