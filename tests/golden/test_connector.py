# SPDX-License-Identifier: Apache-2.0
"""The connector of the published implementation: outputs, losses and every gradient; and its upcycling."""

import pytest
import torch
from torch import nn

from cumo.checkpoints.layout import stack_experts, unstack_experts
from cumo.nn import MoEMLP, upcycle_mlp
from tests.golden.data import below, golden, load_tensors
from tests.numerics import assert_bitwise_equal, relative_error

TOLERANCE = 1e-5
LOSS = "sum(y*cotangent)/100 + 0.1*balance_loss + 0.01*z_loss"  # the formula that `test_connector` computes


@pytest.fixture
def connector(device):
    """The module with the published weights, its inputs and results."""
    tensors, metadata = load_tensors("connector_moe.safetensors", device)
    parameters = stack_experts(below(tensors, "param."), "connector")
    num_experts, d_hidden, d_in = parameters["up_proj"].shape
    assert num_experts == int(metadata["num_experts"])
    moe = MoEMLP(
        d_in,
        d_hidden,
        parameters["down_proj"].shape[1],
        num_experts=num_experts,
        top_k=int(metadata["num_selected"]),
        activation="gelu",
        device=device,
    )
    moe.load_state_dict(parameters, strict=True)
    return moe, tensors, metadata


@pytest.mark.usefixtures("backend")
def test_connector(connector):
    moe, expected, metadata = connector
    assert metadata["loss"] == LOSS
    x = expected["x"].clone().requires_grad_()
    y, routing = moe(x)
    balance_loss, z_loss = routing.balance_S.mean(), routing.z_S.mean()
    loss = (y * expected["cotangent"]).sum() / 100 + 0.1 * balance_loss + 0.01 * z_loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in moe.named_parameters()}
    actual = {
        "y": y,
        "balance_loss": balance_loss,
        "z_loss": z_loss,
        "loss": loss,
        "grad.x": x.grad,
        **{f"grad.{name}": gradient for name, gradient in unstack_experts(grads, "connector").items()},
    }
    results = expected.keys() - {"x", "cotangent"} - {f"param.{name}" for name in below(expected, "param.")}
    assert actual.keys() == results
    errors = {name: relative_error(actual[name], expected[name]) for name in sorted(results)}
    assert max(errors.values()) <= TOLERANCE, errors


def test_published_weights_come_back_bit_by_bit(connector):
    moe, expected, _ = connector
    assert_bitwise_equal(unstack_experts(moe.state_dict(), "connector"), below(expected, "param."))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (2, 1), (3, 3)])
def test_the_dense_connector_upcycled_computes_the_same(device, num_experts, top_k):
    state = below(torch.load(golden("mm_projector.bin"), weights_only=True), "model.mm_projector.")
    d_hidden, d_in = state["0.weight"].shape
    mlp = nn.Sequential(nn.Linear(d_in, d_hidden), nn.GELU(), nn.Linear(d_hidden, state["2.weight"].shape[0]))
    mlp.load_state_dict(state, strict=True)
    mlp.to(device)
    x = torch.randn(3, 16, d_in, device=device)
    for seed in range(2):
        moe = upcycle_mlp(mlp, num_experts, top_k, generator=torch.Generator().manual_seed(seed))
        y, routing = moe(x)
        assert len(routing.expert_TK.unique()) == num_experts, "the gate spared an expert: nothing was tried of it"
        assert relative_error(y, mlp(x)) <= TOLERANCE
