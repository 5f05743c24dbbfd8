# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in a module of one's own: auxiliary losses, AMP, torch.compile and, on a GPU, a CUDA graph."""

import torch
from torch import nn

from cumo.nn import MoEMLP


class Block(nn.Module):
    """Pre-norm; the residual is added within the last kernel of the layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.moe = MoEMLP(width, 4 * width, num_experts=8, top_k=2, activation="silu", gated=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> [B, S, D], and the auxiliary loss."""
        y, routing = self.moe(self.norm(x), residual=x)
        return y, 0.01 * routing.balance_S.mean() + 0.001 * routing.z_S.mean()


device = "cuda" if torch.cuda.is_available() else "cpu"
block = Block(64).to(device)
x = torch.randn(4, 32, 64, device=device)

with torch.autocast(device, dtype=torch.bfloat16):  # the experts in bfloat16, the router in float32
    y, aux = block(x)
(y.float().square().mean() + aux).backward()
print(f"under autocast: output {y.dtype}, auxiliary loss {aux:.4f}")

compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
print(f"compiled: off by {(compiled(x)[0] - block(x)[0]).abs().max():.1e}")

if device == "cuda":
    with torch.no_grad():
        block(x)  # warm up: kernels are compiled outside of the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = block(x)
    x.copy_(torch.randn_like(x))  # other tokens, another routing, the same graph
    graph.replay()
    print(f"replayed: off by {(y - block(x)[0]).abs().max():.1e}")
