# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.profile`: the time of each kernel of one layer, routing included."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

import cumo_kernels as ck
from benchmarks.records import device_name, table
from benchmarks.run import DTYPES
from benchmarks.workloads import CPU, GPU, LayerInputs, make_layer

RUNS = 20
# Everything of the layer that is no matrix product of the experts.
AROUND = ("gating", "dispatch", "permute", "combine", "count_experts")


def step(inputs: LayerInputs, gate_ED: torch.Tensor) -> None:
    """Forward and backward of router and experts."""
    case = inputs.workload.case
    routing = ck.linear_topk_gating(inputs.x_TD, gate_ED, case.K, case.segment)
    y_TO = ck.moe_mlp(
        inputs.x_TD, routing.weight_TK, routing.expert_TK, inputs.w1_EFD, inputs.w2_EOF, inputs.b1_EF, inputs.b2_EO,
        activation=case.activation, gated=case.gated,
    )  # fmt: skip
    loss = (y_TO * inputs.dy_TO).sum() + routing.balance_S.mean() + routing.z_S.mean()
    leaves = [leaf for leaf in inputs.leaves if leaf is not inputs.weight_TK]
    torch.autograd.grad(loss, [*leaves, gate_ED])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--shape", default="both scales", help="the first workload whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")]
    found = [w for w in (GPU if on_gpu else CPU) if options.shape.lower() in w.name.lower()]
    if not found:
        parser.error(f"--shape: expected part of a workload's name, got {options.shape!r}")
    inputs = make_layer(found[0], dtype, device)
    gate_ED = torch.randn(found[0].case.E, found[0].case.D, device=device).mul(0.02).to(dtype).requires_grad_()
    step(inputs, gate_ED)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        for _ in range(RUNS if on_gpu else 2):
            step(inputs, gate_ED)
        if on_gpu:
            torch.cuda.synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    around = sum(getattr(event, name) for event in events if any(word in event.key for word in AROUND))
    rows = [
        {
            "kernel": event.key[:70],
            "calls": str(event.count),
            "us each": f"{getattr(event, name) / event.count:.1f}",
            "%": f"{100 * getattr(event, name) / total:.1f}",
        }
        for event in events[:25]
    ]
    print(f"{device_name(device)}: {found[0].name}, {dtype}, forward and backward with router")
    print(table(rows, ("calls", "us each", "%")))
    if on_gpu:
        print(f"routing, permutation and combine: {100 * around / total:.1f} % of the layer")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
