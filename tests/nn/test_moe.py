# SPDX-License-Identifier: Apache-2.0
"""The module over the kernels: same numbers as a loop over tokens, and at home where PyTorch modules have to be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cumo_kernels as ck
from cumo.nn import MoEMLP, expert_load
from tests import oracles
from tests.nn.oracle import by_loop, by_module
from tests.numerics import assert_as_exact_as_eager, assert_bitwise_equal, relative_error

CONFIGURATIONS = [
    pytest.param(dict(d_out=20, num_experts=4, top_k=2), id="connector: d_in, d_hidden and d_out differ"),
    pytest.param(dict(num_experts=4, top_k=2, activation="quick_gelu"), id="clip"),
    pytest.param(dict(num_experts=8, top_k=2, activation="silu", gated=True, bias=False), id="mixtral"),
    pytest.param(dict(num_experts=3, top_k=1, normalize=False), id="top-1, not normalised: the gate learns by it"),
    pytest.param(dict(num_experts=3, top_k=3, activation="relu2", gated=True), id="all experts, gated with biases"),
    pytest.param(dict(num_experts=1, top_k=1), id="one expert"),
]
both_backends = pytest.mark.usefixtures("backend")
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def make(device, dtype=torch.float32, **options):
    """A small module whose gate tells the tokens clearly apart, and images for it."""
    moe = MoEMLP(12, 16, **{"num_experts": 4, "top_k": 2, **options}, device=device, dtype=dtype)
    with torch.no_grad():
        moe.gate.weight.mul_(8)
    return moe, torch.randn(2, 5, 12, device=device, dtype=dtype)


@both_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_equals_a_loop_over_tokens(device, options, dtype):
    moe, x = make(device, dtype, **options)
    exact, eager, actual = by_loop(moe, x, torch.float64), by_loop(moe, x, dtype), by_module(moe, x)
    assert actual["y"].dtype == dtype
    # a single expert's probability is 1 whatever the logits: eager is exact there, and has no error to compare with
    names = [name for name in exact if moe.num_experts > 1 or name != "grad.gate.weight"]
    assert_as_exact_as_eager(actual, eager, exact, names, rounded_to=dtype)


@both_backends
def test_recomputing_saves_less_and_changes_nothing(device):
    results, saved = [], []

    def count(tensor):
        saved[-1] += tensor.numel()
        return tensor

    moe, x = make(device)
    for moe.recompute in (False, True):
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results.append(by_module(moe, x))
    assert_bitwise_equal(*results)
    assert saved[0] - saved[1] >= 2 * 10 * 16, "the pre-activation of 10 tokens' 2 experts was saved"


def test_float16(device):
    moe, x = make(device, torch.float16)
    actual = by_module(moe, x)
    assert actual["y"].dtype == torch.float16
    assert_as_exact_as_eager(actual, by_loop(moe, x, torch.float16), by_loop(moe, x, torch.float64))


def test_float64_stays_float64(device):
    moe, x = make(device, torch.float64)
    with ck.use_backend("reference"):
        actual = by_module(moe, x)
    for name, expected in by_loop(moe, x, torch.float64).items():
        assert relative_error(actual[name], expected) <= 1e-14, name


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        (
            {},
            {
                "gate.weight": (4, 12),
                "up_proj": (4, 16, 12),
                "up_proj_bias": (4, 16),
                "down_proj": (4, 12, 16),
                "down_proj_bias": (4, 12),
            },
        ),
        (
            {"gated": True, "bias": False, "d_out": 3},
            {"gate.weight": (4, 12), "up_proj": (4, 32, 12), "down_proj": (4, 3, 16)},
        ),
    ],
    ids=["biases", "gated without biases"],
)
def test_names_and_shapes_of_the_parameters_are_frozen(options, shapes):
    moe = MoEMLP(12, 16, num_experts=4, top_k=2, **options)
    assert {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()} == shapes
    assert isinstance(moe.gate, nn.Linear)
    assert not list(moe.buffers())


def test_experts_are_drawn_as_linear_layers():
    torch.manual_seed(1)
    expected = [nn.Linear(12, 1, bias=False), nn.Linear(12, 16), nn.Linear(16, 5)]
    torch.manual_seed(1)
    moe = MoEMLP(12, 16, 5, num_experts=1, top_k=1, device="meta").to_empty(device="cpu")
    moe.reset_parameters()
    pairs = [
        (moe.gate.weight, expected[0].weight),
        (moe.up_proj[0], expected[1].weight),
        (moe.up_proj_bias[0], expected[1].bias),
        (moe.down_proj[0], expected[2].weight),
        (moe.down_proj_bias[0], expected[2].bias),
    ]
    for actual, linear in pairs:
        assert relative_error(actual, linear) <= torch.finfo(torch.float32).eps


def test_no_two_experts_are_alike():
    moe = MoEMLP(12, 16, num_experts=4, top_k=2)
    for name, parameter in moe.named_parameters():
        assert len(parameter.flatten(1).unique(dim=0)) == 4, name


def test_works_after_the_meta_device(device):
    with torch.device("meta"):
        moe = MoEMLP(12, 16, num_experts=4, top_k=2)
    assert all(parameter.is_meta for parameter in moe.parameters())
    moe.to_empty(device=device).reset_parameters()
    y, routing = moe(torch.randn(2, 5, 12, device=device))
    assert y.isfinite().all()
    routing.validate(4)


@both_backends
@pytest.mark.parametrize(
    ("lead", "segment", "images"),
    [
        pytest.param((3, 5), None, (3, 5), id="one image per row"),
        pytest.param((2, 3, 5), None, (6, 5), id="images and crops"),
        pytest.param((15,), None, (1, 15), id="flat: all tokens"),
        pytest.param((15,), 5, (3, 5), id="flat, told of images"),
        pytest.param((3, 5), 15, (1, 15), id="one segment over all images"),
        pytest.param((), None, (1, 1), id="one token"),
    ],
)
def test_losses_are_of_each_image(device, lead, segment, images):
    moe, _ = make(device)
    x = torch.randn(*lead, 12, device=device)
    y, routing = moe(x, segment=segment)
    assert y.shape == x.shape
    logits = x.double() @ moe.gate.weight.double().T
    expected = oracles.gating(logits.reshape(-1, 4).cpu(), 2, images[1])
    assert torch.equal(routing.expert_TK.cpu(), expected["expert_TK"])
    for name in ("balance_S", "z_S", "weight_TK"):
        assert getattr(routing, name).shape == expected[name].shape
        assert relative_error(getattr(routing, name), expected[name]) <= 1e-6, name
    assert routing.balance_S.shape == images[:1]


@both_backends
@pytest.mark.parametrize("shape", [(0, 5, 12), (3, 0, 12), (0, 12)], ids=["no images", "empty images", "no tokens"])
def test_no_tokens(device, shape):
    moe, _ = make(device, d_out=7)
    x = torch.zeros(shape, device=device, requires_grad=True)
    y, routing = moe(x, residual=torch.zeros(*shape[:-1], 7, device=device))
    assert y.shape == (*shape[:-1], 7)
    assert routing.balance_S.shape == routing.z_S.shape == ((0,) if len(shape) == 3 else (1,))
    (y.sum() + routing.balance_S.sum() + routing.z_S.sum()).backward()
    assert x.grad.shape == shape
    for name, parameter in moe.named_parameters():
        assert not parameter.grad.count_nonzero(), name
    assert expert_load(routing, 4).tolist() == [0, 0, 0, 0]


@both_backends
def test_the_residual_is_added(device):
    moe, x = make(device, torch.bfloat16, d_out=7)
    residual = torch.randn(2, 5, 7, device=device).bfloat16().requires_grad_()
    y, _ = moe(x)
    fused, _ = moe(x, residual)
    assert fused.dtype == torch.bfloat16
    assert relative_error(fused, y.double() + residual.double()) <= 2 * torch.finfo(torch.bfloat16).eps
    assert moe(x, -y)[0].count_nonzero(), "the output was rounded before the residual was added"
    cotangent = torch.randn_like(fused)
    (gradient,) = torch.autograd.grad(fused, residual, cotangent)
    assert torch.equal(gradient, cotangent)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 module", "autocast"])
def test_a_wider_residual_is_not_rounded(device, autocast):
    moe, x = make(device, torch.float32 if autocast else torch.bfloat16)
    residual = torch.randn(2, 5, 12, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y, _ = moe(x)
        sum_, _ = moe(x, residual)
    assert y.dtype == torch.bfloat16
    assert torch.equal(sum_, residual + y)


@both_backends
def test_the_router_computes_in_float32_by_default(device):
    moe, x = make(device, torch.bfloat16, num_experts=8)
    exact = oracles.gating((x.double() @ moe.gate.weight.double().T).flatten(0, 1).cpu(), 2)
    assert relative_error(moe(x)[1].weight_TK, exact["weight_TK"]) <= 1e-6
    published, _ = make(device, torch.bfloat16, num_experts=8, router_dtype=None)
    published.load_state_dict(moe.state_dict())
    assert relative_error(published(x)[1].weight_TK, exact["weight_TK"]) >= 1e-4


@both_backends
def test_the_published_router(device):
    moe, x = make(device, torch.bfloat16, num_experts=8, router_dtype=None, probs_dtype=torch.bfloat16)
    weight, expert, balance, z = oracles.published_router(F.linear(x, moe.gate.weight), 2)
    routing = moe(x)[1]
    assert routing.weight_TK.dtype == torch.bfloat16
    assert torch.equal(routing.expert_TK, expert.flatten(0, 1).int())
    assert relative_error(routing.weight_TK, weight.flatten(0, 1)) <= torch.finfo(torch.bfloat16).eps
    # the published losses are means over the images, computed from and rounded to bfloat16
    assert relative_error(routing.balance_S.mean(), balance) <= 0.01
    assert relative_error(routing.z_S.mean(), z) <= 0.01


@both_backends
@pytest.mark.parametrize("num_experts", [4, 65], ids=["fused", "more experts than the fused router takes"])
def test_autocast_leaves_the_router_alone(device, num_experts):
    moe, x = make(device, num_experts=num_experts)
    y, routing = moe(x)
    with torch.autocast(device.type, torch.bfloat16):
        y_cast, routing_cast = moe(x)
    assert y_cast.dtype == torch.bfloat16
    assert relative_error(y_cast, y) <= 0.02
    assert_bitwise_equal(routing_cast._asdict(), routing._asdict())
    y_cast.sum().backward()
    assert {parameter.grad.dtype for parameter in moe.parameters()} == {torch.float32}


def test_a_router_without_a_dtype_follows_autocast(device):
    moe, x = make(device, router_dtype=None)
    with torch.autocast(device.type, torch.bfloat16):
        routing = moe(x)[1]
        expected = ck.topk_gating(F.linear(x.bfloat16(), moe.gate.weight.bfloat16()).flatten(0, 1), 2, segment=5)
    assert_bitwise_equal(routing._asdict(), expected._asdict())


class Adapted(nn.Module):
    """What LoRA makes of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.shift = base, base.weight, torch.zeros(base.out_features)

    def forward(self, x):
        return self.base(x) + self.shift.to(x.device)


