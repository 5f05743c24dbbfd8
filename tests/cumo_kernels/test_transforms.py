# SPDX-License-Identifier: Apache-2.0
"""The transforms of `torch.func` and forward-mode differentiation: the reference has them, the kernels say that they
have not."""

import pytest
import torch
from torch.autograd import forward_ad

import cumo_kernels as ck
from cumo.nn import MoEMLP
from cumo_kernels import reference
from tests.cumo_kernels.harness import PLAIN_AND_GATED, differentiable, in_float64, make_layer
from tests.numerics import relative_error

CPU = torch.device("cpu")
FLOAT64_UNITS = 1e-13  # some hundred units of float64: sums in another order

pytestmark = [
    # PyTorch scripts its decompositions when a forward-mode level is first entered.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    # It says so where vmap maps an operator by a loop.
    pytest.mark.filterwarnings("ignore:.*performance:UserWarning"),
]


@pytest.fixture
def poisoned_memory():
    """None: the poison looks at values, which a mapped tensor has many of."""


def make_layer64(**options):
    """A small layer in float64 with a residual; the last choice is ignored."""
    layer = in_float64(make_layer(CPU, 5, D=4, F=6, O=3, **options))
    layer["expert_TK"][-1, -1] = 3
    return layer | {"residual_TO": torch.randn(5, 3, dtype=torch.float64)}


@pytest.fixture(params=[False, True], ids=["saved", "recomputed"])
def recompute(request):
    return request.param


@PLAIN_AND_GATED
def test_grad_of_every_argument_is_that_of_autograd(gated, recompute):
    layer = make_layer64(gated=gated)
    names = differentiable(layer)

    def loss(arguments):
        with ck.use_backend("reference"):
            return ck.moe_mlp(**layer | arguments, gated=gated, recompute=recompute).square().sum()

    leaves = {name: layer[name].clone().requires_grad_() for name in names}
    expected = torch.autograd.grad(loss(leaves), leaves.values())
    actual = torch.func.grad(loss)({name: layer[name] for name in names})
    for name, grad in zip(names, expected, strict=True):
        assert relative_error(actual[name], grad) <= FLOAT64_UNITS, name


def test_grad_of_grad_is_the_second_derivative():
    layer = make_layer64()

    def loss(w1_EFD):
        with ck.use_backend("reference"):
            return ck.moe_mlp(**{**layer, "w1_EFD": w1_EFD}).square().sum()

    expected = torch.autograd.functional.hessian(loss, layer["w1_EFD"])
    for hessian in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        assert relative_error(hessian(loss)(layer["w1_EFD"]), expected) <= FLOAT64_UNITS


@PLAIN_AND_GATED
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_tangent_is_that_of_two_reverse_passes(grad, gated, recompute):
    layer = make_layer64(gated=gated)
    names = differentiable(layer)
    primals = tuple(layer[name] for name in names)
    tangents = tuple(torch.randn_like(primal) for primal in primals)

    def function(*inputs):
        with ck.use_backend("reference"):
            arguments = layer | dict(zip(names, inputs, strict=True))
            return ck.moe_mlp(**arguments, gated=gated, recompute=recompute)

    y_TO, expected = torch.autograd.functional.jvp(function, primals, tangents)
    with torch.set_grad_enabled(grad):
        for output, tangent in (
            torch.func.jvp(function, primals, tangents),
            in_dual_level(function, primals, tangents),
        ):
            assert relative_error(output, y_TO) <= FLOAT64_UNITS
            assert relative_error(tangent, expected) <= FLOAT64_UNITS


def in_dual_level(function, primals, tangents):
    """What `torch.func.jvp` computes, by the interface that knows no function transforms."""
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True))
        return tuple(forward_ad.unpack_dual(function(*duals)))


def test_vmap_over_weights_and_routing_is_a_loop():
    layers = [make_layer64() for _ in range(3)]
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}

    def loss(arguments, expert_TK):
        with ck.use_backend("reference"):
            return ck.moe_mlp(**arguments, expert_TK=expert_TK).square().sum()

    expert = stacked.pop("expert_TK")
    grads, losses = torch.func.vmap(torch.func.grad_and_value(loss))(stacked, expert)
    for i, layer in enumerate(layers):
        expert_TK = layer.pop("expert_TK")
        expected_grads, expected_loss = torch.func.grad_and_value(loss)(layer, expert_TK)
        assert relative_error(losses[i], expected_loss) <= FLOAT64_UNITS
        for name, grad in expected_grads.items():
            assert relative_error(grads[name][i], grad) <= FLOAT64_UNITS, name


def test_vmap_keeps_what_is_not_finite_in_its_expert():
    layer = make_layer64()
    layer["expert_TK"] = torch.tensor([[0, 0], [1, 1], [0, 0], [2, 2], [1, 1]])
    layer["x_TD"][0] = float("nan")

    def loss(x_TD, w1_EFD):
        with ck.use_backend("reference"):
            return ck.moe_mlp(**{**layer, "x_TD": x_TD, "w1_EFD": w1_EFD}).sum()

    dx, dw1 = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(
        layer["x_TD"].unsqueeze(0), layer["w1_EFD"]
    )
    assert dx[0].isnan().any(dim=1).tolist() == [True, False, False, False, False]
    assert dw1[0].isnan().flatten(1).any(dim=1).tolist() == [True, False, False]


