# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers compute, train and generate the same on "cumo" as on "eager": of families that differ in
what surrounds their experts.
"""

import importlib
import re

import pytest
import torch
from torch import nn

from tests.numerics import assert_bitwise_equal, relative_error

transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs transformers 5.17 or newer")
moe = importlib.import_module("transformers.integrations.moe")
integration = importlib.import_module("cumo.integrations.transformers")

both_backends = pytest.mark.usefixtures("backend")

SIZES = {
    **dict(vocab_size=64, hidden_size=32, intermediate_size=24, moe_intermediate_size=24, head_dim=8),
    **dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2),
    **dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None),
}
GROUPS = dict(n_routed_experts=4, n_group=2, topk_group=1)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
FULL_ATTENTION = dict(layer_types=["full_attention", "full_attention"])
# The family, and why it is here.
MODELS = {
    "mixtral: the plainest": dict(num_local_experts=4),
    "qwen2_moe: a shared expert beside": dict(num_experts=4, shared_expert_intermediate_size=24),
    "qwen3_moe: router weights in the dtype of the model": dict(num_experts=4),
    "olmoe: router weights that do not add up to 1": dict(num_experts=4),
    "deepseek_v2: a dense layer first": MLA | GROUPS | dict(topk_method="greedy", first_k_dense_replace=1),
    "deepseek_v3: choice by groups, scaled weights": MLA | GROUPS | dict(first_k_dense_replace=0),
    "glm4_moe: a sigmoid router": GROUPS | dict(first_k_dense_replace=0),
    "granitemoe: other names": dict(num_local_experts=4),
    "phimoe: a router that is random in training": dict(num_local_experts=4),
    "ernie4_5_moe: a corrected choice": dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=0),
    "lfm2_moe: the activation is a function": FULL_ATTENTION | dict(num_experts=4, num_dense_layers=0),
    "gemma4_text: GELU by tanh": {
        **dict(enable_moe_block=True, num_experts=4, top_k_experts=2, hidden_size_per_layer_input=8),
        **dict(vocab_size_per_layer_input=64, num_kv_shared_layers=0, global_head_dim=8, **FULL_ATTENTION),
    },
    "nemotron_h: no gate, squared ReLU": {
        **dict(layers_block_type=["moe", "attention"], moe_shared_expert_intermediate_size=24, **GROUPS),
    },
    "aria_text: transposed weights": dict(moe_num_experts=4, moe_topk=2),
    "gpt_oss: transposed, biases, a gate of its own": dict(num_local_experts=4, sliding_window=8),
    "openai_privacy_filter: as gpt_oss, concatenated": dict(num_local_experts=4, sliding_window=8),
}
COMPOSED = {"gpt_oss", "openai_privacy_filter"}
MIXTRAL, GPT_OSS, NEMOTRON_H = (
    next(case for case in MODELS if case.startswith(family)) for family in ("mixtral", "gpt_oss", "nemotron_h")
)


def make_model(case, device, implementation="cumo"):
    family = case.partition(":")[0]
    task = "TokenClassification" if family == "openai_privacy_filter" else "CausalLM"
    config = transformers.AutoConfig.for_model(family, **SIZES | MODELS[case])
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config, experts_implementation=implementation)
    if family == "aria_text" and not model._can_set_experts_implementation():
        pytest.skip(f"transformers {transformers.__version__} has no experts interface for {family}")
    with torch.no_grad():  # the initial values are so small that a layer hardly changes anything
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model.to(device).eval()


def run(model, batch=2, length=9):
    """Logits, and the gradients of the input embeddings and of all parameters."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (batch, length), generator=generator).to(model.device)
    # gemma4 looks up which tokens these are the embeddings of
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.zero_grad()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    logits.backward(torch.arange(logits.numel(), device=logits.device).sin().view_as(logits))
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), "embeddings": embeddings.grad, **grads}


def assert_equal(actual, expected):
    """In float32; errors up to 2e-6 were measured."""
    assert actual.keys() == expected.keys()
    for part in ("experts.*_proj", "gate.weight|router.*weight"):
        assert any(re.search(part, name) and tensor.count_nonzero() for name, tensor in actual.items()), part
    errors = {name: relative_error(actual[name], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case", MODELS)
def test_equals_eager(device, case):
    model = make_model(case, device, "eager")
    expected = run(model)
    model.set_experts_implementation("cumo")
    path = "composed" if case.partition(":")[0] in COMPOSED else "fused"
    assert set(integration.execution_paths(model).values()) == {path}
    assert_equal(run(model), expected)


@both_backends
@pytest.mark.parametrize("case", [MIXTRAL, GPT_OSS, NEMOTRON_H])
def test_equals_eager_on_either_backend(device, case):
    model = make_model(case, device)
    actual = run(model, batch=1, length=5)
    model.set_experts_implementation("eager")
    assert_equal(actual, run(model, batch=1, length=5))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("case", [MIXTRAL, GPT_OSS, NEMOTRON_H])
def test_generates_the_same_tokens(device, case, batch, monkeypatch):
    model, ids = make_model(case, device), torch.randint(3, 64, (batch, 5), device=device)
    tokens = []

    def count(experts, hidden, *routing):
        tokens.append(len(hidden))
        return integration.experts_forward(experts, hidden, *routing)

    monkeypatch.setitem(moe.ExpertsInterface._global_mapping, "cumo", count)
    actual = model.generate(ids, max_new_tokens=4, do_sample=False)
    layers = len(integration.execution_paths(model))
    assert tokens == [5 * batch] * layers + [batch] * layers * 3, "decoding took another way"
    model.set_experts_implementation("eager")
    assert torch.equal(actual, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("case", [MIXTRAL, GPT_OSS])
def test_activation_checkpointing_changes_nothing(device, case):
    model = make_model(case, device).train()
    expected = run(model)
    calls = []
    for name in integration.execution_paths(model):
        model.get_submodule(name).register_forward_pre_hook(lambda module, _: calls.append(module))
    # the name of the method since transformers 5.23, and before
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_bitwise_equal(run(model), expected)
    assert len(calls) == 4, "no layer was computed twice"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of its own accord
def test_compiles_in_one_graph(device):
    model = make_model(MIXTRAL, device)
    expected = run(model)
    torch.compiler.reset()
    compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert_equal({name.replace("_orig_mod.", ""): tensor for name, tensor in compiled.items()}, expected)


def test_loads_from_a_folder(device, tmp_path):
    model = make_model(MIXTRAL, device)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="cumo").to(device)
    assert list(integration.execution_paths(loaded)) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert_bitwise_equal(run(loaded), run(model))


def llama4():
    """A model whose experts are no part of transformers' interface, which takes the choice all the same."""
    config = transformers.AutoConfig.for_model(
        "llama4_text", **SIZES | dict(num_local_experts=4, intermediate_size_mlp=24)
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("cumo")
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: make_model(MIXTRAL, "cpu", "eager"), llama4, lambda: nn.Linear(2, 2)],
    ids=["left on eager", "llama4: the choice is ignored", "no experts"],
)
def test_says_when_nothing_runs_here(make):
    with pytest.raises(ValueError, match="expected experts set to 'cumo'.* none are"):
        integration.execution_paths(make())
