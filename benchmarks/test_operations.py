# SPDX-License-Identifier: Apache-2.0
"""Microbenchmarks of each operation at CPU-sized shapes, ours beside what runs in plain PyTorch.

`make bench` runs them; `--benchmark-autosave` and `--benchmark-compare` (pytest-benchmark) compare commits. On a GPU
the kernels run. A variant that disagrees with the float64 reference is not timed.
"""

import pytest
import torch

from benchmarks.gate import Gate
from benchmarks.operations import OPERATIONS
from benchmarks.run import timed_call
from benchmarks.workloads import CPU, make_layer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    pytest.param(operation, name, id=f"{operation.name}-{name}")
    for operation in OPERATIONS.values()
    for name, variant in operation.variants.items()
    if variant.kind in ("ours", "baseline") and name != "compiled_reference"  # takes half a minute to compile
]


@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("workload", CPU, ids=lambda workload: workload.name)
@pytest.mark.parametrize(("operation", "name"), CASES)
def test_operation(benchmark, operation, name, workload, which):
    variant = operation.variants[name]
    inputs = make_layer(workload, torch.float32, DEVICE)
    verdict = Gate(operation.exact, inputs, backward=which == "both").judge(variant.prepare, variant.exact)
    assert verdict.passed, verdict
    run = timed_call(variant.prepare(inputs), which)

    def measured():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{operation.name}: {workload.name}: {which}"
    benchmark.pedantic(measured, rounds=5, warmup_rounds=1)
