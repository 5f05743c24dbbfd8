# SPDX-License-Identifier: Apache-2.0
"""Run the operations as on sm_90, through Triton's own launcher, on a driver without a device.

`python -m tests.cumo_kernels.native_run LIBRARY CASE`: LIBRARY is `driver_without_device.c`, compiled. Tensors are on
the CPU; every kernel is specialised, compiled and launched as on a GPU, and writes nothing. Prints JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.compiler import ASTSource

import cumo_kernels as ck
from cumo_kernels import backend, tiling
from cumo_kernels.kernels import launch
from cumo_kernels.kernels.compile import ast_source, source_of

T, K, E = 333, 2, 4


class Driver(CudaDriver):
    """Triton's driver, with the facts of a device that is not there."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_device_capability = lambda _: (9, 0)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0


def step(
    D: int, F: int, O: int, dtype: torch.dtype, *, gated: bool = False, bias: bool = True, transposed: bool = False
) -> None:
    """Forward and backward of every operation."""

    def leaf(*shape: int) -> torch.Tensor:
        tensor = torch.randn(*shape).to(dtype)
        if transposed and len(shape) == 3:
            tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        return tensor.requires_grad_()

    x_TD, w1_EFD, w2_EOF = leaf(T, D), leaf(E, F * (1 + gated), D), leaf(E, O, F)
    b1_EF, b2_EO = (leaf(E, F * (1 + gated)), leaf(E, O)) if bias else (None, None)
    losses = []
    for routing in (
        ck.linear_topk_gating(x_TD, torch.randn(E, D, requires_grad=True), K, segment=111),
        ck.topk_gating(torch.randn(T, E, requires_grad=True), K),
    ):
        losses += [routing.weight_TK.sum(), routing.balance_S.sum(), routing.z_S.sum()]
    expert_TK, weight_TK = torch.randint(E, (T, K), dtype=torch.int32), torch.rand(T, K, requires_grad=True)
    for recompute in (False, True):
        losses.append(
            ck.moe_mlp(
                x_TD, weight_TK, expert_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, "silu", gated=gated, recompute=recompute
            ).sum()
        )
    ck.plan_dispatch(torch.zeros(40_000, K, dtype=torch.int32), E)  # so many are counted by a kernel of its own
    plan = ck.plan_dispatch(expert_TK, E)
    rows = ck.grouped_gemm(ck.permute(x_TD, plan), w1_EFD, plan, b1_EF, None if gated else "gelu")
    losses.append(ck.combine(rows, weight_TK, plan, leaf(T, rows.shape[1])).sum())
    torch.stack([loss.float() for loss in losses]).sum().backward()


def too_many_programs() -> None:
    """A launch with a grid that no GPU takes."""
    with launch.record_launches() as launches:
        ck.permute(torch.randn(T, 64), ck.plan_dispatch(torch.zeros(T, K, dtype=torch.int32), E))
    *_, last = launches
    last.kernel[(1, 65536)](*last.args, **last.meta)


CASES: dict[str, Callable[[], None]] = {
    "dense": lambda: step(88, 160, 64, torch.bfloat16),
    "gated": lambda: step(64, 128, 96, torch.float16, gated=True, bias=False, transposed=True),
    "odd": lambda: step(37, 51, 29, torch.float32, gated=True),
    "too many programs": too_many_programs,
}


def comparable(source: ASTSource, options: Any) -> tuple[Any, ...]:
    """What the compiler sees, whether our listing or Triton's launcher made it."""
    attributes = sorted((key, str(value)) for key, value in source.attrs.items() if value)
    constants = sorted((key, str(value)) for key, value in source.constants.items())
    chosen = (options["num_warps"], options["num_stages"], options["enable_fp_fusion"])
    return (source.fn.__name__, *source.signature.items(), *constants, *attributes, chosen)


def main(library: str, case: str) -> None:
    """Run a case and report."""
    counters = ctypes.CDLL(library)
    triton.runtime.driver.set_active(Driver())
    backend.interpreted = lambda: True  # tensors of the CPU are let through
    launch.INTERPRETER = tiling.Target.cuda(90, 132)
    with ck.use_backend("triton"), launch.record_launches() as launches:
        CASES[case]()
    sources = [source_of(launched) for launched in launches]
    listed = {comparable(ast_source(s), {"num_warps": 4, "num_stages": 3, **dict(s.options)}) for s in sources}
    compiled = {
        comparable(kernel.src, kernel.metadata._asdict())
        for function in {launched.kernel for launched in launches}
        for kernel in function.device_caches[0][0].values()
    }
    report = {
        "launches": len(launches),
        "of the driver": counters.driver_launches(),
        "descriptors": counters.driver_descriptors(),
        "kernels": sorted({source.name for source in sources}),
        "only listed": sorted(map(str, listed - compiled)),
        "only compiled": sorted(map(str, compiled - listed)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
