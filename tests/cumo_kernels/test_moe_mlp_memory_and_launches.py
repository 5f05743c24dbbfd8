# SPDX-License-Identifier: Apache-2.0
"""What the layer costs: kernel launches, and bytes kept for the backward.

Both follow from shapes alone, so they are counted at real widths, on a dry run that chooses tiles for an H100 and
launches nothing.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cumo_kernels as ck
from cumo_kernels.kernels.launch import record_launches
from cumo_kernels.tiling import Target
from tests.cumo_kernels.harness import PLAIN_AND_GATED, make_layer

H100 = Target.cuda(90, 132)
NO_KERNEL = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "alias")  # views have none either


class CountedKernels(TorchDispatchMode):
    """Collects the PyTorch operators that launch a kernel of their own, those inside our operators too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "cumo_kernels":
            with self:  # the mode is off while it handles an operator; this is the operator's own body
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if not func.is_view and func._schema.name.removeprefix("aten::") not in NO_KERNEL:
            self.names.append(str(func))
        return func(*args, **kwargs)


@pytest.fixture
def poisoned_memory():
    """None: poisoning launches kernels, which are counted here."""


def uninitialised_layer(device, T, D=1024, F=4096, O=1024, E=4, dtype=torch.bfloat16, gated=False):
    """The arguments of `moe_mlp` at CLIP's widths, ready for gradients; values are never looked at."""
    F1 = 2 * F if gated else F
    shapes = {"x_TD": (T, D), "w1_EFD": (E, F1, D), "w2_EOF": (E, O, F), "b1_EF": (E, F1), "b2_EO": (E, O)}
    layer = {name: torch.empty(s, dtype=dtype, device=device).requires_grad_() for name, s in shapes.items()}
    return layer | {"residual_TO": torch.empty(T, O, dtype=dtype, device=device).requires_grad_()}


def route(layer, gating, device):
    """The router's routing of the layer's tokens, and the leaf that its gradient goes to."""
    if gating == "topk_gating":
        leaf = torch.empty(layer["x_TD"].shape[0], 4, device=device, requires_grad=True)
        return ck.topk_gating(leaf, 2), leaf
    leaf = torch.empty(4, layer["x_TD"].shape[1], dtype=torch.bfloat16, device=device, requires_grad=True)
    return ck.linear_topk_gating(layer["x_TD"], leaf, 2), leaf


@PLAIN_AND_GATED
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize(
    ("T", "forward", "backward"),
    [pytest.param(577, 5, 7, id="gathered"), pytest.param(2308, 6, 7, id="sorted-copy")],
)
def test_launches_from_logits_to_output_and_back(T, forward, backward, recompute, gated, device):
    layer = uninitialised_layer(device, T, gated=gated)
    with ck.use_backend("triton"), record_launches(H100) as launches, CountedKernels() as others:
        routing, logits_TE = route(layer, "topk_gating", device)
        y_TO = ck.moe_mlp(
            weight_TK=routing.weight_TK, expert_TK=routing.expert_TK, gated=gated, recompute=recompute, **layer
        )
        assert len(launches) == forward
        outputs = (y_TO, routing.balance_S, routing.z_S)
        cotangents = tuple(torch.empty_like(output) for output in outputs)
        torch.autograd.grad(outputs, (logits_TE, *layer.values()), cotangents)
    assert len(launches) == forward + backward + recompute
    assert others.names == []


@pytest.mark.parametrize("T", [577, 577 * 40], ids=["one-image", "forty-crops"])
def test_launches_of_the_gating_with_its_linear_layer(T, device):
    layer = uninitialised_layer(device, T)
    with ck.use_backend("triton"), record_launches(H100) as launches, CountedKernels() as others:
        routing, gate_ED = route(layer, "linear_topk_gating", device)
        assert [launched.kernel.__name__ for launched in launches] == ["_linear_gating_kernel", "_gating_losses_kernel"]
        assert others.names == []
        launches.clear()
        torch.autograd.grad(routing.weight_TK, (layer["x_TD"], gate_ED), torch.empty_like(routing.weight_TK))
    backward = ["_topk_gating_backward_kernel", "_linear_gating_backward_kernel"]
    assert [launched.kernel.__name__ for launched in launches] == backward
    assert others.names == ["aten.sum.dim_IntList"]  # of the gradient of the router, over chunks of tokens


# Launches of the backward where only these gradients are wanted, gathered and with a sorted copy.
SUBSETS = [
    pytest.param(["x_TD"], 3, 4, id="frozen-parameters-and-gate"),
    pytest.param(["weight_TK"], 3, 3, id="the-gate-only"),
    pytest.param(["w1_EFD"], 2, 3, id="w1-only"),
    pytest.param(["w2_EOF"], 2, 3, id="w2-only"),
    pytest.param(["x_TD", "weight_TK"], 4, 4, id="frozen-parameters"),
    pytest.param(["w1_EFD", "w2_EOF", "b1_EF", "b2_EO"], 4, 4, id="frozen-tokens-and-gate"),
    pytest.param(["residual_TO"], 0, 0, id="the-residual-only"),
    pytest.param(["b1_EF", "b2_EO"], 4, 4, id="the-biases-only"),
]


