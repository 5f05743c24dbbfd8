# SPDX-License-Identifier: Apache-2.0
"""Placeholders of pictures in a prompt: where they stand, whose pictures they are, and what takes their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PICTURES = ("pixel_values", "pixel_values_large")


def find_placeholders(embeddings: Tensor, table: nn.Module, image_token_id: int) -> Tensor:
    """Mask [B, L] of the positions of `inputs_embeds` that hold the embedding of the image token.

    Args:
        embeddings: [B, L, D] of a caller.
        table: the input embedding of the language model.
        image_token_id: id of the placeholder.

    Raises:
        ValueError: the image token has no embedding, as by default, so that no position can be told to hold it.
    """
    weight: Any = table.weight
    if image_token_id >= weight.shape[0]:
        raise ValueError(
            "inputs_embeds: expected input_ids together with pixel_values, as image_token_id="
            f"{image_token_id} is none of the {weight.shape[0]} ids that have an embedding; `embed(input_ids, "
            "features)` gives embeddings with the features of pictures in their places"
        )
    token: Tensor = table(torch.tensor(image_token_id, device=weight.device))
    return torch.eq(embeddings, token.to(embeddings)).all(dim=-1)


def fill_placeholders(embeddings: Tensor, is_image: Tensor, features: Tensor | None) -> Tensor:
    """Embeddings [B, L, D] with the features of pictures in the place of the placeholders.

    Args:
        embeddings: [B, L, D].
        is_image: [B, L], where the placeholders stand.
        features: [images, patches, D], or None without pictures.

    Raises:
        ValueError: `is_image` has more or fewer placeholders than `features` has rows.
    """
    compiling = torch.compiler.is_compiling()
    if features is None:
        if not compiling and bool(is_image.any()):
            raise ValueError("pixel_values: input_ids hold image tokens, but no pictures were given")
        return embeddings
    if not compiling and int(is_image.sum()) != features.shape[0] * features.shape[1]:
        counts = is_image.sum(dim=1).tolist()
        raise ValueError(
            f"input_ids: expected {features.shape[1]} image tokens for each of {features.shape[0]} pictures, got "
            f"{sum(counts)}, by sample {counts}"
        )
    return embeddings.masked_scatter(is_image.unsqueeze(-1), features.to(embeddings.dtype))


def pictures_per_row(is_image: Tensor, patches: int) -> list[int]:
    """How many pictures each row [L] of a mask [B, L] of placeholders has.

    Raises:
        ValueError: a row has placeholders for a part of a picture.
    """
    counts: list[int] = is_image.sum(dim=1).tolist()
    if any(count % patches for count in counts):
        raise ValueError(f"input_ids: expected multiples of {patches} image tokens in each sample, got {counts}")
    return [count // patches for count in counts]


def repeat_pictures(pictures: Any, counts: list[int], times: int) -> Any:
    """Pictures of all samples, one sample after the other, with those of each sample repeated as a block.

    Args:
        pictures: [images, ...], a list of such tensors (one for each scale), or None.
        counts: how many pictures belong to each sample.
        times: how often each sample is repeated.

    Raises:
        ValueError: `pictures` has more or fewer pictures than `counts` adds up to.

    Examples:
        >>> import torch
        >>> pictures = torch.tensor([10, 11, 20])  # two of the first sample, one of the third
        >>> repeat_pictures(pictures, [2, 0, 1], times=2).tolist()
        [10, 11, 10, 11, 20, 20]
    """
    if pictures is None:
        return None
    if isinstance(pictures, (list, tuple)):
        return [repeat_pictures(scale, counts, times) for scale in pictures]
    if len(pictures) != sum(counts):
        raise ValueError(f"pixel_values: expected {sum(counts)} pictures, by sample {counts}, got {len(pictures)}")
    blocks = [block for block in pictures.split(counts) for _ in range(times)]
    return torch.cat(blocks) if blocks else pictures