@both_backends
def test_a_gate_that_was_replaced_is_called(device):
    moe, x = make(device)
    expected = by_module(moe, x)
    moe.gate = Adapted(moe.gate)
    for name, tensor in by_module(moe, x).items():
        assert relative_error(tensor, expected[name.replace(".base", "")]) <= 1e-5, name
    moe.gate.shift[3] = 1e3
    assert (moe(x)[1].expert_TK[:, 0] == 3).all()


@both_backends
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(device, use_reentrant):
    moe, x = make(device)

    def flat(x):  # reentrant checkpoints differentiate nothing but the tensors of a flat tuple
        y, routing = moe(x)
        return y, *routing

    class Checkpointed(nn.ModuleList):
        def forward(self, x):
            y, *routing = checkpoint(flat, x, use_reentrant=use_reentrant)
            return y, ck.Routing(*routing)

    actual = {name.replace(".0.", "."): tensor for name, tensor in by_module(Checkpointed([moe]), x).items()}
    assert_bitwise_equal(actual, by_module(moe, x))


@both_backends
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of its own accord
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(device, dynamic):
    moe, x = make(device, d_out=7)
    torch.compiler.reset()
    compiled = torch.compile(moe, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for images in (x, torch.randn(3, 4, 12, device=device)):
        expected = by_module(moe, images)
        for name, tensor in by_module(compiled, images).items():
            assert relative_error(tensor, expected[name.replace("_orig_mod.", "")]) <= 1e-6, name


@both_backends
def test_a_copy_is_equal_and_independent(device):
    moe, x = make(device)
    expected = moe(x)[0]
    twin = copy.deepcopy(moe)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert torch.equal(twin(x)[0], expected)
    assert not moe(x)[0].count_nonzero()


@both_backends
def test_state_dict_round_trip(device):
    moe, x = make(device)
    other, _ = make(device)
    assert not torch.equal(other(x)[0], moe(x)[0])
    other.load_state_dict(moe.state_dict(), strict=True)
    assert torch.equal(other(x)[0], moe(x)[0])


@both_backends
def test_a_call_leaves_no_trace(device):
    moe, x = make(device)
    before = set(vars(moe)), {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    moe(x)
    assert set(vars(moe)) == before[0]
    assert_bitwise_equal(moe.state_dict(), before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(d_in=8.0), r"d_in: expected a positive integer, got 8\.0"),
        (dict(d_in=0), r"d_in: expected a positive integer, got 0"),
        (dict(d_hidden=-1), r"d_hidden: expected a positive integer, got -1"),
        (dict(d_out=0), r"d_out: expected a positive integer, got 0"),
        (dict(num_experts=0), r"num_experts: expected a positive integer, got 0"),
        (dict(top_k=0), r"top_k: expected an integer in 1\.\.4 .*, got 0"),
        (dict(top_k=5), r"top_k: expected an integer in 1\.\.4 .*, got 5"),
        (dict(activation="tanh"), r"activation: expected one of \['gelu', .*\], got 'tanh'"),
        (dict(router_dtype=torch.bfloat16), r"router_dtype: expected one of \[torch\.float32, None\], got torch\.bfl"),
        (dict(probs_dtype=torch.int32), r"probs_dtype: expected one of \[.*\], got torch\.int32"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MoEMLP(**{"d_in": 12, "d_hidden": 16, "num_experts": 4, "top_k": 2, **options})


@both_backends
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=(2, 5, 11)), r"x: expected shape \[\.\.\., 12\] \(d_in\), got \[2, 5, 11\]"),
        (dict(x=()), r"x: expected shape \[\.\.\., 12\] \(d_in\), got \[\]"),
        (dict(residual=(5, 12)), r"residual: expected shape \[2, 5, 12\] of the output, got \[5, 12\]"),
        (dict(segment=3), r"segment: expected a divisor of the 10 tokens, got 3"),
        (dict(segment=0), r"segment: expected a divisor of the 10 tokens, got 0"),
        (dict(dtype=torch.float16), r"x: expected dtype torch\.float32 as the module's .*, got torch\.float16"),
    ],
)
def test_wrong_inputs(device, arguments, message):
    moe, _ = make(device)
    x = torch.zeros(arguments.get("x", (2, 5, 12)), device=device, dtype=arguments.get("dtype"))
    residual = torch.zeros(arguments["residual"], device=device) if "residual" in arguments else None
    with pytest.raises(ValueError, match=message):
        moe(x, residual, segment=arguments.get("segment"))


def test_repr_says_what_it_is():
    moe = MoEMLP(12, 16, num_experts=4, top_k=2, activation="silu", gated=True, bias=False)
    for part in ("12, 16, 12", "num_experts=4", "top_k=2", "activation=silu", "gated=True", "bias=False"):
        assert part in repr(moe)


@both_backends
def test_expert_load_counts_all_choices(device):
    moe, x = make(device)
    routing = moe(x)[1]
    load = expert_load(routing, 4)
    assert load.dtype == torch.float32
    assert float(load.sum()) == pytest.approx(1)
    counts = torch.bincount(routing.expert_TK.flatten().cpu(), minlength=4)
    assert relative_error(load, counts / 20) <= 1e-6
    assert expert_load(routing._replace(expert_TK=torch.full_like(routing.expert_TK, 2)), 4).tolist() == [0, 0, 1, 0]
    # ids that expert parallelism leaves to other ranks are no choices of these experts
    routing.expert_TK[routing.expert_TK == 1] = 4
    counts[1] = 0
    assert relative_error(expert_load(routing, 4), counts / counts.sum()) <= 1e-6
