# SPDX-License-Identifier: Apache-2.0
"""CuMo: pictures and text in, text out. The language model is any decoder of transformers, as it comes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput, can_return_tuple

import cumo_kernels as ck
from cumo.config import CuMoConfig
from cumo.models.connector import CuMoConnector
from cumo.models.experts import NAME as EXPERTS
from cumo.models.loading import LoadsBothLayouts
from cumo.models.placeholders import (
    PICTURES,
    fill_placeholders,
    find_placeholders,
    pictures_per_row,
    repeat_pictures,
)
from cumo.models.prompts import IGNORE_INDEX
from cumo.models.vision import CuMoVisionModel, CuMoVisionPreTrainedModel
from cumo.nn.losses import AuxLosses, routing_losses
from cumo_kernels import Routing


@dataclass
class CuMoOutput(ModelOutput):
    """The output of `CuMoForConditionalGeneration`; parts of the loss are unweighted, None where there are none."""

    loss: Tensor | None = None
    """lm_loss + the balance losses and z-losses, weighted as of `CuMoConfig.router_loss_coefs`."""
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
    """See `CuMoVisionOutput`, also for `tiles_per_scale`; None without pictures, as is `connector_routing`."""
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

    Raises:
        ValueError: the language model takes no `past_key_values`, as Mamba.

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
    # The loss is a mean over the tokens, pictures and positions of a pass: Trainer divides it by the passes of a step.
    accepts_loss_kwargs = False

    def __init__(self, config: CuMoConfig) -> None:
        super().__init__(config)
        self.vision_tower = CuMoVisionModel(config.vision_config)
        self.connector = CuMoConnector(config)
        # experts of the language model run on our kernels, unless others are asked for
        experts = getattr(config.text_config, "_experts_implementation", None) or EXPERTS
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, experts_implementation=experts)
        if "past_key_values" not in inspect.signature(self.language_model.forward).parameters:
            raise ValueError(
                "text_config: expected a language model that takes past_key_values, got "
                f"{config.text_config.model_type}, which does not"
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The connector, as the encoder; the other parts initialise themselves."""
        CuMoVisionPreTrainedModel.init_layer(module, getattr(self.config.text_config, "initializer_range", 0.02))

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer of the language model."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer of the language model, as `resize_token_embeddings` does."""
        self.language_model.set_output_embeddings(new_embeddings)

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
        return fill_placeholders(self.get_input_embeddings()(input_ids.masked_fill(is_image, 0)), is_image, features)

    def _is_image(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Mask [B, L] of the placeholders, by id or, where the image token has one, by embedding."""
        if inputs_embeds is not None:
            return find_placeholders(inputs_embeds, self.get_input_embeddings(), self.config.image_token_id)
        assert input_ids is not None
        return torch.eq(input_ids, self.config.image_token_id)

    def _inputs_embeds(self, input_ids: Tensor | None, embeddings: Tensor | None, features: Tensor | None) -> Tensor:
        """Embeddings [B, L, D] of a prompt with pictures, of its ids or of the embeddings of its tokens."""
        if input_ids is not None:
            return self.embed(input_ids, features)
        assert embeddings is not None
        if features is None:
            return embeddings
        return fill_placeholders(embeddings, self._is_image(None, embeddings), features)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """As in transformers; the pictures of a sample, of which there may be none or several, stay together."""
        pictures = {name: model_kwargs.pop(name) for name in PICTURES if name in model_kwargs}
        if expand_size > 1 and pictures.get("pixel_values") is not None:
            is_image = self._is_image(input_ids, model_kwargs.get("inputs_embeds"))
            counts = pictures_per_row(is_image, self.config.vision_config.num_patches)
            pictures = {name: repeat_pictures(pixels, counts, expand_size) for name, pixels in pictures.items()}
        transformers: Any = super()
        input_ids, model_kwargs = transformers._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | pictures

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; a model that assists another (`assistant_model`) sees the pictures too."""
        if not is_first_iteration and past_key_values is not None and kwargs.get("pixel_values") is not None:
            # No pass of an assistant is the first to transformers, not even that into an empty cache.
            is_first_iteration = not past_key_values.is_compileable and past_key_values.get_seq_length() == 0
        transformers: Any = super()
        inputs: dict[str, Any] = transformers.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return inputs

    @can_return_tuple  # type: ignore[untyped-decorator]
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
            inputs_embeds: [B, L, D], in place of `input_ids`. With `pixel_values` too, the positions that hold the
                embedding of the image token are placeholders; it has one if the vocabulary was resized for it.
            labels: [B, L], -100 where nothing is to be learnt. Image tokens are never learnt, so that a copy of
                `input_ids` will do.
            logits_to_keep: compute logits of the last so many positions only (0: all).
            kwargs: `return_dict=False` gives a tuple; the language model takes the others.

        Raises:
            ValueError: image tokens and pictures do not match, or not exactly one of `input_ids` and `inputs_embeds`
                was given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
        image = ImageFeatures() if pixel_values is None else self.get_image_features(pixel_values, pixel_values_large)
        # before the token embeddings, as pictures are: sharded parameters are gathered in the same order everywhere
        taking_part = self._take_part() if pixel_values is None and labels is not None and _has_peers() else None
        inputs_embeds = self._inputs_embeds(input_ids, inputs_embeds, image.embeddings)
        if taking_part is not None:
            inputs_embeds = inputs_embeds + 0.0 * taking_part
        if isinstance(attention_mask, Tensor) and attention_mask.shape == inputs_embeds.shape[:2]:
            # as published: padding is zeros, which the routers of the language model see
            inputs_embeds = inputs_embeds * attention_mask.unsqueeze(-1).to(inputs_embeds.dtype)
        wants_text_losses = labels is not None and self.config.has_text_router_losses
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
            labels = labels.masked_fill(labels == self.config.image_token_id, IGNORE_INDEX)
            lm_loss = self.language_model.loss_function(outputs.logits, labels, outputs.logits.shape[-1])
        return CuMoOutput(
            loss=self._total(lm_loss, image.vision_losses, image.connector_losses, text_losses),
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
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
        """Routings of the language model's routers. All tokens are one segment, without padding in mode "switch"."""
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
        """All losses, weighted; `parts` are those of encoder, connector and language model."""
        if lm_loss is None:
            return None
        for name, losses in zip(("vision", "connector", "text"), parts, strict=True):
            if losses is not None:
                balance_coef, z_coef = self.config.router_loss_coefs(name)
                lm_loss = lm_loss + balance_coef * losses.balance + z_coef * losses.z
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


# Not with AutoModel, which gives models without a head: CuMo has none, and the folders written for vLLM name their own.
AutoModelForImageTextToText.register(CuMoConfig, CuMoForConditionalGeneration, exist_ok=True)
