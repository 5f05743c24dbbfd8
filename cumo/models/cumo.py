# SPDX-License-Identifier: Apache-2.0
"""CuMo: pictures and text in, text out. The language model is any decoder of transformers, as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

import cumo_kernels as ck
from cumo.config import CuMoConfig
from cumo.models.connector import CuMoConnector
from cumo.models.experts import NAME as EXPERTS
from cumo.models.loading import LoadsBothLayouts
from cumo.models.vision import CuMoVisionModel, CuMoVisionPreTrainedModel
from cumo.nn.losses import AuxLosses, routing_losses
from cumo_kernels import Routing


@dataclass
class CuMoOutput(ModelOutput):
    """What `CuMoForConditionalGeneration` returns; parts of the loss are unweighted, None where there are none."""

    loss: Tensor | None = None
    """lm_loss + balance_loss_coef * (all balance losses) + router_z_loss_coef * (all z-losses)."""
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None
    vision_losses: AuxLosses | None = None
    connector_losses: AuxLosses | None = None
    text_losses: AuxLosses | None = None
    image_features: Tensor | None = None
    """[images, patches, LLM width]: what took the place of the placeholders."""
    vision_routings: tuple[Routing, ...] | None = None
    """As of `CuMoVisionOutput`, with `tiles_per_scale`; None without pictures, as is `connector_routing`."""
    tiles_per_scale: tuple[int, ...] | None = None
    connector_routing: Routing | None = None
    text_routings: tuple[Routing, ...] | None = None
    """One of each layer of the language model with experts, if `labels` were given."""


@dataclass
class ImageFeatures(ModelOutput):
    """Embeddings of pictures, and the losses of the routers they went through."""

    embeddings: Tensor | None = None
    vision_losses: AuxLosses | None = None
    connector_losses: AuxLosses | None = None
    vision_routings: tuple[Routing, ...] | None = None
    tiles_per_scale: tuple[int, ...] | None = None
    connector_routing: Routing | None = None


class CuMoForConditionalGeneration(LoadsBothLayouts, GenerationMixin):
    """Vision encoder, connector and language model, with all their losses.

    Args:
        config: of all three.

    Examples:
        >>> import torch
        >>> from cumo import CuMoConfig, CuMoForConditionalGeneration
        >>> config = CuMoConfig.from_preset("tiny")
        >>> model = CuMoForConditionalGeneration(config)
        >>> image = [config.image_token_id] * config.vision_config.num_patches
        >>> ids = torch.tensor([[1, *image, 5, 6, 7]])  # BOS, a picture, three tokens of text
        >>> output = model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28), labels=ids.clamp(max=99))
        >>> output.logits.shape, output.image_features.shape
        (torch.Size([1, 20, 32000]), torch.Size([1, 16, 32]))
        >>> output.loss > output.lm_loss  # with the auxiliary losses of encoder and connector
        tensor(True)
    """

    config: CuMoConfig
    config_class = CuMoConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["CuMoVisionBlock", "CuMoConnector"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CuMoConfig) -> None:
        super().__init__(config)
        self.vision_tower = CuMoVisionModel(config.vision_config)
        self.connector = CuMoConnector(config)
        # experts of the language model run on our kernels, unless others are asked for
        experts = getattr(config.text_config, "_experts_implementation", None) or EXPERTS
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, experts_implementation=experts)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The connector, as the encoder; the other parts initialise themselves."""
        CuMoVisionPreTrainedModel.init_layer(module, getattr(self.config.text_config, "initializer_range", 0.02))

    def get_input_embeddings(self) -> nn.Module:
        """Those of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Those of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Those of the language model."""
        return self.language_model.get_output_embeddings()

    def get_image_features(self, pixel_values: Tensor, pixel_values_large: Any = None) -> ImageFeatures:
        """Pictures [images, 3, H, H] -> embeddings [images, patches, LLM width] and the routers' losses."""
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (trained or pixel_values.requires_grad)):
            vision = self.vision_tower(pixel_values, pixel_values_large)
        embeddings, routing = self.connector(vision.features)
        mode = self.config.aux_loss
        return ImageFeatures(
            embeddings=embeddings,
            vision_losses=routing_losses(vision.routings, vision.tiles_per_scale, mode) if vision.routings else None,
            connector_losses=None if routing is None else routing_losses([routing], [len(pixel_values)], mode),
            vision_routings=vision.routings,
            tiles_per_scale=vision.tiles_per_scale,
            connector_routing=routing,
        )

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Token embeddings [B, L, D], with picture features [images, patches, D] in the place of the placeholders.

        Raises:
            ValueError: image tokens and features do not match.
        """
        is_image = torch.eq(input_ids, self.config.image_token_id)
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if features is None:
            if not torch.compiler.is_compiling() and bool(is_image.any()):
                raise ValueError("pixel_values: input_ids hold image tokens, but no pictures were given")
            return embeddings
        if not torch.compiler.is_compiling() and int(is_image.sum()) != features.shape[0] * features.shape[1]:
            counts = is_image.sum(dim=1).tolist()
            raise ValueError(
                f"input_ids: expected {features.shape[1]} image tokens for each of {features.shape[0]} pictures, got "
                f"{sum(counts)}, by sample {counts}"
            )
        return embeddings.masked_scatter(is_image.unsqueeze(-1), features.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_large: Any = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CuMoOutput:
        """One pass.

        Args:
            input_ids: [B, L]; `config.image_token_id` stands once for each feature of a picture, in the order of
                `pixel_values`.
            pixel_values: [images, 3, H, H], of all samples one after the other; None if there are none.
            pixel_values_large: the pictures at the larger scales, if the encoder wants them.
            attention_mask: [B, L], 0 for padding; or ready masks, as generation with a static cache makes them.
            inputs_embeds: [B, L, D], in place of `input_ids`; then without pictures.
            labels: [B, L], -100 where nothing is to be learnt.
            logits_to_keep: compute logits of the last so many positions only (0: all).

        Raises:
            ValueError: image tokens and pictures do not match, or not exactly one of ids and embeddings came.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
        image = ImageFeatures() if pixel_values is None else self.get_image_features(pixel_values, pixel_values_large)
        # before the token embeddings, as pictures are: sharded parameters are gathered in the same order everywhere
        taking_part = self._take_part() if pixel_values is None and labels is not None and _has_peers() else None
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, image.embeddings)
        assert inputs_embeds is not None
        if taking_part is not None:
            inputs_embeds = inputs_embeds + 0.0 * taking_part
        if isinstance(attention_mask, Tensor) and attention_mask.shape == inputs_embeds.shape[:2]:
            # as published: padding is zeros, which the routers of the language model see
            inputs_embeds = inputs_embeds * attention_mask.unsqueeze(-1).to(inputs_embeds.dtype)
        wants_text_losses = labels is not None and hasattr(self.config.text_config, "output_router_logits")
        if wants_text_losses:
            kwargs["output_router_logits"] = True
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        text_routings = self._text_routings(outputs, attention_mask) if wants_text_losses else ()
        text_losses = routing_losses(text_routings, [1], self.config.aux_loss) if text_routings else None
        lm_loss = None
        if labels is not None:
            lm_loss = self.language_model.loss_function(outputs.logits, labels, self.config.text_config.vocab_size)
        return CuMoOutput(
            loss=self._total(lm_loss, image.vision_losses, image.connector_losses, text_losses),
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            vision_losses=image.vision_losses,
            connector_losses=image.connector_losses,
            text_losses=text_losses,
            image_features=image.embeddings,
            vision_routings=image.vision_routings,
            tiles_per_scale=image.tiles_per_scale,
            connector_routing=image.connector_routing,
            text_routings=text_routings or None,
        )

    def _take_part(self) -> Tensor:
        """A number that depends on every used parameter of encoder and connector, from one empty tile.

        Where parameters are sharded or reduced over processes, each process has to use them all in every step, and in
        the same order.
        """
        vision = self.config.vision_config
        weight: Any = self.vision_tower.get_input_embeddings().weight
        side = vision.encoder_config.image_size
        tile = torch.zeros(1, weight.shape[1], side, side, dtype=weight.dtype, device=weight.device)
        features = self.vision_tower.tile_features(tile)
        embeddings, _ = self.connector(torch.cat([features] * len(vision.scales), dim=-1))
        return embeddings.mean()

    def _text_routings(self, outputs: Any, attention_mask: Tensor | None) -> tuple[Routing, ...]:
        """Of the language model's own routers: all tokens are one segment; "switch" leaves padding out."""
        logits = [layer.flatten(0, -2) for layer in outputs.router_logits or ()]
        if not logits:
            return ()
        if torch.is_grad_enabled() and _has_reentrant_checkpoints(self.language_model):
            raise ValueError(
                "use_reentrant: expected False for a language model with experts, got True: transformers reads its "
                "router logits from within the checkpoints, where they then have no gradient"
            )
        if self.config.aux_loss == "switch" and attention_mask is not None:
            kept = attention_mask.flatten().bool()
            logits = [layer[kept] for layer in logits]
        top_k = self.config.text_config.num_experts_per_tok
        return tuple(ck.topk_gating(layer, top_k) for layer in logits)

    def _total(self, lm_loss: Tensor | None, *parts: AuxLosses | None) -> Tensor | None:
        """All losses, weighted."""
        if lm_loss is None:
            return None
        for part in parts:
            if part is not None:
                lm_loss = lm_loss + self.config.balance_loss_coef * part.balance
                lm_loss = lm_loss + self.config.router_z_loss_coef * part.z
        return lm_loss


def _has_reentrant_checkpoints(model: nn.Module) -> bool:
    functions = (
        module._gradient_checkpointing_func
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    )
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


def _has_peers() -> bool:
    """Whether this process trains together with others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


AutoModelForImageTextToText.register(CuMoConfig, CuMoForConditionalGeneration, exist_ok=True)
