# SPDX-License-Identifier: Apache-2.0
"""Assemble a CuMo model for the first stage of training from a vision encoder and a language model of transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cumo.checkpoints.convert import write_native
from cumo.checkpoints.files import Weights, open_folder, read_json, written_aside
from cumo.checkpoints.published_folder import read_config
from cumo.config import ENCODERS, CuMoConfig, CuMoVisionConfig
from cumo.models.connector import CuMoConnector
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor, clip_image_processor
from cumo.models.tokenizer import IMAGE_TOKEN, mistral_tokenizer
from cumo.models.vision import CuMoVisionModel

# Other tensors of an encoder's checkpoint: heads, the text side of a whole CLIP, a buffer
_UNUSED = ("post_layernorm.", "head.", "embeddings.position_ids")
_PIXELS = ("image_mean", "image_std", "rescale_factor", "resample")


def assemble_checkpoint(
    vision: Path,
    text: Path,
    target: Path,
    *,
    scales: list[int] | tuple[int, ...] = (1, 3),
    connector_type: str = "mlp2x_gelu",
    high_resolution: bool = False,
    keep_unused_layers: bool = False,
    seed: int = 0,
) -> None:
    """Write a checkpoint: a dense encoder, a dense connector with random weights, and the unchanged language model.

    Args:
        vision: folder of a CLIP or SigLIP (whole, or its vision model), as transformers writes it.
        text: folder of a decoder with its tokenizer, as transformers writes it.
        target: a folder that does not exist yet.
        scales, high_resolution, keep_unused_layers: see `CuMoVisionConfig`.
        connector_type: "mlp2x_gelu" or "linear".
        seed: seed of the connector's weights.

    Raises:
        ValueError: a folder holds another kind of model, or is incomplete or damaged. `target` is not left behind.
    """
    encoder, tokenizer = _encoder_config(vision), _tokenizer(text)  # fast checks first
    language_model = AutoModelForCausalLM.from_pretrained(text, dtype="auto")
    config = CuMoConfig(
        vision_config=CuMoVisionConfig(
            encoder_config=encoder,
            num_experts=1,
            num_experts_per_tok=1,
            scales=scales,
            high_resolution=high_resolution,
            keep_unused_layers=keep_unused_layers,
        ),
        text_config=language_model.config,
        connector_type=connector_type,
        connector_num_experts=1,
        connector_num_experts_per_tok=1,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        dtype=language_model.dtype,
    )
    with torch.device("meta"):
        model = CuMoForConditionalGeneration(config)
    model.language_model = language_model
    model.generation_config = language_model.generation_config
    model.vision_tower = _tower(config.vision_config, vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.connector = CuMoConnector(config)
        model.connector.apply(model._init_weights)
    processor = _processor(tokenizer, encoder, vision, scales[-1] if high_resolution else None)
    with written_aside(target) as folder:
        write_model(folder, model, language_model.dtype)
        processor.save_pretrained(folder)


def assemble_processor(vision: Path, text: Path, *, largest_scale: int | None = None) -> CuMoProcessor:
    """Return the processor that `assemble_checkpoint` writes, without loading a model.

    Args:
        vision, text: see `assemble_checkpoint`.
        largest_scale: largest scale of the pictures, with `high_resolution`.

    Raises:
        ValueError: see `assemble_checkpoint`.
    """
    return _processor(_tokenizer(text), _encoder_config(vision), vision, largest_scale)


def write_model(
    folder: Path,
    model: CuMoForConditionalGeneration,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json and the tensors of a model in memory into an existing folder.

    Args:
        folder: the existing folder.
        model: model whose configuration is written, and whose tensors too unless `tensors` are given.
        dtype: dtype of the floating-point tensors in the files.
        tensors: tensors under the model's names, for a model that itself holds only parts of them.
    """
    config = copy.deepcopy(model.config)
    for part in (config, config.vision_config, config.vision_config.encoder_config, config.text_config):
        part.dtype = dtype
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = model.state_dict() if tensors is None else tensors
    stream = (
        (name, tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu())
        for name, tensor in state.items()
        if name not in tied
    )
    write_native(folder, config, stream)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    """Load the folder's tokenizer, with `<image>` as a special token.

    Mistral's tokenizer is made from tokenizer.model, because AutoTokenizer takes it for another kind. Where
    tokenizer.model is of another kind, or tokens were added to it, tokenizer.json is used as it stands.
    """
    config = read_config(folder)
    if config.get("model_type") in (CuMoConfig.model_type, *ENCODERS, "clip", "siglip"):
        raise ValueError(f"{folder}: expected a language model, got model_type {config['model_type']!r}")
    whole = (folder / "tokenizer.json").is_file()
    if (folder / "tokenizer.model").is_file():
        tokenizer, why_not = _of_sentencepiece(folder)
        if not why_not:
            return tokenizer
        if not whole:
            raise ValueError(f"{folder}: expected a tokenizer.json, for {why_not}")
    tokenizer = (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(folder)
    if tokenizer.eos_token is None:
        raise ValueError(f"{folder}: expected a tokenizer with an EOS token, with which answers end, got none")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def _of_sentencepiece(folder: Path) -> tuple[Any, str]:
    """Return the tokenizer made from tokenizer.model, and why it differs from the folder's, or "" if it does not."""
    try:
        tokenizer = mistral_tokenizer(folder / "tokenizer.model")
    except ValueError as error:
        return None, str(error)
    settings: list[dict[str, Any]] = [
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    ]
    whole, config, added = settings
    names = [
        token["content"] for token in (*whole.get("added_tokens", ()), *config.get("added_tokens_decoder", {}).values())
    ]
    vocabulary = tokenizer.get_vocab()
    missing = sorted({name for name in (*names, *added) if name not in vocabulary})
    if missing:
        return tokenizer, f"its tokenizer.model does not know the added tokens {', '.join(missing)}"
    eos = config.get("eos_token") or tokenizer.eos_token
    eos = eos["content"] if isinstance(eos, dict) else eos
    return tokenizer, "" if eos == tokenizer.eos_token else f"answers end with {eos}, not as in its tokenizer.model"


def _processor(tokenizer: Any, encoder: Any, vision: Path, largest_scale: int | None) -> CuMoProcessor:
    return CuMoProcessor(
        clip_image_processor(encoder.image_size, **_pixels(vision)),
        tokenizer,
        image_seq_length=(encoder.image_size // encoder.patch_size) ** 2,
        high_resolution_size=None if largest_scale is None else encoder.image_size * largest_scale,
    )


def _encoder_config(folder: Path) -> Any:
    read_config(folder)  # its errors say more than those of transformers
    config: Any = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type not in ENCODERS:
        raise ValueError(f"{folder}: expected a CLIP or SigLIP vision model, got model_type {config.model_type!r}")
    return config


def _pixels(folder: Path) -> dict[str, Any]:
    """Return the settings of the encoder's preprocessing, such as mean and deviation."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    fields = read_json(path)
    return {name: fields[name] for name in _PIXELS if name in fields}


def _tower(config: CuMoVisionConfig, folder: Path) -> CuMoVisionModel:
    """Load the encoder with the folder's weights."""
    weights: Weights = open_folder(folder)
    whole = any(name.startswith("vision_model.") for name in weights)
    tensors: dict[str, Tensor] = {}
    for name in weights:
        if whole and not name.startswith("vision_model."):
            continue
        inner = name.removeprefix("vision_model.")
        if not inner.startswith(_UNUSED):
            tensors[inner.removeprefix("encoder.")] = weights[name]
    tower = CuMoVisionModel(config)
    result = tower.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(
            f"{folder}: expected the tensors of its configuration, missing {sorted(result.missing_keys)}, "
            f"unexpected {sorted(result.unexpected_keys)}"
        )
    return tower
