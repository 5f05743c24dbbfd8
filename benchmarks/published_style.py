# SPDX-License-Identifier: Apache-2.0
"""The published computation of CuMo's vision side, on the weights of our model: the baseline end to end.

It follows the description of the published implementation: one pass per scale, every block including the unused last
one, eager attention, and in each MoE a loop over images and experts, each with a host synchronisation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cumo.models.cumo import CuMoForConditionalGeneration, ImageFeatures
from cumo.models.multiscale import pool_tiles, resize, split_tiles
from cumo.models.vision import CuMoVisionModel
from cumo.nn import MoEMLP
from cumo.nn.losses import AuxLosses
from cumo_kernels.activations import ACTIVATIONS


def looped_moe(moe: MoEMLP, x_BND: Tensor) -> tuple[Tensor, AuxLosses]:
    """A `MoEMLP` image by image, expert by expert, with both of its losses.

    Args:
        moe: its experts have biases and no gate projection, as those of CuMo's vision side.
        x_BND: images of N tokens.
    """
    logits = F.linear(x_BND, moe.gate.weight)
    probs = logits.softmax(dim=-1, dtype=torch.float32).to(x_BND.dtype)
    weights, chosen = probs.topk(moe.top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    first = F.one_hot(chosen[..., 0], moe.num_experts).float().mean(dim=1)
    balance = (probs.float().mean(dim=1) * first).mean() * moe.num_experts**2
    z = logits.float().logsumexp(dim=-1).square().mean()
    act = ACTIVATIONS[moe.activation]
    assert moe.up_proj_bias is not None and moe.down_proj_bias is not None
    outputs = []
    for image, weight, choice in zip(x_BND, weights, chosen, strict=True):
        y = image.new_zeros(len(image), moe.d_out)
        for e in range(moe.num_experts):
            token, place = torch.where(choice == e)
            hidden = act(F.linear(image[token], moe.up_proj[e], moe.up_proj_bias[e]))
            expert = F.linear(hidden, moe.down_proj[e], moe.down_proj_bias[e])
            y = y.index_add(0, token, weight[token, place, None] * expert)
        outputs.append(y)
    return torch.stack(outputs), AuxLosses(balance, z)


def _mean(losses: list[AuxLosses]) -> AuxLosses:
    return AuxLosses(
        torch.stack([loss.balance for loss in losses]).mean(), torch.stack([loss.z for loss in losses]).mean()
    )


def _encode(tower: CuMoVisionModel, tiles: Tensor) -> tuple[Tensor, AuxLosses]:
    """One scale: the output of the last but one block, and the losses of all."""
    assert tower.pre_layrnorm is not None
    hidden = tower.pre_layrnorm(tower.embeddings(tiles))
    losses, features = [], hidden
    for layer in tower.layers:
        features = hidden
        attended, _ = layer.self_attn(layer.layer_norm1(hidden), attention_mask=None)
        hidden = hidden + attended
        y, loss = looped_moe(layer.mlp, layer.layer_norm2(hidden))
        hidden = hidden + y
        losses.append(loss)
    return features[:, 1:], _mean(losses)


def image_features(
    model: CuMoForConditionalGeneration, pixel_values: Tensor, pixel_values_large: None = None
) -> ImageFeatures:
    """What `model.get_image_features` gives, for a CLIP with experts and a connector with experts.

    Args:
        model: its encoder's attention is set to "eager" and its feature layer is the last but one.
        pixel_values: [images, 3, H, H].
        pixel_values_large: None; the published model enlarges the pictures itself.
    """
    assert pixel_values_large is None
    tower, features, losses = model.vision_tower, [], []
    for scale in tower.config.scales:
        tiles = split_tiles(resize(pixel_values, pixel_values.shape[-1] * scale), scale)
        hidden, loss = _encode(tower, tiles)
        features.append(pool_tiles(hidden, scale) if scale > 1 else hidden)
        losses.append(loss)
    projection: Any = model.connector.projection
    embeddings, connector_losses = looped_moe(projection, torch.cat(features, dim=-1))
    return ImageFeatures(embeddings=embeddings, vision_losses=_mean(losses), connector_losses=connector_losses)
