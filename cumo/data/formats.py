# SPDX-License-Identifier: Apache-2.0
"""The rows of data files, LLaVA's `conversations` or OpenAI's `messages`, brought into one form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from cumo.models.prompts import ASSISTANTS, USERS
from cumo.models.tokenizer import IMAGE_TOKEN

SYSTEM = "system"
OTHER_MEDIA = ("video", "videos", "audio", "audios")


class Sample(NamedTuple):
    """A conversation that passed every check that needs no picture."""

    id: object
    """The row's `id`, or None."""
    turns: list[dict[str, str]]
    """LLaVA's {"from": "human" or "gpt", "value": text}, question first, in turns."""
    system: str | None
    """System prompt instead of the template's; None to keep that."""
    images: list[str]
    """References of the pictures, one for each `<image>` of the turns, in their order."""


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: `raw` is no JSON, or no UTF-8.
    """
    try:
        return json.loads(raw)
    except UnicodeDecodeError as error:
        raise ValueError(f"broken JSON: expected UTF-8, got byte {raw[error.start]:#04x} at {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error


def parse_row(row: Any) -> Sample:
    """A row of a data file, checked.

    Both formats have turns under `conversations` or `messages`: {"from", "value"} or {"role", "content"}, by human
    (user) and gpt (assistant) in turns. A system prompt is a system turn before them, or stands under `system`. What
    the assistant says before the first question is left out, as published. `content` may be a list of parts of type
    text, image or image_url. Pictures stand under `image` or `images`, a string or a list, or in the parts. Other keys
    are ignored, but for those of other media.

    Raises:
        ValueError: the row is neither format, its turns or pictures do not fit, or it has a video or audio.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with conversations or messages, got {_short(row)}")
    key = "conversations" if "conversations" in row else "messages"
    if not isinstance(row.get(key), list):
        raise ValueError(f"expected a list under conversations or messages, got keys {list(row)}")
    for name in OTHER_MEDIA:
        if row.get(name):
            raise ValueError(f"{name}: expected pictures and text only, got {_short(row[name])}")
    system: str | None = row.get(SYSTEM)
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{SYSTEM}: expected a text, got {_short(system)}")
    turns: list[dict[str, str]] = []
    in_parts: list[str | None] = []  # None: the next of the row's pictures
    for index, entry in enumerate(row[key]):
        speaker, text, pictures = _parse_turn(entry, f"{key}[{index}]")
        if speaker == SYSTEM and index == 0:
            if system is not None and system != text:
                raise ValueError(f"{SYSTEM}: expected one system prompt, got {_short(system)} and {_short(text)}")
            system = text
            continue
        turns.append({"from": _role(speaker, f"{key}[{index}]"), "value": text})
        in_parts += pictures
    if turns and turns[0]["from"] == ASSISTANTS[0]:
        turns = turns[1:]
    _check_turns(turns)
    listed = _images_of_row(row)
    inline = [image for image in in_parts if image is not None]
    if inline and (listed or len(inline) != len(in_parts)):
        raise ValueError("expected pictures either under images or all within the parts of messages, got both")
    images = inline or listed
    wanted = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if wanted != len(images):
        raise ValueError(f"expected as many pictures as {IMAGE_TOKEN} in the text, got {len(images)} for {wanted}")
    return Sample(row.get("id"), turns, system, images)


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _role(speaker: Any, where: str) -> str:
    for names in (USERS, ASSISTANTS):
        if speaker in names:
            return names[0]
    raise ValueError(f"{where}: expected {USERS[0]} or {ASSISTANTS[0]} to speak, got {_short(speaker)}")


def _parse_turn(entry: Any, where: str) -> tuple[Any, str, list[str | None]]:
    """Speaker, text, and the pictures that stand in its parts, None for those that `images` has."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {_short(entry)}")
    speaker = entry.get("from", entry.get("role"))
    content = entry.get("value", entry.get("content"))
    if isinstance(content, str):
        return speaker, content, [None] * content.count(IMAGE_TOKEN)
    if not isinstance(content, list):
        raise ValueError(f"{where}: expected a text as value or content, got {_short(content)}")
    texts: list[str] = []
    images: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            if IMAGE_TOKEN in part["text"]:
                raise ValueError(f"{where}: expected pictures as parts of their own, got {IMAGE_TOKEN} in a text")
        elif kind in ("image", "image_url"):
            texts.append(f"{IMAGE_TOKEN}\n")
            reference = part.get(kind)
            if kind == "image_url" and isinstance(reference, dict):
                reference = reference.get("url")
            images.append(_reference(reference, where))
        else:
            raise ValueError(f"{where}: expected parts of type text, image or image_url, got {_short(part)}")
    return speaker, "".join(texts), images


def _check_turns(turns: list[dict[str, str]]) -> None:
    """Turns are taken, and there is something to learn."""
    for index, turn in enumerate(turns):
        expected = (USERS, ASSISTANTS)[index % 2][0]
        if turn["from"] != expected:
            raise ValueError(f"expected {expected} to speak next, got {turn['from']}: {_short(turn['value'])}")
        if expected == ASSISTANTS[0] and not turn["value"].strip():
            raise ValueError(f"expected an answer to {_short(turns[index - 1]['value'])}, got an empty one")
    if len(turns) < 2:
        raise ValueError("expected a question and an answer to learn, got " + ("no answer" if turns else "nothing"))


def _reference(value: Any, where: str) -> str | None:
    """The reference of a picture: a string, or what Hugging Face's datasets make of it."""
    if isinstance(value, dict):
        value = value.get("path")
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{where}: expected the path of a picture, got {_short(value)}")
    return value


def _images_of_row(row: dict[str, Any]) -> list[str]:
    given = [row[key] for key in ("image", "images") if row.get(key)]
    if len(given) > 1:
        raise ValueError("expected pictures under image or images, got both")
    values: Iterable[Any] = given[0] if given and isinstance(given[0], list) else given
    references = [_reference(value, "images") for value in values]
    if None in references:
        raise ValueError(f"images: expected the path of a picture, got {_short(given[0])}")
    return [reference for reference in references if reference is not None]
