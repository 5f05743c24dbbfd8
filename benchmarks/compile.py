# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.compile`: compile every kernel that the benchmarks time, without a GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.workloads import GPU
from cumo_kernels.backend import interpreted
from cumo_kernels.inspect import DTYPES, TARGETS, faults, sources


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 if a kernel has a fault, as `cumo_kernels.inspect` defines it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__)
    parser.add_argument("--arch", choices=TARGETS, default="sm_90")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--workers", type=int, default=2, help="kernels compiled at a time")
    parser.add_argument("--shape", default="", help="workloads whose name contains this")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted, there is nothing to compile")
    from cumo_kernels.kernels.compile import compile_source

    target = TARGETS[options.arch]
    cases = [workload.case for workload in GPU if options.shape.lower() in workload.name.lower()]
    distinct = list(dict.fromkeys(s for case in cases for s in sources(case, target, DTYPES[options.dtype])))
    with ThreadPoolExecutor(options.workers) as pool:
        facts = list(pool.map(lambda source: compile_source(source, target.arch), distinct))
    wrong = [
        f"{source.name}: {fault}"
        for source, fact in zip(distinct, facts, strict=True)
        for fault in faults(options.arch, source, fact)
    ]
    print(f"{options.arch}: {len(distinct)} kernels of {len(GPU)} workloads compiled")
    print("\n".join(wrong) or "no faults; tensor cores and TMA wherever they are due")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
