# SPDX-License-Identifier: Apache-2.0
"""Compile recorded launches for a GPU that need not be there, and read what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from cumo_kernels.kernels.launch import Launch

_POINTEES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Opcodes: warp-group MMA (sm_90), 5th-generation MMA (sm_100), warp MMA (sm_80), TMA loads.
_INSTRUCTIONS = {"HGMMA": ("HGMMA",), "UTCMMA": ("UTCHMMA", "UTCQMMA"), "HMMA": ("HMMA",), "TMA": ("UTMALDG",)}


class Facts(NamedTuple):
    """What ptxas reports of one compiled kernel, and how often its machine code names an instruction."""

    registers: int
    """Registers per thread, 255 at most."""
    spill_bytes: int
    """Stack and local memory per thread: what did not fit in registers."""
    shared_bytes: int
    """Shared memory per block, static and dynamic."""
    instructions: Counter[str]
    """Counts by the names in `_INSTRUCTIONS`."""


class Source(NamedTuple):
    """A launch reduced to what the compiler sees: equal sources compile to the same machine code."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The kernel's name without its underscores at the ends and the word kernel."""
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    def constant(self, name: str) -> Any:
        """The value of a constexpr, None if there is none of that name."""
        return dict(self.constants).get(name)

    @property
    def has_dot(self) -> bool:
        """Whether the kernel is a matrix product: then it has a tile in three dimensions."""
        return self.constant("BLOCK_K") is not None


def source_of(launch: Launch) -> Source:
    """What Triton's launcher would derive from these arguments: types, constants and divisibility."""
    options = {name: launch.meta[name] for name in _OPTIONS if name in launch.meta}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    values |= {name: value for name, value in launch.meta.items() if name not in _OPTIONS}
    signature, constants, divisible = [], [], []
    for param in launch.kernel.params:
        value = values[param.name]
        is_one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or is_one:
            signature.append((param.name, "constexpr"))
            constants.append((param.name, value))
            continue
        signature.append((param.name, _type_of(value)))
        aligned_int = isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize
        if isinstance(value, Tensor) or aligned_int:
            divisible.append(param.name)
    return Source(launch.kernel, tuple(signature), tuple(constants), tuple(divisible), tuple(sorted(options.items())))


def _type_of(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_POINTEES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return "*" + _POINTEES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"no kernel argument of type {type(value).__name__} is expected")


def ast_source(source: Source) -> ASTSource:
    """Return a source in the form that Triton's compiler takes."""
    names = source.kernel.arg_names
    return ASTSource(
        fn=source.kernel,
        signature=dict(source.signature),
        constexprs={(names.index(name),): value for name, value in source.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in source.divisible_by_16},
    )


def compile_source(source: Source, arch: int) -> Facts:
    """Compile for compute capability `arch` (90: sm_90) and read the facts off the machine code."""
    compiled = triton.compile(ast_source(source), target=GPUTarget("cuda", arch, 32), options=dict(source.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, flags=re.MULTILINE))
    return Facts(
        registers=resources["REG"],
        spill_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        instructions=Counter({name: sum(opcodes[code] for code in codes) for name, codes in _INSTRUCTIONS.items()}),
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