@pytest.mark.parametrize("T", [577, 2308], ids=["gathered", "sorted-copy"])
@pytest.mark.parametrize(("wrt", "gathered", "sorted_copy"), SUBSETS)
def test_gradients_that_nobody_wants_cost_no_launch(wrt, gathered, sorted_copy, T, device):
    layer = uninitialised_layer(device, T)
    layer["weight_TK"] = torch.empty(T, 2, device=device)
    layer = {name: tensor.detach().requires_grad_(name in wrt) for name, tensor in layer.items()}
    expert_TK = torch.zeros(T, 2, dtype=torch.int32, device=device)
    with ck.use_backend("triton"), record_launches(H100) as launches:
        y_TO = ck.moe_mlp(expert_TK=expert_TK, **layer)
        launches.clear()
        torch.autograd.grad(y_TO, [layer[name] for name in wrt], torch.empty_like(y_TO))
    names = [launched.kernel.__name__ for launched in launches]
    assert len(names) == (gathered if T == 577 else sorted_copy), names


def test_gradients_of_biases_cost_no_gradient_of_weights(device):
    wrt = ["b1_EF", "b2_EO"]
    layer = {n: t.detach().requires_grad_(n in wrt) for n, t in uninitialised_layer(device, 577).items()}
    routing = {"weight_TK": torch.empty(577, 2), "expert_TK": torch.zeros(577, 2, dtype=torch.int32)}
    with ck.use_backend("triton"), record_launches(H100) as launches:
        y_TO = ck.moe_mlp(**layer, **{name: tensor.to(device) for name, tensor in routing.items()})
        torch.autograd.grad(y_TO, [layer[name] for name in wrt], torch.empty_like(y_TO))
    weights = [launched.args[6] for launched in launches if launched.kernel.__name__ == "_grouped_wgrad_kernel"]
    assert [dw_EMN.numel() for dw_EMN in weights] == [0, 0]


def bytes_saved(function, parameters):
    """Bytes that autograd keeps for the backward of `function`, each storage once, without those of parameters."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@PLAIN_AND_GATED
@pytest.mark.parametrize("T", [64, 2308], ids=["gathered", "sorted-copy"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_backward_keeps_tokens_and_pre_activation_only(recompute, T, gated, device):
    layer = uninitialised_layer(device, T, gated=gated)
    weight_TK = torch.empty(T, 2, device=device, requires_grad=True)
    expert_TK = torch.zeros(T, 2, dtype=torch.int32, device=device)
    parameters = [layer[name] for name in ("w1_EFD", "w2_EOF", "b1_EF", "b2_EO")]
    x_TD = layer["x_TD"]
    z_bytes = 0 if recompute else T * 2 * layer["w1_EFD"].shape[1] * x_TD.element_size()
    expected = x_TD.numel() * x_TD.element_size() + z_bytes
    with ck.use_backend("triton"), record_launches(H100):
        actual = bytes_saved(
            lambda: ck.moe_mlp(weight_TK=weight_TK, expert_TK=expert_TK, gated=gated, recompute=recompute, **layer),
            parameters,
        )
    assert expected < actual <= 1.05 * expected


def test_nothing_is_kept_where_no_gradient_is_wanted(device):
    layer = make_layer(device)
    with ck.use_backend("triton"), record_launches() as launches:
        ck.moe_mlp(**layer)
        with torch.no_grad():
            ck.moe_mlp(**{**layer, "x_TD": layer["x_TD"].requires_grad_()})
    arguments = [dict(zip(launched.kernel.arg_names, launched.args, strict=False)) for launched in launches]
    assert [a["z_ptr"] for a in arguments if "z_ptr" in a] == [None] * 4


def test_real_launches_are_those_of_the_dry_run(device):
    layer = {name: t.requires_grad_(t.is_floating_point()) for name, t in make_layer(device, E=4).items()}
    logits_TE = torch.randn(6, 4, device=device, requires_grad=True)
    with ck.use_backend("triton"), record_launches() as launches:
        routing = ck.topk_gating(logits_TE, 2)
        y_TO = ck.moe_mlp(**{**layer, "weight_TK": routing.weight_TK, "expert_TK": routing.expert_TK})
        assert len(launches) == 5
        torch.autograd.backward((y_TO, routing.balance_S), (torch.randn_like(y_TO), torch.ones(1, device=device)))
    assert len(launches) == 5 + 7
