# SPDX-License-Identifier: Apache-2.0
"""MLPs of more families of transformers: other names, gate and up in one layer, transposed weights."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="their classes are those of transformers")

from safetensors.torch import load_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cumo.nn import upcycle, upcycle_mlp
from tests.numerics import relative_error

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 30,
    "pad_token_id": 0,
}
FAMILIES = {
    "gpt2": {"resid_pdrop": 0.0},
    "gpt_neox": {},
    "starcoder2": {},
    "phi3": {},
    "glm4": {},
    "modernbert": {"global_attn_every_n_layers": 1},
    "nemotron": {},
    "olmo2": {},
    "gemma3_text": {},
}


def build(family, model_class=AutoModel, **options):
    """A small random one, with weights large enough for the MLPs to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES.get(family, {}), **options)
    return model_class.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_stays(family):
    model, ids = build(family), torch.randint(1, 30, (2, 5))
    for module in model.modules():
        if hasattr(module, "weight") and type(module).__name__ in ("Linear", "Conv1D"):
            nn.init.normal_(module.weight, std=0.2)
    before = model(input_ids=ids).last_hidden_state
    upcycled = upcycle(model, r".*\.mlp", num_experts=4, top_k=2)
    assert len(upcycled.modules) == 2
    assert relative_error(model(input_ids=ids).last_hidden_state, before) <= 1e-5
    for moe in upcycled.modules.values():
        nn.init.zeros_(moe.down_proj)
    assert relative_error(model(input_ids=ids).last_hidden_state, before) > 1e-3, "the MLPs do matter"


@pytest.mark.parametrize(
    ("family", "dropout"),
    [("gpt2", {"resid_pdrop": 0.1}), ("starcoder2", {"residual_dropout": 0.1}), ("modernbert", {"mlp_dropout": 0.1})],
)
def test_dropout_is_refused(family, dropout, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES[family], **dropout})
    with pytest.raises(ValueError, match=r"MoEMLP has no dropout\), got .*drop"):
        upcycle(build(family), r".*\.mlp", num_experts=2, top_k=1)


class Fused(nn.Module):
    """With gate and up in one layer, of which the order is told by its `forward` alone."""

    def __init__(self, swapped=False):
        super().__init__()
        self.w12, self.w3, self.act = nn.Linear(8, 24), nn.Linear(12, 8), nn.SiLU()
        self.swapped = swapped

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.act(up) * gate if self.swapped else self.act(gate) * up)


class Other(nn.Module):
    """Of the names of the original Llama."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3, self.act = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12), nn.SiLU()

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


FUSED = {"gate_up": "w12", "down": "w3"}
OTHER = {"gate": "w1", "up": "w3", "down": "w2"}


@pytest.mark.parametrize(("mlp", "names"), [(Fused(), FUSED), (Other(), OTHER)], ids=["fused", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_names_can_be_given(mlp, names, dtype):
    mlp, x = copy.deepcopy(mlp).to(dtype), torch.randn(5, 8, dtype=dtype)
    moe = upcycle_mlp(mlp, 4, 2, projections=names)
    assert moe.gated and relative_error(moe(x)[0], mlp(x)) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("mlp", "names", "message"),
    [
        (Fused(swapped=True), FUSED, "mlp: expected down\\(silu\\(first half\\) \\* second half\\)"),
        (Fused(swapped=True).bfloat16(), FUSED, "mlp: expected down\\(silu\\(first half\\)"),
        (Other(), {"up": "w1"}, "projections: expected names of up and down, of up, down and gate, or of gate_up and"),
        (Other(), {"up": "w1", "down": "w9"}, r"projections: expected names of modules of the MLP, got \['w9'\]"),
        (Other(), None, "mlp: expected a Sequential, or a module with .*projections= gives other names"),
    ],
    ids=["other order", "other order in bfloat16", "incomplete", "absent", "unknown"],
)
def test_names_that_do_not_fit(mlp, names, message):
    with pytest.raises(ValueError, match=message):
        upcycle_mlp(mlp, 4, 2, projections=names)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_by_transformers_and_loaded_again(tied, tmp_path):
    options = {"num_experts": 4, "top_k": 2}
    model, ids = build("llama", AutoModelForCausalLM, tie_word_embeddings=tied), torch.randint(1, 30, (2, 5))
    upcycle(model, r".*\.mlp", noise=0.1, **options)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    upcycle(again, r".*\.mlp", **options)
    assert load_model(again, tmp_path / "model.safetensors") == (set(), [])
    assert relative_error(again(input_ids=ids).logits, model(input_ids=ids).logits) <= 1e-6
