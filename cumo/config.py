# SPDX-License-Identifier: Apache-2.0
"""Configuration of the CuMo models, in the way of transformers: saved as config.json, validated on construction."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PreTrainedConfig

from cumo.checkpoints.files import reading
from cumo.checkpoints.published_config import find_encoder, is_published, native_fields
from cumo_kernels.checks import check_one_of, check_top_k

ENCODERS = ("clip_vision_model", "siglip_vision_model")
PROBS_DTYPES = ("float32", "bfloat16", "float16")
CONNECTORS = ("mlp2x_gelu", "linear")
AUX_LOSSES = ("cumo", "switch")
MAX_LAYERS = 10_000
# What configurations of transformers call the number of experts, of which an instance may have several
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Language models that score experts by other functions than softmax, although they have a `router_aux_loss_coef`
OTHER_SCORES = ("deepseek_v4", "flint", "laguna", "llama4_text", "minimax_m2", "minimax_m3_vl_text")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# openai/clip-vit-large-patch14-336, built in so that no hub needs to be asked
CLIP_VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
# The published CuMo, on Mistral-7B-Instruct-v0.2 and Mixtral-8x7B-Instruct-v0.1; and sizes for tests and first steps,
# with which a training step takes a moment on a CPU.
PRESETS: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        }
    },
    "mixtral-8x7b": {
        "text_config": {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        }
    },
    "tiny": {
        "vision_config": {
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 7,
            }
        },
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 32000,  # that of the tokenizer of Mistral
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": None,
        },
    },
}


class CuMoVisionConfig(PreTrainedConfig):
    """The vision encoder: a CLIP or SigLIP vision transformer, with MoE blocks, over several image scales.

    Args:
        encoder_config: the transformer, a `CLIPVisionConfig` or `SiglipVisionConfig` (or such a dict); CLIP ViT-L/14 at
            336 pixels by default, as published.
        num_experts: experts of each block's MLP; 1 for dense MLPs.
        num_experts_per_tok: experts that each patch goes to.
        scales: image scales; features of all are concatenated.
        feature_layer: index of the hidden state that is the feature, counted from the end: -2 is the output of the last
            but one block.
        keep_unused_layers: compute the blocks behind the feature layer too. They change no output, but take part in the
            auxiliary losses of the published training.
        high_resolution: take the larger scales from pictures of that size instead of enlarging the smallest.
        probs_dtype: dtype to which router probabilities are rounded before the selection; the published training
            rounded to bfloat16.

    Raises:
        ValueError: `encoder_config` is of another family, `num_experts_per_tok` is not in 1..num_experts, `scales` do
            not rise from 1, or `feature_layer` or `probs_dtype` is out of range.

    Examples:
        >>> from cumo import CuMoVisionConfig
        >>> config = CuMoVisionConfig()
        >>> config.num_patches, config.feature_size  # 24 x 24 patches, two scales of width 1024
        (576, 2048)
        >>> config.num_used_layers, config.encoder_config.num_hidden_layers
        (23, 24)
    """

    model_type = "cumo_vision"
    base_config_key = "vision_config"
    sub_configs = {"encoder_config": AutoConfig}

    encoder_config: Any = None  # a PreTrainedConfig once constructed
    num_experts: int = 4
    num_experts_per_tok: int = 2
    scales: list[int] | tuple[int, ...] = (1, 3)
    feature_layer: int = -2
    keep_unused_layers: bool = False
    high_resolution: bool = False
    probs_dtype: str = "float32"

    def __post_init__(self, **kwargs: Any) -> None:
        """Make a configuration of the encoder's dict, and validate."""
        if self.encoder_config is None:
            self.encoder_config = AutoConfig.for_model("clip_vision_model", **CLIP_VIT_L_14_336)
        elif isinstance(self.encoder_config, dict):
            fields = dict(self.encoder_config)
            model_type = fields.pop("model_type", "clip_vision_model")
            check_one_of("encoder_config.model_type", model_type, ENCODERS)
            self.encoder_config = AutoConfig.for_model(model_type, **fields)
        check_one_of("encoder_config.model_type", self.encoder_config.model_type, ENCODERS)
        _check_layers("encoder_config", self.encoder_config)
        check_top_k(self.num_experts_per_tok, self.num_experts)
        check_one_of("probs_dtype", self.probs_dtype, PROBS_DTYPES)
        self.scales = list(self.scales)
        if self.scales != sorted(set(self.scales)) or not self.scales or self.scales[0] != 1:
            raise ValueError(f"scales: expected rising integers from 1 on, such as [1, 3], got {self.scales}")
        layers = self.encoder_config.num_hidden_layers
        if not -layers <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer: expected -{layers}..-1 for {layers} blocks, got {self.feature_layer}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers; of a whole model of either layout, the configuration of its encoder."""
        with reading(pretrained_model_name_or_path, "the configuration of a model"):
            config_dict, _ = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if not is_published(config_dict):
                return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        whole = CuMoConfig.from_pretrained(pretrained_model_name_or_path, **options)
        return cls.from_dict(whole.vision_config.to_dict(), **kwargs)

    @property
    def router_probs_dtype(self) -> torch.dtype:
        """`probs_dtype` as PyTorch has it."""
        return getattr(torch, self.probs_dtype)

    @property
    def is_moe(self) -> bool:
        """Whether the blocks have experts."""
        return self.num_experts > 1

    @property
    def num_used_layers(self) -> int:
        """Blocks that the features depend on."""
        return self.encoder_config.num_hidden_layers + self.feature_layer + 1

    @property
    def num_patches(self) -> int:
        """Features per picture, whatever its scales."""
        return (self.encoder_config.image_size // self.encoder_config.patch_size) ** 2

    @property
    def feature_size(self) -> int:
        """Width of a feature: that of the encoder times the number of scales."""
        return self.encoder_config.hidden_size * len(self.scales)


class CuMoConfig(PreTrainedConfig):
    """A whole CuMo: vision encoder, connector and any decoder that transformers knows.

    Args:
        vision_config: a `CuMoVisionConfig` (or its dict).
        text_config: configuration of the language model, of any family of `AutoModelForCausalLM` (or its dict); Mistral
            by default.
        connector_type: "mlp2x_gelu" or "linear".
        connector_num_experts: experts of the connector, for "mlp2x_gelu"; 1 for a dense one.
        connector_num_experts_per_tok: experts that each patch goes to.
        aux_loss: "cumo" or "switch"; see `cumo.nn.losses.routing_losses`.
        balance_loss_coef: weight of the balance losses of encoder and connector, and of Mixtral as language model, as
            published. Other language models have that of their own configuration; see `router_loss_coefs`.
        router_z_loss_coef: weight of the z-losses of the same.
        image_token_id: id of the placeholder, one for each feature of a picture; by default the id after the
            vocabulary, as it is never looked up in the embedding.
        tie_word_embeddings: taken from `text_config`, whatever is given.

    Raises:
        ValueError: `connector_type` or `aux_loss` is unknown, `connector_num_experts_per_tok` is not in
            1..connector_num_experts, experts are asked of a linear connector, a coefficient is negative, or
            `image_token_id` is no integer.

    Examples:
        >>> from cumo import CuMoConfig
        >>> config = CuMoConfig.from_preset("mistral-7b", aux_loss="switch")
        >>> config.vision_config.num_experts, config.connector_num_experts, config.image_token_id
        (4, 4, 32000)
        >>> CuMoConfig(text_config={"model_type": "llama", "hidden_size": 64}).text_config.hidden_size
        64
    """

    model_type = "cumo"
    sub_configs = {"vision_config": CuMoVisionConfig, "text_config": AutoConfig}
    # Trainer gathers logits and labels for its metrics, and nothing that is no tensor [samples, ...]
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "hidden_states", "attentions", "lm_loss", "vision_losses", "connector_losses", "text_losses",
        "image_features", "vision_routings", "tiles_per_scale", "connector_routing", "text_routings",
    ]  # fmt: skip

    vision_config: Any = None  # a CuMoVisionConfig once constructed
    text_config: Any = None  # a PreTrainedConfig once constructed
    connector_type: str = "mlp2x_gelu"
    connector_num_experts: int = 4
    connector_num_experts_per_tok: int = 2
    aux_loss: str = "cumo"
    balance_loss_coef: float = 0.1
    router_z_loss_coef: float = 0.01
    image_token_id: Any = None  # an int once constructed
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Make configurations of the parts' dicts, and validate."""
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = CuMoVisionConfig(**_without_type(self.vision_config or {}))
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("mistral")
        elif isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type", "mistral")
            self.text_config = AutoConfig.for_model(model_type, **_without_type(self.text_config))
        _check_layers("text_config", self.text_config)
        check_one_of("connector_type", self.connector_type, CONNECTORS)
        check_one_of("aux_loss", self.aux_loss, AUX_LOSSES)
        for name in ("balance_loss_coef", "router_z_loss_coef"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        check_top_k(self.connector_num_experts_per_tok, self.connector_num_experts)
        if self.connector_type == "linear" and self.connector_num_experts > 1:
            raise ValueError("connector_num_experts: expected 1 for connector_type='linear', which has no experts")
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        if isinstance(self.image_token_id, bool) or not isinstance(self.image_token_id, int):
            raise ValueError(f"image_token_id: expected an integer, got {self.image_token_id!r}")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)

    @property
    def text_num_experts(self) -> int:
        """Experts of each MoE layer of the language model; 1 if it is dense."""
        return max(getattr(self.text_config, name, None) or 1 for name in EXPERT_COUNTS)

    @property
    def has_text_router_losses(self) -> bool:
        """Whether the language model has a balance loss and a z-loss.

        It has, if its routers choose by softmax and its configuration has a `router_aux_loss_coef`, which is how
        transformers tells it of families that are trained with such a loss. Those that choose by sigmoid (DeepSeek-V3,
        GLM-4-MoE, ...) are balanced by a bias of their routers instead.
        """
        text = self.text_config
        return (
            hasattr(text, "output_router_logits")
            and hasattr(text, "router_aux_loss_coef")
            and text.model_type not in OTHER_SCORES
        )

    def router_loss_coefs(self, part: str) -> tuple[float, float]:
        """Weights of the balance loss and of the z-loss of a part.

        Args:
            part: "vision", "connector" or "text". Of "text", Mixtral has those of this configuration, as published;
                other language models have `router_aux_loss_coef` and, if there is one, `router_z_loss_coef` of
                `text_config`.
        """
        text = self.text_config
        if part != "text" or text.model_type == "mixtral":
            return self.balance_loss_coef, self.router_z_loss_coef
        return getattr(text, "router_aux_loss_coef", 0.0), getattr(text, "router_z_loss_coef", 0.0)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> CuMoConfig:
        """The configuration of a published model or of a tiny one.

        Args:
            name: a key of `PRESETS`: "mistral-7b", "mixtral-8x7b" or "tiny".
            changes: arguments in place of the preset's.

        Raises:
            ValueError: `name` is no key of `PRESETS`, or a value in `changes` is refused.
        """
        check_one_of("name", name, PRESETS)
        return cls(**copy.deepcopy(PRESETS[name]) | changes)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; the content of a published config.json becomes a `CuMoConfig`.

        Args:
            config_dict: the content of a config.json.
            kwargs: with `name_or_path`, the folder that it is from, beside which a published encoder is looked for.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"config_dict: expected a dictionary, got {type(config_dict).__name__}")
        if is_published(config_dict):
            folder = Path(str(kwargs.get("name_or_path") or "."))
            encoder = find_encoder(str(config_dict.get("mm_vision_tower")), folder)
            return CuMoConfig.from_dict({"model_type": "cumo", **native_fields(config_dict, encoder)}, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers; reads published folders too."""
        with reading(pretrained_model_name_or_path, "the configuration of a model"):
            config_dict, unused = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if is_published(config_dict):
                return cls.from_dict(config_dict, name_or_path=pretrained_model_name_or_path, **unused)
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


class PublishedMistralConfig(CuMoConfig):
    """Lets `AutoConfig` read the published CuMo-Mistral-7B; it gives a `CuMoConfig`."""

    model_type = "llava_mistral"


class PublishedMixtralConfig(CuMoConfig):
    """Lets `AutoConfig` read the published CuMo-Mixtral-8x7B; it gives a `CuMoConfig`."""

    model_type = "llava_mixtral"


def _check_layers(name: str, config: Any) -> None:
    """A model of a billion layers would be built, without a tensor, until memory is full."""
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and (not isinstance(layers, int) or not 0 <= layers <= MAX_LAYERS):
        raise ValueError(f"{name}.num_hidden_layers: expected an integer up to {MAX_LAYERS}, got {layers!r}")


def _without_type(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "model_type"}


for _class in (CuMoVisionConfig, CuMoConfig, PublishedMistralConfig, PublishedMixtralConfig):
    AutoConfig.register(_class.model_type, _class, exist_ok=True)
