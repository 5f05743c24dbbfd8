# SPDX-License-Identifier: Apache-2.0
"""Convert config.json of the published models (`llava_mistral`, `llava_mixtral`) to `CuMoConfig`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cumo.checkpoints.files import read_json
from cumo_kernels.checks import check_one_of

# model_type of the published models -> model_type of their language model
TEXT_TYPES = {"llava_mistral": "mistral", "llava_mixtral": "mixtral"}
ARCHITECTURES = {"llava_mistral": "LlavaMistralForCausalLM", "llava_mixtral": "LlavaMixtralForCausalLM"}
CLIP_NAME = "openai/clip-vit-large-patch14-336"
CONNECTORS = ("smoe_mlp", "mlp2x_gelu", "linear")

# Keys of a published config.json that are not the language model's. The state of the run that wrote it (`training`,
# `local_rank` and so on) and settings that the published code ignores (`num_layers`, `dropout`) are dropped.
_OWN_KEYS = {
    "architectures", "model_type", "transformers_version", "_name_or_path", "auto_map",
    "balance_loss_coef", "router_z_loss_coef", "clip_smoe", "mlp_smoe", "num_experts", "num_selected", "num_layers",
    "dropout", "scales", "training", "local_rank", "image_aspect_ratio", "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter",
    "tokenizer_model_max_length", "tokenizer_padding_side", "use_mm_proj",
}  # fmt: skip


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a published model."""
    return config.get("model_type") in TEXT_TYPES


def find_encoder(name: str, checkpoint: Path) -> dict[str, Any] | None:
    """Return the vision encoder's configuration as a dict of `CLIPVisionConfig`; None for CLIP ViT-L/14-336.

    Args:
        name: `mm_vision_tower`: a folder, absolute or relative to the working directory, the checkpoint or its parent;
            or the name of CLIP ViT-L/14-336 on the hub, which is built in, so that no hub is asked.
        checkpoint: the checkpoint's folder.

    Raises:
        ValueError: `name` is not built in, and no such folder holds a config.json.
    """
    if name == CLIP_NAME:
        return None
    folder = encoder_folder(name, checkpoint)
    if folder is None:
        raise ValueError(
            f"mm_vision_tower: expected {CLIP_NAME} (built in) or a folder with a config.json, got {name!r}, which is "
            f"none in the working directory, {checkpoint} or {checkpoint.parent}"
        )
    config = read_json(folder / "config.json")
    fields = config.get("vision_config", config)
    return {"model_type": "clip_vision_model"} | {key: fields[key] for key in fields if key != "architectures"}


def encoder_folder(name: str, checkpoint: Path) -> Path | None:
    """Return the folder that `mm_vision_tower` names, or None if no such folder holds a config.json."""
    folders = [base / name for base in (Path(), checkpoint, checkpoint.parent)]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def native_fields(published: Mapping[str, Any], encoder: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of `CuMoConfig` for a published config.json.

    Args:
        published: content of the config.json.
        encoder: what `find_encoder` returned.

    Raises:
        ValueError: `published` describes a model that CuMo cannot represent.
    """
    check_one_of("model_type", published.get("model_type"), TEXT_TYPES)
    connector = published.get("mm_projector_type", "linear")
    check_one_of("mm_projector_type", connector, CONNECTORS)
    for key, expected in (("mm_use_im_start_end", False), ("mm_patch_merge_type", "flat")):
        if published.get(key, expected) != expected:
            raise ValueError(f"{key}: expected {expected!r}, got {published[key]!r}")
    experts = {"num_experts": published.get("num_experts", 1), "top_k": published.get("num_selected", 1)}
    dense = {"num_experts": 1, "top_k": 1}
    vision = experts if published.get("clip_smoe") else dense
    of_connector = experts if connector == "smoe_mlp" else dense
    text = {key: value for key, value in published.items() if key not in _OWN_KEYS and not key.startswith("mm_")}
    fields = {
        "vision_config": {
            "encoder_config": encoder,
            "num_experts": vision["num_experts"],
            "num_experts_per_tok": vision["top_k"],
            "scales": _scales(published.get("scales", (1, 3))),
        },
        "text_config": {**text, "model_type": TEXT_TYPES[published["model_type"]]},
        "connector_type": "linear" if connector == "linear" else "mlp2x_gelu",
        "connector_num_experts": of_connector["num_experts"],
        "connector_num_experts_per_tok": of_connector["top_k"],
        "balance_loss_coef": published.get("balance_loss_coef", 0.0),
        "router_z_loss_coef": published.get("router_z_loss_coef", 0.0),
    }
    dtype = published.get("dtype", published.get("torch_dtype"))
    return fields if dtype is None else {**fields, "dtype": dtype}


def _scales(value: Any) -> list[int]:
    """Parse the scales: the first stages wrote "1,3", the last one [1, 3]."""
    return [int(scale) for scale in (value.split(",") if isinstance(value, str) else value)]


def published_fields(config: Any, vision_tower: str) -> dict[str, Any]:
    """Return the published config.json for a `CuMoConfig`.

    Args:
        config: a `CuMoConfig`.
        vision_tower: value of `mm_vision_tower`: the name of a folder with the encoder's config.json, or `CLIP_NAME`.

    Raises:
        ValueError: the published layout cannot represent the configuration.
    """
    text = config.text_config.to_dict()
    model_type = next((name for name, kind in TEXT_TYPES.items() if kind == text["model_type"]), None)
    vision = config.vision_config
    if model_type is None:
        raise ValueError(f"text_config: expected one of {[*TEXT_TYPES.values()]}, got {text['model_type']!r}")
    pairs = (
        (vision.num_experts, vision.num_experts_per_tok),
        (config.connector_num_experts, config.connector_num_experts_per_tok),
    )
    experts = {pair for pair in pairs if pair[0] > 1} or {(1, 1)}
    if len(experts) > 1:
        raise ValueError(
            "num_experts: expected the same (experts, experts per token) in vision encoder and connector, of which the "
            f"published layout has one, got {sorted(experts)}"
        )
    if vision.high_resolution or vision.feature_layer != -2:
        raise ValueError("vision_config: expected high_resolution=False and feature_layer=-2 for the published layout")
    num_experts, top_k = experts.pop()
    connector_is_moe = config.connector_num_experts > 1
    for key in ("architectures", "transformers_version", "model_type", "dtype", "_name_or_path"):
        text.pop(key, None)
    rope = text.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters: expected the default kind for the published layout, got {rope}")
    return {
        **text,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "torch_dtype": str(config.dtype or "float32").removeprefix("torch."),
        "balance_loss_coef": config.balance_loss_coef,
        "router_z_loss_coef": config.router_z_loss_coef,
        "clip_smoe": vision.is_moe,
        "mlp_smoe": connector_is_moe,
        "num_experts": num_experts,
        "num_selected": top_k,
        "scales": vision.scales,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision.encoder_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "smoe_mlp" if connector_is_moe else config.connector_type,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": vision_tower,
        "training": False,  # with True the published code computes losses even without labels
        "use_mm_proj": True,
    }
