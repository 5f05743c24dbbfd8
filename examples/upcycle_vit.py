# SPDX-License-Identifier: Apache-2.0
"""A vision transformer whose MLPs become mixtures of experts, and a few steps of training with their losses."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from cumo.nn import upcycle

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
vit = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))  # or .from_pretrained(...)
head, pixels, labels = torch.nn.Linear(64, 10), torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
before = vit(pixels).pooler_output

upcycled = upcycle(vit, r".*layers\.\d+\.mlp", num_experts=4, top_k=2)  # the output is what it was
print(f"output changed by {(vit(pixels).pooler_output - before).norm() / before.norm():.1e}")

optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=1e-3)
for step in range(5):
    with upcycled.routings() as routings:
        loss = torch.nn.functional.cross_entropy(head(vit(pixels).pooler_output), labels)
    aux = upcycled.losses(routings)
    (loss + 0.01 * aux.balance + 0.001 * aux.z).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss:.3f}, balance {aux.balance:.3f}, z {aux.z:.3f}")
