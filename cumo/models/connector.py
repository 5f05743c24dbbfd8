# SPDX-License-Identifier: Apache-2.0
"""The connector: picture features -> embeddings of the language model, dense or a mixture of experts."""

from __future__ import annotations

from torch import Tensor, nn

from cumo.config import CuMoConfig
from cumo.nn import MoEMLP
from cumo_kernels import Routing


class CuMoConnector(nn.Module):
    """[B, patches, feature width] -> [B, patches, LLM width]; `projection` is a linear layer, an MLP or a `MoEMLP`."""

    def __init__(self, config: CuMoConfig) -> None:
        super().__init__()
        d_in, d_out = config.vision_config.feature_size, config.text_config.hidden_size
        self.projection: nn.Module
        if config.connector_type == "linear":
            self.projection = nn.Linear(d_in, d_out)
        elif config.connector_num_experts == 1:
            self.projection = nn.Sequential(nn.Linear(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out))
        else:
            self.projection = MoEMLP(
                d_in,
                d_out,
                d_out,
                num_experts=config.connector_num_experts,
                top_k=config.connector_num_experts_per_tok,
                activation="gelu",
                probs_dtype=config.vision_config.router_probs_dtype,
            )

    def forward(self, features: Tensor) -> tuple[Tensor, Routing | None]:
        """Return the embeddings, and what the router did, which is None for a dense projection."""
        if isinstance(self.projection, MoEMLP):
            embeddings, routing = self.projection(features)
            return embeddings, routing
        return self.projection(features), None
