# SPDX-License-Identifier: Apache-2.0
"""Which experts the tokens go to: shares per layer of a vision encoder, as numbers and as a picture.

`python examples/expert_load.py [load.png]`
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from cumo import CuMoConfig, CuMoVisionModel
from cumo.nn import expert_load

config = CuMoConfig.from_preset("tiny").vision_config
tower = CuMoVisionModel(config).eval()  # or .from_pretrained(...)
with torch.no_grad():
    output = tower(torch.randn(4, 3, 28, 28))

shares = torch.stack([expert_load(routing, config.num_experts) for routing in output.routings])  # [layers, experts]
for layer, share in enumerate(shares):
    probs = share.clamp_min(1e-9)
    entropy = -(probs * probs.log()).sum() / torch.log(torch.tensor(float(config.num_experts)))
    print(f"layer {layer}: {[round(s, 3) for s in share.tolist()]}, evenness {entropy:.3f} of 1")

figure, axes = plt.subplots(figsize=(6, 3))
left = torch.zeros(len(shares))
for expert, colour in enumerate(("#0072B2", "#D55E00", "#009E73", "#CC79A7")):
    axes.barh(range(len(shares)), shares[:, expert], left=left, color=colour, label=f"expert {expert}")
    left += shares[:, expert]
axes.axvline(1 / config.num_experts, color="black", linewidth=0.8, linestyle=":")
axes.set(xlabel="share of the choices", ylabel="layer", yticks=range(len(shares)))
axes.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
figure.tight_layout()
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "expert_load.png", dpi=150)
