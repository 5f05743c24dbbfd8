# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint that vLLM serves through its Transformers modeling backend.

The backend builds the model from `AutoModel`, without a head, and replaces attention, linear layers and embeddings with
its own. The written folder holds the unchanged checkpoint, its processor, and a module that imports `CuMoModel` from
this package, which must therefore be installed beside vLLM; `--trust-remote-code` lets vLLM import that module.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from cumo.checkpoints.files import read_json
from cumo.config import CuMoConfig
from cumo.models.connector import CuMoConnector
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor
from cumo.models.vision import CuMoVisionModel, CuMoVisionPreTrainedModel

MODULE = "modeling_cumo"
SOURCE = """\
# Lets vLLM find the model, whose code is in the package cumo.
from cumo.integrations.vllm import CuMoConfig, CuMoModel  # noqa: F401
"""
# The order matters: the configuration must be known before the model.
AUTO_MAP = {"AutoConfig": f"{MODULE}.CuMoConfig", "AutoModel": f"{MODULE}.CuMoModel"}


class _Decoder(nn.Module):
    """Names the tensors of the language model without its head as a checkpoint does."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = AutoModel.from_config(config)

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """Embed text. Picture placeholders, which are outside the vocabulary, get the embedding of token 0."""
        table = self.model.get_input_embeddings()
        size = self.model.config.vocab_size
        return lambda ids: table(ids.masked_fill(ids >= size, 0))


class CuMoModel(PreTrainedModel):
    """CuMo without a head, in the form that vLLM's Transformers backend takes apart and reassembles.

    It neither loads checkpoints nor trains; use `CuMoForConditionalGeneration` for that. It has the same tensors under
    the same names, except the head.
    """

    config: CuMoConfig
    config_class = CuMoConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    _no_split_modules = ["CuMoVisionBlock", "CuMoConnector"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CuMoConfig) -> None:
        super().__init__(config)
        self.vision_tower = CuMoVisionModel(config.vision_config)
        self.connector = CuMoConnector(config)
        self.language_model = _Decoder(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        CuMoVisionPreTrainedModel.init_layer(module, getattr(self.config.text_config, "initializer_range", 0.02))

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's input embeddings."""
        return self.language_model.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embeddings."""
        self.language_model.model.set_input_embeddings(value)

    def get_decoder(self) -> Any:
        """Return the language model."""
        return self.language_model.model

    def get_encoder(self, modality: str | None = None) -> Any:
        """Return the vision encoder.

        Raises:
            ValueError: `modality` is neither None nor "image".
        """
        if modality not in (None, "image"):
            raise ValueError(f"modality: expected 'image', got {modality!r}")
        return self.vision_tower

    def get_image_features(
        self, pixel_values: Tensor, pixel_values_large: Any = None, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode pictures [images, 3, H, H] to `pooler_output` [images, patches, LLM width]."""
        del return_dict, kwargs
        embeddings, _ = self.connector(self.vision_tower(pixel_values, pixel_values_large).features)
        return BaseModelOutputWithPooling(pooler_output=embeddings)

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Return the decoder's last hidden states [B, L, D], for ids without placeholders or for embeddings."""
        return self.language_model.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


def export(source: str | Path, target: Path) -> None:
    """Write a folder that vLLM can serve.

    Args:
        source: checkpoint of either layout, or a name on the hub.
        target: folder to write; created if it does not exist.

    Raises:
        ValueError: `target` is not empty, or the backend cannot serve the model.
    """
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"target: expected an empty folder, got {str(target)!r}, which holds files")
    config = CuMoConfig.from_pretrained(source)
    if config.vision_config.high_resolution:
        raise ValueError("source: expected a model that takes pictures at one size, got one with high_resolution")
    processor = CuMoProcessor.from_pretrained(source)
    model = CuMoForConditionalGeneration.from_pretrained(source, dtype="auto")
    model.save_pretrained(target)
    processor.save_pretrained(target)
    (target / f"{MODULE}.py").write_text(SOURCE)
    path = target / "config.json"
    fields = read_json(path) | {"architectures": ["CuMoForConditionalGeneration"], "auto_map": AUTO_MAP}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cumo export-vllm`."""
    parser.add_argument("source", help="checkpoint of either layout, or a name on the hub")
    parser.add_argument("target", type=Path, help="folder to write")


def run(arguments: argparse.Namespace) -> None:
    """Write the folder, and print how to start vLLM."""
    export(arguments.source, arguments.target)
    print(f"vllm serve {arguments.target} --model-impl transformers --trust-remote-code")
