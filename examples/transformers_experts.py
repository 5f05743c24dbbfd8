# SPDX-License-Identifier: Apache-2.0
"""MoE models of transformers on the kernels: generate and train, for Mixtral and Qwen3-MoE."""

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import cumo.integrations.transformers as cumo_experts  # registers experts_implementation="cumo"

sizes = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
configs = [
    MixtralConfig(**sizes, intermediate_size=96, num_local_experts=4, pad_token_id=0),
    Qwen3MoeConfig(
        **sizes, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, head_dim=16, pad_token_id=0
    ),
]
for config in configs:
    # The same argument goes to from_pretrained; a model that is there has a method set_experts_implementation.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="cumo")
    print(config.model_type, cumo_experts.execution_paths(model))
    ids = torch.randint(1, 99, (2, 12))
    print("generated", model.generate(ids, max_new_tokens=8, do_sample=False)[:, 12:].tolist())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss:.3f}")
