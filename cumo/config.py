# SPDX-License-Identifier: Apache-2.0
"""Configuration of the CuMo models, in the way of transformers: saved as config.json, validated on construction."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from cumo_kernels.checks import check_one_of, check_top_k

ENCODERS = ("clip_vision_model", "siglip_vision_model")
PROBS_DTYPES = ("float32", "bfloat16", "float16")


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
        ValueError: a value does not fit.
    """

    model_type = "cumo_vision"
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
        check_top_k(self.num_experts_per_tok, self.num_experts)
        check_one_of("probs_dtype", self.probs_dtype, PROBS_DTYPES)
        self.scales = list(self.scales)
        if self.scales != sorted(set(self.scales)) or not self.scales or self.scales[0] != 1:
            raise ValueError(f"scales: expected rising integers from 1 on, such as [1, 3], got {self.scales}")
        layers = self.encoder_config.num_hidden_layers
        if not -layers <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer: expected -{layers}..-1 for {layers} blocks, got {self.feature_layer}")
        super().__post_init__(**kwargs)

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
