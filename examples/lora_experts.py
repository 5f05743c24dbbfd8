# SPDX-License-Identifier: Apache-2.0
"""LoRA on stacked experts: peft adapts parameters by name, experts stay on the kernels."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

import cumo.integrations.transformers  # noqa: F401  registers "cumo"

config = MixtralConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    num_local_experts=4, vocab_size=99, pad_token_id=0,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, experts_implementation="cumo")
lora = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
model = get_peft_model(model, lora)
model.print_trainable_parameters()

ids = torch.randint(1, 99, (2, 12))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for step in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss:.3f}")

adapted = model(input_ids=ids).logits
merged = model.merge_and_unload()(input_ids=ids).logits
print(f"merged: off by {(merged - adapted).abs().max():.1e}")
