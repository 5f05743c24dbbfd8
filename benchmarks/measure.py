# SPDX-License-Identifier: Apache-2.0
"""Measures times, memory and launches, and the best that the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 3
MIN_RUNS, MAX_RUNS = 10, 200
L2_BYTES = 256 << 20  # larger than any L2, so that writing it evicts the inputs
FLOATS_OF_A_COPY = 1 << 28


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: the median, and the bounds of the middle 60 %."""

    p20: float
    p50: float
    p80: float
    runs: int
    method: str
    """clock (of a CPU), events (which include the time that a GPU waits for Python to launch kernels), or graph (events
    around the replay of a CUDA graph, without Python)."""


def _quantiles(samples: list[float], method: str) -> Timing:
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return Timing(*values.tolist(), len(samples), method)


def time_call(run: Callable[[], object], device: torch.device, budget_s: float = 1.0) -> Timing:
    """Time `run` after a warm-up: by the clock on a CPU, between events and with cold caches on a GPU.

    Args:
        run: does all its work on `device`.
        device: "cpu" or "cuda".
        budget_s: seconds to measure for, more or less; at least `MIN_RUNS` runs on a GPU.
    """
    if device.type == "cpu":
        return _time_on_cpu(run, budget_s)
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    return _time_on_cuda(run, budget_s, "events")


def time_replay(run: Callable[[], object], budget_s: float = 1.0) -> Timing | None:
    """Time the replay of `run`, which `time_call` has warmed up, from a CUDA graph; None if it cannot be captured."""
    graph = _captured(run)
    return None if graph is None else _time_on_cuda(graph.replay, budget_s, "graph")


def _time_on_cpu(run: Callable[[], object], budget_s: float) -> Timing:
    run()
    samples: list[float] = []
    end = time.perf_counter() + budget_s
    while len(samples) < MAX_RUNS and (len(samples) < 3 or time.perf_counter() < end):
        begin = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - begin))
    return _quantiles(samples, "clock")


def _time_on_cuda(run: Callable[[], object], budget_s: float, method: str) -> Timing:
    flushed = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(MAX_RUNS)]
    end, count = time.perf_counter() + budget_s, 0
    for begin_event, end_event in events:
        flushed.zero_()
        begin_event.record()
        run()
        end_event.record()
        count += 1
        if count % MIN_RUNS == 0:
            torch.cuda.synchronize()
            if time.perf_counter() > end:
                break
    torch.cuda.synchronize()
    return _quantiles([begin.elapsed_time(end) for begin, end in events[:count]], method)


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """`run` as a CUDA graph; None if it cannot be captured, for instance because it copies a result to the host."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most GPU memory that `run` allocates beyond what is allocated already; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def count_launches(run: Callable[[], object], device: torch.device) -> int | None:
    """The number of kernels that a GPU runs, copies and fills included; None on a CPU."""
    if device.type == "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@dataclass(frozen=True)
class Ceilings:
    """The best rates measured on this machine."""

    flops: float
    """Operations per second of a large matrix product."""
    bytes: float
    """Bytes per second of a large copy, the sum of those read and written."""

    def floor_ms(self, flops: int, moved: int) -> float:
        """The least time that any variant can take at these rates."""
        return 1e3 * max(flops / self.flops, moved / self.bytes)


def measure_ceilings(dtype: torch.dtype, device: torch.device, budget_s: float = 1.0) -> Ceilings:
    """Time a square matrix product and a copy of random values, large enough to fill the machine."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)

    def product() -> Tensor:
        return torch.mm(a, b, out=c)

    count = FLOATS_OF_A_COPY if device.type == "cuda" else FLOATS_OF_A_COPY >> 3
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    product_ms = time_call(product, device, budget_s).p50
    copy_ms = time_call(lambda: target.copy_(source), device, budget_s).p50
    return Ceilings(2 * size**3 / product_ms * 1e3, 2 * source.nbytes / copy_ms * 1e3)