@pytest.fixture
def module():
    return MoEMLP(4, 6, 3, num_experts=3, top_k=2, dtype=torch.float64)


def losses_of(moe, parameters, x):
    with ck.use_backend("reference"):
        y, routing = torch.func.functional_call(moe, parameters, (x,))
        return y.square().mean() + routing.balance_S.mean() + routing.z_S.mean()


def test_functional_module_is_differentiated_as_by_autograd(module):
    parameters, x = dict(module.named_parameters()), torch.randn(2, 5, 4, dtype=torch.float64)
    expected = torch.autograd.grad(losses_of(module, parameters, x), parameters.values())
    frozen = {name: parameter.detach() for name, parameter in parameters.items()}
    actual = torch.func.grad(losses_of, argnums=1)(module, frozen, x)
    for name, grad in zip(parameters, expected, strict=True):
        assert relative_error(actual[name], grad) <= FLOAT64_UNITS, name


def test_gradients_per_sample_of_a_module(module):
    """Each sample chooses experts of its own."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    grad = torch.func.grad(losses_of, argnums=1)
    mapped = torch.func.vmap(grad, in_dims=(None, None, 0))(module, parameters, x)
    for i, sample in enumerate(x):
        for name, expected in grad(module, parameters, sample).items():
            assert relative_error(mapped[name][i], expected) <= FLOAT64_UNITS, name


def plan_of(x):
    """The same plan whenever it is asked for: vmap wants no random numbers."""
    experts = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1], [1, 3]], device=x.device)
    with ck.use_backend("reference"):
        return ck.plan_dispatch(experts, 3)


def gating(x):
    return ck.topk_gating(x, 2).weight_TK


def linear_gating(x):
    return ck.linear_topk_gating(x, x[:4], 2).weight_TK


def permute(x):
    return ck.permute(x, plan_of(x))


def grouped_gemm(x):
    return ck.grouped_gemm(torch.cat([x, x]), x.new_ones(3, 5, 8), plan_of(x), activation="relu")


def combine(x):
    return ck.combine(torch.cat([x, x]), x[:, :2], plan_of(x))


def moe_mlp(x):
    expert_TK = torch.zeros(6, 2, dtype=torch.int32, device=x.device)
    return ck.moe_mlp(x, x[:, :2], expert_TK, x.new_ones(3, 5, 8), x.new_ones(3, 7, 5))


OPERATIONS = pytest.mark.parametrize(
    ("name", "call"),
    [
        ("topk_gating", gating),
        ("linear_topk_gating", linear_gating),
        ("permute", permute),
        ("grouped_gemm", grouped_gemm),
        ("combine", combine),
        ("moe_mlp", moe_mlp),
    ],
)


@OPERATIONS
def test_kernels_refuse_forward_mode(name, call, device):
    x = torch.randn(6, 8, device=device)
    message = rf"^{name}: forward-mode differentiation is not implemented on the triton backend; use_backend\('ref"
    with ck.use_backend("triton"):
        for differentiate in (torch.func.jvp, lambda f, x, dx: in_dual_level(f, x, dx)):
            with pytest.raises(RuntimeError, match=message):
                differentiate(call, (x,), (x,))
        with pytest.raises(RuntimeError, match=message):
            torch.func.jacfwd(call)(x)


@OPERATIONS
def test_kernels_refuse_function_transforms(name, call, device):
    x = torch.randn(6, 8, device=device)
    message = rf"^{name}: torch.func.grad .* not implemented on the triton backend; .*use_backend\('reference'\)"
    with ck.use_backend("triton"):
        for transformed in (
            lambda x: torch.func.vjp(call, x),
            torch.func.grad(lambda x: call(x).sum()),
            torch.func.grad(lambda x: torch.func.vmap(call)(x.unsqueeze(0)).sum()),
        ):
            with pytest.raises(RuntimeError, match=message):
                transformed(x)


@OPERATIONS
def test_kernels_run_where_nothing_is_differentiated_through_them(name, call, device):
    x, other = torch.randn(6, 8, device=device), torch.randn(6, 8, device=device)
    del name

    def with_constants(other):
        return call(x) + 0 * other.sum()

    with ck.use_backend("triton"):
        expected = with_constants(other)
        with forward_ad.dual_level():
            assert torch.equal(with_constants(other), expected)
        assert torch.equal(torch.func.jvp(with_constants, (other,), (other,))[0], expected)
        assert torch.equal(torch.func.vjp(with_constants, other)[0], expected)


def test_kernels_under_vmap_are_a_loop(device):
    x_BTD = torch.randn(3, 6, 8, device=device)
    with ck.use_backend("triton"):
        assert torch.equal(torch.func.vmap(moe_mlp)(x_BTD), torch.stack([moe_mlp(x_TD) for x_TD in x_BTD]))


def test_plan_under_vmap_is_a_loop():
    expert_BTK = torch.randint(-1, 5, (3, 6, 2))
    mapped = torch.func.vmap(lambda expert_TK: reference.plan_dispatch(expert_TK, 4))(expert_BTK)
    for i, expert_TK in enumerate(expert_BTK):
        for field, expected in zip(mapped, reference.plan_dispatch(expert_TK, 4), strict=True):
            assert torch.equal(field[i], expected)
