# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of Mistral and Mixtral, from the SentencePiece model that their checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from cumo.checkpoints.files import reading

IMAGE_TOKEN = "<image>"
SPACE = "\u2581"  # how SentencePiece writes a space


def _merges(pieces: list[str], scores: list[float], mergeable: list[bool]) -> list[tuple[str, str]]:
    """Pairs to merge, the best score first: ids would rank runs of spaces wrongly, whose scores are the lowest."""
    ids = {piece: index for index, piece in enumerate(pieces) if mergeable[index]}
    merges: list[tuple[float, int, int, int]] = []
    for piece, index in ids.items():
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-scores[index], index, left, right))
    return [(pieces[left], pieces[right]) for _, _, left, right in sorted(merges)]


def _backend(model: Any) -> Tokenizer:
    """Rebuild a SentencePiece BPE model with byte fallback."""
    size = model.get_piece_size()
    pieces = [model.id_to_piece(index) for index in range(size)]
    mergeable = [
        not (model.is_control(index) or model.is_unknown(index) or model.is_byte(index) or model.is_unused(index))
        for index in range(size)
    ]
    bos, unk = pieces[model.bos_id()], pieces[model.unk_id()]
    backend = Tokenizer(
        BPE(
            {piece: index for index, piece in enumerate(pieces)},
            _merges(pieces, [model.get_score(index) for index in range(size)], mergeable),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, model.bos_id())]
    )
    return backend


def mistral_tokenizer(path: str | Path, image_token: str = IMAGE_TOKEN) -> PreTrainedTokenizerFast:
    """A fast tokenizer that gives the ids of a SentencePiece model, which transformers' own conversion does not.

    Args:
        path: `tokenizer.model`, as of Mistral-7B-Instruct-v0.2 and Mixtral-8x7B: BPE with byte fallback. Reading it
            needs the package sentencepiece; the tokenizer, saved and reloaded by `AutoTokenizer`, does not.
        image_token: placeholder of a picture, added as a special token behind the vocabulary.

    Returns:
        A tokenizer that begins every text with BOS, pads on the left, and pads with the unknown token as published.

    Raises:
        ValueError: `path` is no file, holds something else, or a model that splits text in other ways than Mistral's:
            without a space in front, normalised, by whole symbols, not by byte-pair encoding.
    """
    import sentencepiece

    if not Path(path).is_file():
        raise ValueError(f"path: expected a SentencePiece tokenizer.model, got {str(path)!r}, which is no file")
    with reading(path, "a SentencePiece tokenizer.model"):
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        tokenizer = _of_model(model, image_token)
        texts = [*_PROBES, *_texts_of_pieces(model)]
    for text in texts:
        ours, theirs = tokenizer.encode(text, add_special_tokens=False), model.encode(text)
        if ours != theirs:
            raise ValueError(
                f"path: expected a SentencePiece model that splits text as Mistral's, got {str(path)!r}, which makes "
                f"{model.id_to_piece(theirs)} of {text!r} and not {tokenizer.convert_ids_to_tokens(ours)}"
            )
    return tokenizer


# What normalisation, a missing space in front and the splitting of digits would show in
_PROBES = ["Hello world", "  two  spaces\n\ttab ", "ﬁ ① Ａ é e\u0301", "1234567890 x2", "画像 🐱"]


def _texts_of_pieces(model: Any) -> list[str]:
    """Texts in which every piece occurs that text can become, a hundred pieces each."""
    texts = [
        model.id_to_piece(index).replace(SPACE, " ")
        for index in range(model.get_piece_size())
        if not (model.is_control(index) or model.is_unknown(index) or model.is_byte(index))
    ]
    return ["".join(texts[start : start + 100]) for start in range(0, len(texts), 100)]


def _of_model(model: Any, image_token: str) -> PreTrainedTokenizerFast:
    special = {
        name: model.id_to_piece(index)
        for name, index in (("bos_token", model.bos_id()), ("eos_token", model.eos_id()), ("unk_token", model.unk_id()))
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(model),
        **special,
        pad_token=special["unk_token"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(image_token, special=True)]})
    return tokenizer
