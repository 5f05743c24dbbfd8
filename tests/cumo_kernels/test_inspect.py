# SPDX-License-Identifier: Apache-2.0
"""What is inspected is what a layer launches, and what counts as a fault of a compiled kernel."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels import inspect
from cumo_kernels.inspect import Case
from cumo_kernels.kernels.compile import Facts, Source
from cumo_kernels.kernels.launch import record_launches
from cumo_kernels.tiling import INTERPRETER, use_tiles
from tests.cumo_kernels.harness import make_layer

CASE = Case("small", 12, 2, 3, 16, 32, 16, "silu", False, True, 4)
BF16, FP32 = torch.bfloat16, torch.float32


def layer_of(case, dtype, device):
    """Inputs of an expert layer of the case's sizes."""
    layer = make_layer(device, case.T, case.K, case.E, case.D, case.F, case.O, gated=case.gated)
    del layer["weight_TK"], layer["expert_TK"]
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in layer.items()}


def kernels(launches):
    """What the compiler sees of launches: names, dtypes and constants. Sizes are constants only where they are 1."""

    def seen(value):
        if isinstance(value, torch.Tensor):
            return value.dtype
        return value if value in (None, 1) else type(value)

    return {(l.kernel.__name__, tuple(map(seen, l.args)), tuple(sorted(l.meta.items(), key=str))) for l in launches}  # noqa: E741


def launched(case, device, dtype, tokens, gate, probs, recompute=False):
    """The kernels that a router and a layer launch, forward and backward."""
    inputs = layer_of(case, dtype, device)
    x_TD, gate_ED = inputs["x_TD"].to(tokens), torch.randn(case.E, case.D, device=device, dtype=gate).requires_grad_()
    residual_TO = torch.randn(case.T, case.O, device=device, dtype=dtype) if recompute else None
    with record_launches() as launches, ck.use_backend("triton"):
        routing = ck.linear_topk_gating(x_TD, gate_ED, case.K, case.segment, probs_dtype=probs)
        y_TO = ck.moe_mlp(
            inputs.pop("x_TD"), routing.weight_TK, routing.expert_TK, *inputs.values(),
            activation=case.activation, gated=case.gated, recompute=recompute, residual_TO=residual_TO,
        )  # fmt: skip
        (y_TO.sum() + routing.balance_S.sum() + routing.z_S.sum()).backward()
    return kernels(launches)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("dtype", "tokens", "gate", "probs"),
    [
        pytest.param(FP32, FP32, FP32, FP32, id="float32"),
        pytest.param(BF16, BF16, BF16, FP32, id="bfloat16"),
        pytest.param(BF16, BF16, BF16, BF16, id="rounded probabilities"),
        pytest.param(BF16, BF16, FP32, FP32, id="float32 gate"),
        pytest.param(BF16, FP32, FP32, FP32, id="autocast"),
    ],
)
def test_whatever_a_layer_launches_is_inspected(dtype, tokens, gate, probs, gated, device):
    case = CASE._replace(gated=gated)
    inspected = kernels(inspect.launches_of(case, INTERPRETER, dtype))
    for recompute in (False, True):
        missing = launched(case, device, dtype, tokens, gate, probs, recompute) - inspected
        assert not missing, sorted(missing, key=str)


def test_dispatch_of_ids_that_torch_sorted_is_inspected(device):
    with record_launches() as launches, ck.use_backend("triton"):
        ck.plan_dispatch(torch.zeros(CASE.T, CASE.K, dtype=torch.int64, device=device), CASE.E)
    assert kernels(launches) <= kernels(inspect.launches_of(CASE, INTERPRETER, BF16))


def test_tiles_of_a_layer_are_those_that_it_asks_for(device):
    with use_tiles({}) as asked:
        launched(CASE, device, FP32, FP32, FP32, FP32)
    assert inspect.layer_tiles(CASE, INTERPRETER, FP32, backward=True) == asked
    assert inspect.layer_tiles(CASE, INTERPRETER, FP32, backward=False).items() < asked.items()


def source(name, tile=(), **signature):
    """A kernel reduced to what the compiler sees."""
    return Source(SimpleNamespace(__name__=f"_{name}_kernel"), tuple(signature.items()), tile, (), (("num_warps", 4),))


def gemm(dtype):
    """A grouped GEMM whose rows come through a descriptor."""
    return source("grouped_gemm", (("BLOCK_K", 64),), x=f"tensordesc<{dtype}[128, 64]>", w=f"*{dtype}")


def facts(registers=100, spill=0, shared=1024, **instructions):
    """Of a compiled kernel."""
    return Facts(registers, spill, shared, Counter(instructions))


@pytest.mark.parametrize(("x", "gate"), [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")])
def test_a_float32_gate_belongs_on_cuda_cores_and_is_shown_there(x, gate):
    router, exact = source("linear_gating", x_ptr=f"*{x}", gate_ptr=f"*{gate}"), gate == "fp32"
    assert inspect.faults("sm_90", router, facts()) == ([] if exact else ["no HGMMA"])
    assert inspect.faults("sm_90", router, facts(HGMMA=8)) == []
    assert inspect.faults("sm_100", router, facts(HMMA=8)) == []
    assert inspect.on_cuda_cores(router) == exact
    assert (f"{gate} x {x} on CUDA cores" in inspect._row(router, facts())) == exact


def test_products_of_experts_belong_on_tensor_cores_except_in_float32():
    assert inspect.faults("sm_90", gemm("bf16"), facts(TMA=1)) == ["no HGMMA"]
    assert inspect.faults("sm_90", gemm("bf16"), facts(TMA=1, HGMMA=1)) == []
    assert inspect.faults("sm_100", gemm("bf16"), facts(TMA=1, HMMA=1)) == ["no UTCMMA"]
    assert inspect.faults("sm_90", gemm("bf16"), facts(HGMMA=1)) == ["descriptors without TMA"]
    assert inspect.faults("sm_90", gemm("fp32"), facts(TMA=1)) == []


@pytest.mark.parametrize(
    ("registers", "spill", "fault"),
    [
        pytest.param(255, 8, "8 bytes spilled", id="no registers left"),
        pytest.param(128, 24, "24 bytes spilled", id="more than a trade"),
        pytest.param(128, 16, None, id="a trade for another block"),
        pytest.param(255, 0, None, id="nothing spilled"),
    ],
)
def test_spills_are_faults_unless_registers_are_left(registers, spill, fault):
    assert inspect.faults("sm_90", source("combine"), facts(registers, spill)) == ([fault] if fault else [])


def test_more_shared_memory_than_a_block_has_is_a_fault():
    assert inspect.faults("sm_120", source("combine"), facts(shared=100 << 10)) == [
        "100 KB of shared memory, sm_120 has 99"
    ]
    assert inspect.faults("sm_90", source("combine"), facts(shared=100 << 10)) == []
