# SPDX-License-Identifier: Apache-2.0
"""Plans whose tensors are views: gathered, sliced or transposed on their way to an operation."""

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels import reference
from tests.cumo_kernels.harness import differentiate, random_experts

T, K, E, WIDTH = 7, 3, 4, 5


def every_other(tensor):
    """The same values at every second place; what lies between would be other rows."""
    doubled = tensor.repeat_interleave(2, dim=0)
    doubled[1::2] = 0
    return doubled[::2]


def transposed(tensor):
    return tensor.T.contiguous().T


VIEWS = {"token_N": every_other, "route_N": every_other, "slot_TK": transposed, "offset_E1": every_other}


def call(name, plan, device):
    """Outputs and gradients of the operation `name`."""
    N = T * K
    torch.manual_seed(1)
    shapes = {
        "permute": {"x_TD": (T, WIDTH)},
        "grouped_gemm": {"x_ND": (N, WIDTH), "w_EFD": (E, 6, WIDTH), "bias_EF": (E, 6)},
        "combine": {"y_NO": (N, WIDTH), "weight_TK": (T, K)},
    }[name]
    tensors = {argument: torch.randn(shape, device=device) for argument, shape in shapes.items()}
    rows, width = {"permute": (N, WIDTH), "grouped_gemm": (N, 6), "combine": (T, WIDTH)}[name]
    cotangents = {"out": torch.randn(rows, width, device=device)}
    return differentiate(getattr(ck, name), tensors, tensors, cotangents, plan=plan)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("field", VIEWS)
@pytest.mark.parametrize("name", ["permute", "grouped_gemm", "combine"])
def test_plan_may_consist_of_views(name, field, backend, device):
    plan = reference.plan_dispatch(random_experts(T, K, E + 1, device), E)
    view = VIEWS[field](getattr(plan, field))
    assert not view.is_contiguous()
    with ck.use_backend(backend):
        expected = call(name, plan, device)
        actual = call(name, plan._replace(**{field: view}), device)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
