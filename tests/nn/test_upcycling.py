# SPDX-License-Identifier: Apache-2.0
"""A dense MLP and the experts made of it compute the same, whatever the gate; what cannot be copied is refused."""

import functools
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cumo_kernels as ck
from cumo.nn import upcycle_mlp
from tests.numerics import assert_bitwise_equal, relative_error


class QuickGELUActivation(nn.Module):
    """As in transformers, which spells it out."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class CLIPMLP(nn.Module):
    """As in transformers."""

    def __init__(self, d_in=12, d_hidden=16, d_out=12, activation=None, bias=True):
        super().__init__()
        self.config = SimpleNamespace(hidden_act="quick_gelu")
        self.activation_fn = activation or QuickGELUActivation()
        self.fc1 = nn.Linear(d_in, d_hidden, bias=bias)
        self.fc2 = nn.Linear(d_hidden, d_out, bias=bias)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class TimmMlp(nn.Module):
    """As in timm: dropout and a place for a norm, both idle by default."""

    def __init__(self, drop=0.0, norm=None):
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(drop)
        self.norm = norm or nn.Identity()
        self.fc2 = nn.Linear(16, 12)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class LlamaMLP(nn.Module):
    """As in transformers."""

    def __init__(self, bias=False, gate=True):
        super().__init__()
        if gate:
            self.gate_proj = nn.Linear(12, 16, bias=bias)
        self.up_proj = nn.Linear(12, 16, bias=bias)
        self.down_proj = nn.Linear(16, 12, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        if not hasattr(self, "gate_proj"):
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherMLP(CLIPMLP):
    """Says by its configuration alone what its activation is, or by a module under a name of its own."""

    def __init__(self, module=None):
        super().__init__()
        del self.activation_fn
        if module is not None:
            self.nonlinearity = module

    def forward(self, x):
        return self.fc2(getattr(self, "nonlinearity", QuickGELUActivation())(self.fc1(x)))


def sequential(*middle, bias=True):
    return nn.Sequential(nn.Linear(12, 16, bias=bias), *middle, nn.Linear(16, 7, bias=bias))


MLPS = {
    "connector": lambda: sequential(nn.GELU()),
    "connector with idle layers": lambda: sequential(nn.Identity(), nn.ReLU(), nn.Dropout(0.0)),
    "without biases": lambda: sequential(nn.SiLU(), bias=False),
    "bias in the first layer only": lambda: nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 7, bias=False)),
    "bias in the second layer only": lambda: nn.Sequential(nn.Linear(12, 16, bias=False), nn.GELU(), nn.Linear(16, 7)),
    "clip": CLIPMLP,
    "activation is a function": lambda: CLIPMLP(activation=F.relu),
    "activation by configuration": OtherMLP,
    "activation under another name": lambda: OtherMLP(nn.ReLU()),
    "timm": TimmMlp,
    "llama": LlamaMLP,
    "llama with biases": lambda: LlamaMLP(bias=True),
    "nemotron": lambda: LlamaMLP(gate=False),
}


def upcycle(mlp, num_experts=4, top_k=2, **options):
    return upcycle_mlp(mlp, num_experts, top_k, **options)


@pytest.mark.usefixtures("backend", "poisoned_memory")
@pytest.mark.parametrize("name", MLPS)
def test_output_is_that_of_the_dense_mlp_for_any_gate(device, name):
    mlp = MLPS[name]().to(device)
    x = torch.randn(2, 5, 12, device=device)
    for top_k, gate_scale in ((1, 1), (2, 100), (4, 0)):
        moe = upcycle(mlp, 4, top_k)
        with torch.no_grad():
            moe.gate.weight.normal_(std=gate_scale)
        assert relative_error(moe(x)[0], mlp(x)) <= 1e-6


@pytest.mark.usefixtures("backend")
def test_gradients_of_all_experts_add_up_to_that_of_the_dense_mlp(device):
    mlp = LlamaMLP(bias=True).to(device)
    moe = upcycle(mlp)
    x = torch.randn(2, 5, 12, device=device)
    mlp(x).square().sum().backward()
    moe(x)[0].square().sum().backward()
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    expected = {
        "up_proj": torch.cat([gate.weight.grad, up.weight.grad]),
        "up_proj_bias": torch.cat([gate.bias.grad, up.bias.grad]),
        "down_proj": down.weight.grad,
        "down_proj_bias": down.bias.grad,
    }
    for name, gradient in expected.items():
        assert relative_error(getattr(moe, name).grad.sum(0), gradient) <= 1e-5, name


@pytest.mark.parametrize("name", MLPS)
def test_nothing_is_shared_with_the_dense_mlp_or_changed_in_it(name):
    mlp = MLPS[name]()
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    moe = upcycle(mlp)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.fill_(0)
    assert_bitwise_equal(mlp.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_mode_and_missing_biases_are_kept(dtype):
    moe = upcycle(sequential(nn.GELU(), bias=False).to(dtype).eval())
    assert {name: parameter.dtype for name, parameter in moe.named_parameters()} == {
        "gate.weight": dtype,
        "up_proj": dtype,
        "down_proj": dtype,
    }
    assert not moe.training
    assert upcycle(sequential(nn.GELU())).training


def test_what_is_frozen_stays_frozen():
    mlp = LlamaMLP(bias=True)
    mlp.up_proj.weight.requires_grad_(False)
    mlp.gate_proj.weight.requires_grad_(False)
    mlp.down_proj.bias.requires_grad_(False)
    trained = {name for name, parameter in upcycle(mlp).named_parameters() if parameter.requires_grad}
    assert trained == {"gate.weight", "up_proj_bias", "down_proj"}


def test_options_reach_the_module():
    options = dict(router_dtype=None, probs_dtype=torch.bfloat16, recompute=True)
    moe = upcycle(sequential(nn.ReLU()), 5, 3, **options)
    assert (moe.num_experts, moe.top_k, moe.gate.compute_dtype) == (5, 3, None)
    assert (moe.probs_dtype, moe.recompute, moe.normalize) == (torch.bfloat16, True, True)


def test_a_seed_decides_gate_and_noise_alone():
    mlp = sequential(nn.GELU())

    def seeded(seed, noise=0.1):
        return upcycle(mlp, noise=noise, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first = seeded(7)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.randn(3)
    assert_bitwise_equal(seeded(7).state_dict(), first.state_dict())
    assert torch.equal(seeded(7, noise=0).gate.weight, first.gate.weight)
    for name, tensor in seeded(8).state_dict().items():
        assert not torch.equal(tensor, first.state_dict()[name]), name


def test_gate_is_drawn_as_a_linear_layer():
    torch.manual_seed(1)
    expected = nn.Linear(12, 4, bias=False).weight
    moe = upcycle(sequential(nn.GELU()), generator=torch.Generator().manual_seed(1))
    assert torch.equal(moe.gate.weight, expected)
    assert moe.gate.weight.requires_grad


def test_noise_is_relative_to_each_tensor():
    mlp = nn.Sequential(nn.Linear(200, 300), nn.GELU(), nn.Linear(300, 100))
    with torch.no_grad():
        mlp[2].weight.mul_(50)
    moe = upcycle(mlp, noise=0.25, generator=torch.Generator().manual_seed(0))
    sources = dict(zip(("up_proj", "up_proj_bias", "down_proj", "down_proj_bias"), mlp.parameters(), strict=True))
    for name, source in sources.items():
        noise = (getattr(moe, name) - source).detach()
        slack = 5 / source.numel() ** 0.5  # five times the deviation of a sample's standard deviation
        for e in range(4):
            assert float(noise[e].std() / source.detach().std()) == pytest.approx(0.25, rel=slack), name
        assert abs(float(torch.corrcoef(torch.stack([noise[0].flatten(), noise[1].flatten()]))[0, 1])) <= slack, name


def test_meta_device():
    with torch.device("meta"):
        mlp = CLIPMLP()
    moe = upcycle(mlp, noise=0.1)
    assert all(parameter.is_meta for parameter in moe.parameters())
    assert moe.up_proj.shape == (4, 16, 12)


class GELUActivation(nn.Module):
    """As in transformers and timm: exact, spelt out."""

    def forward(self, x):
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))


class NewGELUActivation(nn.Module):
    """As in transformers."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def label(value) -> str:
    """A test id without a memory address: those differ between the processes that collect the tests."""
    return re.sub(r" at 0x\w+", "", str(value))[:40]


