# SPDX-License-Identifier: Apache-2.0
"""Experts modules of transformers compute the same on "cumo" as on "eager", the loop over experts in their own files:
every class that the installed transformers decorates, and every combination of what such a class may be.
"""

import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

import cumo_kernels as ck
from tests.numerics import assert_as_exact_as_eager, assert_bitwise_equal, relative_error

transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs transformers 5.17 or newer")
moe = importlib.import_module("transformers.integrations.moe")
integration = importlib.import_module("cumo.integrations.transformers")

both_backends = pytest.mark.usefixtures("backend")
E, H, I, K = 4, 16, 12, 2

# Every name by which the config of some family calls a property of its experts.
CONFIG = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), H),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size"), I),
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu"),
    **dict(swiglu_limit=1.0, swiglu_alpha=1.7, mlp_gate_softcap=1.0, mlp_up_softcap=1.0),
    **dict(post_norm_eps=1e-6, moe_latent_size=None),
}
# The families whose experts have a gate or a norm of their own; whatever is not named here has to run fused.
COMPOSED = {"beam", "deepseek_v4", "glm5_next", "gpt_oss", "hy_v4", "inkling2", "minimax_m3_vl"}
COMPOSED |= {"muse_spark", "openai_privacy_filter"}


def find_experts_classes():
    """(family, class name) of every class that transformers decorates with `use_experts_implementation`."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        decorated = re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text("utf-8"), re.MULTILINE)
        found += [(path.parent.name, name) for name in decorated]
    return found


EXPERTS_CLASSES = find_experts_classes()


def randomise(experts, device):
    """Values that no activation and no gate leaves alone."""
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (H**-0.5 if parameter.dim() == 3 else 1.0))
    return experts.to(device)


def make_experts(family, device, class_name=None, **options):
    """The experts of a family, those of its first class if it has several."""
    class_name = class_name or next(name for f, name in EXPERTS_CLASSES if f == family)
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return randomise(getattr(modeling, class_name)(SimpleNamespace(**CONFIG | options)), device)


def make_inputs(device, dtype=torch.float32, weight_dtype=torch.float32):
    """hidden_states, top_k_index and top_k_weights of 7 tokens, none of which chooses expert 1."""
    score_TE = torch.rand(7, E)
    score_TE[:, 1] = -1.0
    tensors = torch.randn(7, H).to(dtype), score_TE.topk(K).indices, torch.rand(7, K).to(weight_dtype)
    return [tensor.to(device) for tensor in tensors]


def run(experts, implementation, hidden, index, weight, autocast=None):
    """The output of an experts module, and every gradient."""
    experts.config._experts_implementation = implementation
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
    with torch.autocast(hidden.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = experts(hidden, index, weight)
    wrt = {"hidden": hidden, "weight": weight, **dict(experts.named_parameters())}
    cotangent = torch.arange(y.numel(), device=y.device).double().sin().view_as(y).to(y.dtype)
    grads = torch.autograd.grad(y, list(wrt.values()), cotangent)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wrt, grads, strict=True)}


def assert_equals_eager(experts, hidden, index, weight, autocast=None, rounded_to=None):
    """ "cumo" is as exact as "eager", both measured against "eager" in float64."""
    exact = run(copy.deepcopy(experts).double(), "eager", hidden.double(), index, weight.double())
    eager = run(experts, "eager", hidden, index, weight, autocast)
    actual = run(experts, "cumo", hidden, index, weight, autocast)
    assert_as_exact_as_eager(actual, eager, exact, rounded_to=rounded_to)


def path_of(experts):
    """How "cumo" runs an experts module."""
    experts.config._experts_implementation = "cumo"
    (path,) = integration.execution_paths(experts).values()
    return path


def test_the_search_finds_the_classes():
    families = {family for family, _ in EXPERTS_CLASSES}
    assert families >= {"mixtral", "gpt_oss", "nemotron_h", "deepseek_v3", "openai_privacy_filter"}
    assert len(EXPERTS_CLASSES) >= 50


@pytest.mark.parametrize(("family", "class_name"), EXPERTS_CLASSES, ids=[name for _, name in EXPERTS_CLASSES])
def test_every_class_equals_eager(device, family, class_name):
    experts = make_experts(family, device, class_name)
    assert path_of(experts) == ("composed" if family in COMPOSED else "fused")
    with ck.use_backend("reference"):
        assert_equals_eager(experts, *make_inputs(device))


@both_backends
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_kernels_equal_eager(device, family):
    assert_equals_eager(make_experts(family, device), *make_inputs(device))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_takes_the_path_that_it_names(device, family, monkeypatch):
    experts, calls, moe_mlp = make_experts(family, device), [], ck.moe_mlp
    monkeypatch.setattr(ck, "moe_mlp", lambda *args, **options: calls.append(args) or moe_mlp(*args, **options))
    run(experts, "cumo", *make_inputs(device))
    assert len(calls) == (1 if path_of(experts) == "fused" else 0)


def define_experts(has_gate, has_bias, is_transposed):
    """An experts class with these flags, whose output is narrower than its input."""

    @moe.use_experts_implementation(has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed)
    class Experts(nn.Module):
        def __init__(self, _config):
            super().__init__()
            self.num_experts, self.act_fn = E, nn.GELU()
            self.up = "gate_up_proj" if has_gate else "up_proj"
            for name, rows, columns in ((self.up, 2 * I if has_gate else I, H), ("down_proj", 10, I)):
                shape = (columns, rows) if is_transposed else (rows, columns)
                setattr(self, name, nn.Parameter(torch.empty(E, *shape)))
                if has_bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.empty(E, rows)))

        def linear(self, x, name, expert):
            weight = getattr(self, name)[expert]
            bias = getattr(self, f"{name}_bias")[expert] if has_bias else None
            return nn.functional.linear(x, weight.T if is_transposed else weight, bias)

        def forward(self, hidden, index, weight):
            total = 0
            for expert in range(E):
                h = self.linear(hidden, self.up, expert)
                h = self._apply_gate(h) if has_gate else self.act_fn(h)
                share = (weight * (index == expert)).sum(1, keepdim=True)
                total = total + share * self.linear(h, "down_proj", expert)
            return total

    return Experts


@both_backends
@pytest.mark.parametrize("is_transposed", [False, True], ids=["as nn.Linear", "transposed"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["without biases", "biases"])
@pytest.mark.parametrize("has_gate", [False, True], ids=["plain", "gated"])
def test_every_combination_of_flags(device, has_gate, has_bias, is_transposed):
    experts = randomise(define_experts(has_gate, has_bias, is_transposed)(SimpleNamespace()), device)
    assert path_of(experts) == "fused"
    assert_equals_eager(experts, *make_inputs(device))


NAME_OF_ACTIVATION = {
    **dict(silu="silu", swish="silu", relu="relu", relu2="relu2", quick_gelu="quick_gelu"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
}


@pytest.mark.parametrize("name", transformers.activations.ACT2CLS)
def test_every_activation_of_transformers(device, name):
    experts = make_experts("nemotron_h", device, mlp_hidden_act=name)
    assert integration.activation_name(experts.act_fn) == NAME_OF_ACTIVATION.get(name)
    assert path_of(experts) == ("fused" if name in NAME_OF_ACTIVATION else "composed")
    with ck.use_backend("reference"):
        assert_equals_eager(experts, *make_inputs(device))


@pytest.mark.parametrize(
    ("act_fn", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.functional.silu, "silu"),
        (nn.functional.gelu, "gelu"),
        (nn.functional.relu, "relu"),
        (type("Subclass", (nn.SiLU,), {})(), None),
        (lambda x: nn.functional.silu(x), None),
    ],
    ids=["GELU", "GELU by tanh", "F.silu", "F.gelu", "F.relu", "subclasses may do anything", "so may functions"],
)
def test_activation_is_known_by_what_it_is(act_fn, name):
    assert integration.activation_name(act_fn) == name


CHANGES = {
    "another gate": lambda m: setattr(m, "_apply_gate", lambda gate_up: 3 * gate_up.chunk(2, dim=-1)[0]),
    "another forward of the activation": lambda m: setattr(m.act_fn, "forward", torch.tanh),
    "a hook on the activation": lambda m: m.act_fn.register_forward_hook(lambda *call: 2 * call[-1]),
    "a hook on its input": lambda m: m.act_fn.register_forward_pre_hook(lambda *call: (-call[-1][0],)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_on_a_module_is_called(device, change):
    experts = make_experts("mixtral", device)
    hidden, index, weight = make_inputs(device)
    before = run(experts, "cumo", hidden, index, weight)["y"]
    change(experts)
    assert path_of(experts) == "composed"
    after = run(experts, "cumo", hidden, index, weight)["y"]
    assert relative_error(after, before) > 0.1, "the change changes nothing"
    expected = 0  # eager Mixtral has its gate written out, and would not see another
    for expert, (up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        share = (weight * (index == expert)).sum(1, keepdim=True)
        expected = expected + share * (experts._apply_gate(hidden @ up.T) @ down.T)
    assert relative_error(after, expected) <= 1e-6


@both_backends
@pytest.mark.parametrize("family", ["mixtral", "nemotron_h", "gpt_oss"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "autocast"),
    [
        pytest.param(torch.bfloat16, torch.float32, None, id="bf16, router weights fp32 as in mixtral"),
        pytest.param(torch.bfloat16, torch.bfloat16, None, id="bf16, router weights bf16 as in qwen3_moe"),
        pytest.param(torch.float32, torch.float32, torch.bfloat16, id="autocast"),
        pytest.param(torch.float32, torch.bfloat16, torch.bfloat16, id="autocast, router weights bf16"),
    ],
)
def test_dtypes(device, family, dtype, weight_dtype, autocast):
    # no clamp within reach: its gradient jumps where rounding pushes a value over it
    experts = make_experts(family, device, swiglu_limit=1e4).to(dtype)
    inputs = make_inputs(device, dtype, weight_dtype)
    assert_equals_eager(experts, *inputs, autocast=autocast, rounded_to=torch.bfloat16)


def test_mixed_dtypes_without_autocast_are_refused(device):
    experts = make_experts("mixtral", device).bfloat16()
    for implementation, error in (("eager", RuntimeError), ("cumo", ValueError)):
        with pytest.raises(error, match="dtype"):
            run(experts, implementation, *make_inputs(device))


@both_backends
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("family", ["mixtral", "nemotron_h", "gpt_oss"])
def test_expert_parallel_shards_add_up(device, family):
    """Two processes with half of the experts each: a choice of the other half has the id that is one too many and the
    weight 0. Neither these nor tokens that chose nothing here leave a trace, in memory that is full of NaN."""
    whole = make_experts(family, device)
    hidden, index, weight = make_inputs(device)
    expected = run(whole, "eager", hidden, index, weight)
    shards = []
    for mine in (slice(0, E // 2), slice(E // 2, E)):
        shard, elsewhere = copy.deepcopy(whole), (index < mine.start) | (index >= mine.stop)
        shard.num_experts = E // 2
        for name, parameter in whole.named_parameters():
            setattr(shard, name, nn.Parameter(parameter.detach()[mine].clone()))
        local = (index - mine.start).masked_fill(elsewhere, E // 2), weight.masked_fill(elsewhere, 0.0)
        shards.append(run(shard, "cumo", hidden, *local))
        assert not shards[-1]["dweight"][elsewhere].count_nonzero()
    for name, tensor in expected.items():
        parts = [shard[name] for shard in shards]
        actual = sum(parts) if name in ("y", "dhidden", "dweight") else torch.cat(parts)
        assert relative_error(actual, tensor) <= 1e-6, name


@both_backends
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_unusual_inputs(device, family):
    experts = make_experts(family, device)
    hidden, index, weight = make_inputs(device)
    expected = run(experts, "cumo", hidden, index, weight)
    assert_bitwise_equal(run(experts, "cumo", hidden, index.int(), weight), expected)
    strided = (tensor.T.contiguous().T for tensor in (hidden, index, weight))
    assert_bitwise_equal(run(experts, "cumo", *strided), expected)
    nobody = run(experts, "cumo", hidden, torch.full_like(index, E), torch.zeros_like(weight))
    assert not any(tensor.count_nonzero() for tensor in nobody.values())
    assert run(experts, "cumo", hidden[:0], index[:0], weight[:0])["y"].shape == (0, H)
    twice = index[:, :1].expand(-1, K)  # zaya replaces choices that it skips by expert 0
    assert_equals_eager(experts, hidden, twice, weight)


@both_backends
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of its own accord
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_compiles_in_one_graph(device, family):
    experts, inputs = make_experts(family, device), make_inputs(device)
    expected = run(experts, "cumo", *inputs)
    torch.compiler.reset()
    compiled = run(torch.compile(experts, fullgraph=True, backend="aot_eager"), "cumo", *inputs)
    for name, tensor in compiled.items():
        assert relative_error(tensor, expected[name.replace("_orig_mod.", "")]) <= 1e-6, name


FAULTS = {
    "not decorated": (lambda m: delattr(m, "has_bias"), ValueError, "decorated.* without has_bias"),
    "interleaved, but how?": (lambda m: setattr(m, "is_concatenated", False), NotImplementedError, "_apply_gate"),
    "no activation": (lambda m: delattr(m, "act_fn"), ValueError, "expected a callable act_fn, got None"),
    "no biases": (lambda m: setattr(m, "has_bias", True), ValueError, "gate_up_proj_bias: .* got NoneType"),
    "other experts": (lambda m: setattr(m, "num_experts", 3), ValueError, r"num_experts=3, got shape \[4, 24"),
    "quantized": (lambda m: setattr(m.down_proj, "data", m.down_proj.char()), NotImplementedError, "torch.int8"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_refuses_what_it_cannot_run(spoil, error, message):
    experts = make_experts("mixtral", "cpu").requires_grad_(False)
    integration.check_supported(experts)
    spoil(experts)
    with pytest.raises(error, match=f"MixtralExperts.*{message}"):
        integration.experts_forward(experts, *make_inputs("cpu"))


def test_refuses_distributed_parameters():
    experts = make_experts("mixtral", "cpu")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = distributed.tensor.distribute_tensor(experts.down_proj, mesh, [distributed.tensor.Shard(0)])
        experts.down_proj = nn.Parameter(sharded)
        with pytest.raises(NotImplementedError, match="down_proj: expected a plain tensor .* got DTensor"):
            integration.experts_forward(experts, *make_inputs("cpu"))
    finally:
        distributed.destroy_process_group()
