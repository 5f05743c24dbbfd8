# SPDX-License-Identifier: Apache-2.0
"""CuMo's vision encoder: a CLIP or SigLIP transformer whose MLPs are mixtures of experts, over several image scales.

All scales go through the blocks in one batch of tiles. What the routers did travels as return values, from the block
to the tower, so that it survives activation checkpointing (also the reentrant kind) and FSDP2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.utils.generic import ModelOutput

from cumo.config import CuMoVisionConfig
from cumo.models.loading import LoadsBothLayouts
from cumo.models.multiscale import pool_tiles, resize, split_tiles
from cumo.nn import MoEMLP
from cumo.nn.upcycling import ACTIVATION_ALIASES
from cumo_kernels import Routing


@dataclass
class CuMoVisionOutput(ModelOutput):
    """Features of the pictures, and what the routers of each block did."""

    features: Tensor | None = None
    """[B, patches, D * scales]."""
    routings: tuple[Routing, ...] | None = None
    """One `Routing` per computed block, over all tiles as segments: those of scale 1 first, image by image, then those
    of each further scale, tile-major. Empty if the blocks are dense."""
    tiles_per_scale: tuple[int, ...] | None = None
    """How many consecutive segments belong to each scale."""


class CuMoVisionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block; its MLP is dense or a `MoEMLP`."""

    def __init__(self, config: CuMoVisionConfig) -> None:
        super().__init__()
        encoder = config.encoder_config
        self.self_attn = CLIPAttention(encoder)  # SigLIP's is the same
        self.layer_norm1 = nn.LayerNorm(encoder.hidden_size, eps=encoder.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(encoder.hidden_size, eps=encoder.layer_norm_eps)
        self.mlp: nn.Module
        if config.is_moe:
            self.mlp = MoEMLP(
                encoder.hidden_size,
                encoder.intermediate_size,
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                activation=ACTIVATION_ALIASES.get(encoder.hidden_act, encoder.hidden_act),
                probs_dtype=config.router_probs_dtype,
            )
        else:
            self.mlp = CLIPMLP(encoder)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        """[N, S, D] -> [N, S, D], followed by the fields of `Routing` if the MLP is a mixture of experts."""
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask=None, **kwargs)
        hidden_states = hidden_states + attended
        normed = self.layer_norm2(hidden_states)
        if isinstance(self.mlp, MoEMLP):
            hidden_states, routing = self.mlp(normed, residual=hidden_states)
            return hidden_states, *routing
        return (hidden_states + self.mlp(normed),)