RECOGNISED = [
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (GELUActivation(), "gelu"),
    (NewGELUActivation(), "gelu_tanh"),
    (QuickGELUActivation(), "quick_gelu"),
    (nn.SiLU(), "silu"),
    (nn.SiLU(inplace=True), "silu"),
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (F.gelu, "gelu"),
    (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    (F.silu, "silu"),
    (torch.relu, "relu"),
    (lambda x: F.relu(x) ** 2, "relu2"),
    ("gelu", "gelu"),
    ("gelu_new", "gelu_tanh"),
    ("gelu_pytorch_tanh", "gelu_tanh"),
    ("gelu_fast", "gelu_tanh"),
    ("quick_gelu", "quick_gelu"),
    ("silu", "silu"),
    ("swish", "silu"),
    ("relu", "relu"),
    ("relu2", "relu2"),
]


@pytest.mark.parametrize(("activation", "name"), RECOGNISED, ids=label)
def test_activations_are_recognised(activation, name):
    moe = upcycle(CLIPMLP(activation=activation))
    assert moe.activation == name


def test_every_activation_can_be_recognised():
    assert {name for _, name in RECOGNISED} == set(ck.ACTIVATIONS)


class ScaledReLU(nn.Module):
    """ReLU until it is trained."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * F.relu(x)


UNKNOWN = [
    ScaledReLU(),
    nn.Tanh(),
    nn.ReLU6(),
    nn.LeakyReLU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.PReLU(init=0.0),
    nn.GLU(),
    nn.LayerNorm(16),
    nn.RReLU(),
    F.mish,
    lambda x: F.gelu(x).clamp(max=100),
    lambda x, y: x + y,
    lambda x: None,  # noqa: ARG005
    "gelu_10",
]


@pytest.mark.parametrize("activation", UNKNOWN, ids=label)
def test_unknown_activations_are_named_and_can_be_overridden(activation):
    mlp = CLIPMLP(activation=activation)
    with pytest.raises(
        ValueError, match=r"mlp: expected an activation out of \['gelu', .*\], got .*activation= over"
    ) as e:
        upcycle(mlp)
    assert repr(activation) in str(e.value)
    assert upcycle(mlp, activation="relu").activation == "relu"


def changed(mlp, **attributes):
    for name, value in attributes.items():
        setattr(mlp, name, value)
    return mlp


class Quantised(nn.Linear):
    """Keeps its weight packed, as 4-bit layers do."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter(torch.zeros(d_in * d_out // 2, 1, dtype=torch.uint8), requires_grad=False)


REFUSED = {
    "a linear layer": (lambda: nn.Linear(3, 3), "expected a Sequential, or a module with .*fc1 and fc2 or"),
    "empty": (lambda: nn.Sequential(), "expected a Sequential of Linear, activation, Linear"),
    "no activation": (lambda: sequential(nn.Identity()), r"got \['Linear.*, 'Identity\(\)', 'Linear"),
    "three layers": (lambda: sequential(nn.Linear(16, 16)), "expected a Sequential of Linear, activation, Linear"),
    "norm in Sequential": (lambda: sequential(nn.GELU(), nn.LayerNorm(16)), "expected a Sequential of Linear"),
    "dropout in Sequential": (lambda: sequential(nn.GELU(), nn.Dropout(0.1)), r"Dropout\(p=0.1"),
    "dropout in eval mode": (lambda: sequential(nn.GELU(), nn.Dropout(0.1)).eval(), r"Dropout\(p=0.1"),
    "dropout": (lambda: TimmMlp(drop=0.1), "got drop1, drop2 too in TimmMlp"),
    "norm": (lambda: TimmMlp(norm=nn.LayerNorm(16)), "got norm too in TimmMlp"),
    "scale": (lambda: changed(CLIPMLP(), scale=nn.Parameter(torch.ones(1))), "got scale too in CLIPMLP"),
    "two unknown children": (
        lambda: changed(OtherMLP(nn.ReLU()), other=nn.Tanh()),
        "expected fc1, fc2 and an activation .* got nonlinearity, other too",
    ),
    "no activation at all": (lambda: changed(OtherMLP(), config=None), "expected an activation .* got None"),
    "packed gate": (lambda: changed(CLIPMLP(), fc2=nn.Linear(8, 12)), "down projection to take the 16 features"),
    "convolution": (
        lambda: changed(CLIPMLP(), fc1=nn.Conv2d(12, 16, 1)),
        "up projection to be an nn.Linear, got Conv2d",
    ),
    "quantised": (
        lambda: changed(CLIPMLP(), fc2=Quantised(16, 12)),
        "floating-point weight of shape .* down projection",
    ),
    "two dtypes": (
        lambda: changed(CLIPMLP(), fc2=nn.Linear(16, 12).bfloat16()),
        "down projection in torch.float32 on cpu as its up projection, got torch.bfloat16",
    ),
    "two devices": (lambda: changed(CLIPMLP(), fc2=nn.Linear(16, 12, device="meta")), "got torch.float32 on meta"),
    "gate of another width": (lambda: changed(LlamaMLP(), gate_proj=nn.Linear(12, 8, bias=False)), "expected its gate"),
    "gate with a bias": (lambda: changed(LlamaMLP(), gate_proj=nn.Linear(12, 16)), "expected its gate projection"),
    "gate frozen alone": (
        lambda: changed(LlamaMLP(), gate_proj=nn.Linear(12, 16, bias=False).requires_grad_(False)),
        r"\(shape, requires_grad\) of its up projection, .*True.*, got .*False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_copied_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^mlp: .*{message}"):
        upcycle(make())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(normalize=False), "normalize: expected True, got False: experts that agree"),
        (dict(noise=-0.1), "noise: expected a finite number >= 0, got -0.1"),
        (dict(noise=float("nan")), "noise: expected a finite number >= 0, got nan"),
        (dict(noise=float("inf")), "noise: expected a finite number >= 0, got inf"),
        (dict(activation="tanh"), "activation: expected one of .* got 'tanh'"),
        (dict(top_k=5), r"top_k: expected an integer in 1\.\.4"),
        (dict(num_experts=0), "num_experts: expected a positive integer, got 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(CLIPMLP(), **options)