class CuMoVisionPreTrainedModel(PreTrainedModel):
    """Properties of the encoder that transformers asks for: initialisation, attention, checkpointing."""

    config: CuMoVisionConfig
    config_class = CuMoVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CuMoVisionBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with the encoder's `initializer_range`; biases zero."""
        std = getattr(self.config.encoder_config, "initializer_range", 0.02)
        self.init_layer(module, std)
        if isinstance(module, CLIPVisionEmbeddings):
            init.normal_(module.class_embedding, std=std)
        if isinstance(module, (CLIPVisionEmbeddings, SiglipVisionEmbeddings)):
            init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))

    @staticmethod
    def init_layer(module: nn.Module, std: float) -> None:
        """Initialise a layer of one of the kinds that encoder and connector are made of."""
        if isinstance(module, MoEMLP):
            for weight in (module.up_proj, module.down_proj):
                init.normal_(weight, std=std)
            for bias in (module.up_proj_bias, module.down_proj_bias):
                if bias is not None:
                    init.zeros_(bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class CuMoVisionModel(LoadsBothLayouts, CuMoVisionPreTrainedModel):
    """Pictures -> features of all scales, concatenated.

    `from_pretrained` takes a folder of an encoder, and takes the encoder out of a whole model of either layout.

    The encoder stops at the feature layer, unless `config.keep_unused_layers`: the published model computes the last
    block and throws its output away.

    Args:
        config: of the encoder; `vision_config` of a `CuMoConfig`.

    Examples:
        >>> import torch
        >>> from cumo import CuMoConfig, CuMoVisionModel
        >>> model = CuMoVisionModel(CuMoConfig.from_preset("tiny").vision_config)
        >>> output = model(torch.randn(2, 3, 28, 28))
        >>> output.features.shape  # 4 x 4 patches, two scales of width 32
        torch.Size([2, 16, 64])
        >>> len(output.routings), output.tiles_per_scale  # two of three blocks; one tile and nine for each picture
        (2, (2, 18))
    """

    config: CuMoVisionConfig
    config_class = CuMoVisionConfig
    _part = "vision_tower."

    def __init__(self, config: CuMoVisionConfig) -> None:
        super().__init__(config)
        encoder = config.encoder_config
        self.is_clip = encoder.model_type == "clip_vision_model"
        self.embeddings = (CLIPVisionEmbeddings if self.is_clip else SiglipVisionEmbeddings)(encoder)
        # the name is misspelt in CLIP's own weights
        self.pre_layrnorm = nn.LayerNorm(encoder.hidden_size, eps=encoder.layer_norm_eps) if self.is_clip else None
        self.layers = nn.ModuleList(CuMoVisionBlock(config) for _ in range(encoder.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()
        self._share_attention()

    def _share_attention(self) -> None:
        """Attention modules read the implementation from the encoder's configuration, transformers sets it on ours."""
        self.config.encoder_config._attn_implementation = self.config._attn_implementation

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set the attention as in every model of transformers: "sdpa", "eager", "flash_attention_2", ..."""
        super().set_attn_implementation(*args, **kwargs)
        self._share_attention()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.embeddings.patch_embedding

    def encode(self, tiles: Tensor, **kwargs: Any) -> tuple[Tensor, tuple[Routing, ...]]:
        """Tiles [N, 3, H, W] -> the feature layer's hidden state [N, S, D] (class token included) and the routings."""
        hidden = self.embeddings(tiles)
        if self.pre_layrnorm is not None:
            hidden = self.pre_layrnorm(hidden)
        used = self.config.num_used_layers
        computed = len(self.layers) if self.config.keep_unused_layers else used
        features, routings = hidden, []
        for index, layer in enumerate(self.layers[:computed]):
            hidden, *routing = layer(hidden, **kwargs)
            if routing:
                routings.append(Routing(*routing))
            if index < used:
                features = hidden
        return features, tuple(routings)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters of the blocks behind the feature layer; none with `config.keep_unused_layers`: they train then."""
        if self.config.keep_unused_layers:
            return []
        return [parameter for layer in self.layers[self.config.num_used_layers :] for parameter in layer.parameters()]

    def _without_class_token(self, hidden: Tensor) -> Tensor:
        return hidden[:, 1:] if self.is_clip else hidden

    def tile_features(self, tiles: Tensor) -> Tensor:
        """Tiles [N, 3, H, W] -> features of their patches [N, patches, D], of one scale."""
        return self._without_class_token(self.encode(tiles)[0])

    def forward(
        self, pixel_values: Tensor, pixel_values_large: Sequence[Tensor] | None = None, **kwargs: Any
    ) -> CuMoVisionOutput:
        """Encode pictures at every scale.

        Args:
            pixel_values: [B, 3, H, H] at the size that the encoder knows.
            pixel_values_large: with `config.high_resolution`, the pictures at each further scale s, [B, 3, s H, s H].

        Raises:
            ValueError: `pixel_values` or `pixel_values_large` has another shape, or the latter is given or missing
                against `config.high_resolution`.
        """
        images = self._images_by_scale(pixel_values, pixel_values_large)
        tiles = [split_tiles(image, scale) for image, scale in zip(images, self.config.scales, strict=True)]
        counts = tuple(len(group) for group in tiles)
        hidden, routings = self.encode(torch.cat(tiles), **kwargs)
        patches = self._without_class_token(hidden)
        groups = zip(patches.split(list(counts)), self.config.scales, strict=True)
        features = [pool_tiles(group, scale) if scale > 1 else group for group, scale in groups]
        return CuMoVisionOutput(torch.cat(features, dim=-1), routings, counts)

    def _images_by_scale(self, pixels: Tensor, larger: Sequence[Tensor] | None) -> list[Tensor]:
        """The pictures at each scale: given, or enlarged from the smallest."""
        size, scales = self.config.encoder_config.image_size, self.config.scales
        channels = self.config.encoder_config.num_channels
        if pixels.shape[1:] != (channels, size, size):
            raise ValueError(
                f"pixel_values: expected pictures of {size} x {size} pixels as [images, {channels}, {size}, {size}], "
                f"got {[*pixels.shape]}"
            )
        if not self.config.high_resolution:
            if larger is not None:
                raise ValueError("pixel_values_large: expected None, since config.high_resolution is off")
            return [resize(pixels, size * scale) for scale in scales]
        if isinstance(larger, Tensor):
            raise ValueError(
                f"pixel_values_large: expected a list with a tensor for each of the scales {scales[1:]}, got a tensor "
                f"{[*larger.shape]}"
            )
        larger = [] if larger is None else [*larger]
        expected = [[len(pixels), channels, size * scale, size * scale] for scale in scales[1:]]
        actual = [[*image.shape] for image in larger]
        if actual != expected:
            raise ValueError(f"pixel_values_large: expected shapes {expected} for scales {scales}, got {actual}")
        return [pixels, *larger]


AutoModel.register(CuMoVisionConfig, CuMoVisionModel, exist_ok=True)
