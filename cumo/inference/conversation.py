# SPDX-License-Identifier: Apache-2.0
"""Check conversations, and make prompts of them in which no text of a user is a control token."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError
from PIL import Image

from cumo.inference.features import PreparedPicture

Conversation = Sequence[Mapping[str, Any]]
ROLES = ("system", "user", "assistant")
# The published template writes these as ordinary text, and the models know them as control sequences.
TEXT_MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Prompt(NamedTuple):
    """A conversation in the form that the tokenizer and the image processor take."""

    text: str
    images: list[Any]
    """Pictures, one for each placeholder in `text`, in order."""


def check_conversation(conversation: Conversation) -> None:
    """Check that a conversation has the form that `CuMoPipeline` documents.

    Raises:
        ValueError: a message or a part of one is malformed, or the last message is not the user's.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, (str, bytes)) or not conversation:
        raise ValueError(f"messages: expected a list of messages, got {_shown(conversation)}")
    for index, message in enumerate(conversation):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{name}: expected an object with role and content, got {_shown(message)}")
        if message.get("role") not in ROLES:
            raise ValueError(f"{name}.role: expected one of {list(ROLES)}, got {_shown(message.get('role'))}")
        if message["role"] == "system" and index:
            raise ValueError(f"{name}.role: expected system as the first message only")
        _check_content(f"{name}.content", message.get("content"), message["role"])
    if conversation[-1]["role"] != "user":
        raise ValueError(f"messages: expected user to speak last, got {conversation[-1]['role']}")


def _check_content(name: str, content: Any, role: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise ValueError(f"{name}: expected a string or a list of parts, got {_shown(content)}")
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            continue
        if kind == "image":
            if role != "user":
                raise ValueError(f"{name}[{index}]: expected pictures in messages of the user only, got one of {role}")
            if isinstance(part.get("image"), (Image.Image, str, os.PathLike, np.ndarray, PreparedPicture)):
                continue
        raise ValueError(
            f"{name}[{index}]: expected a part of type text (with text) or image (with image), got {_shown(part)}"
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _places(text: str, token: str) -> Iterator[int]:
    """Yield the positions at which a token begins in a text, overlapping ones included."""
    begin = text.find(token)
    while begin >= 0:
        yield begin
        begin = text.find(token, begin + 1)


class PromptBuilder:
    """Makes prompts with a processor's chat template.

    Text of the conversation that would read as a control token, such as `<image>`, `</s>` or `[INST]`, gets a space
    after its first character. It stays legible and becomes ordinary text. This applies to every role.

    Args:
        processor: a `CuMoProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        tokenizer = processor.tokenizer
        tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
        tokens.update(tokenizer.all_special_tokens, [processor.image_token])
        tokens.update(marker for marker in TEXT_MARKERS if marker in str(processor.chat_template))
        self._control = sorted(token for token in tokens if token.strip())

    def neutral(self, texts: Sequence[str]) -> list[str]:
        """Return the texts of a message without control tokens. Those that span several texts are also broken up, since
        a template may join the texts."""
        joined = "".join(texts)
        cuts = sorted({begin + 1 for token in self._control for begin in _places(joined, token)})
        neutral, begin = [], 0
        for text in texts:
            end = begin + len(text)
            bounds = [begin, *(cut for cut in cuts if begin < cut <= end), end]
            neutral.append(" ".join(joined[start:stop] for start, stop in itertools.pairwise(bounds)))
            begin = end
        return neutral

    def build(self, conversation: Conversation) -> Prompt:
        """Return the prompt of a conversation, up to where the answer begins.

        Raises:
            ValueError: the conversation is malformed, or the template refuses it.
        """
        check_conversation(conversation)
        images: list[Any] = []
        messages = []
        for message in conversation:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            images.extend(part["image"] for part in parts if part["type"] == "image")
            messages.append({"role": message["role"], "content": self._content(content)})
        try:
            text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from error
        found = text.count(self.processor.image_token)
        if found != len(images):
            raise ValueError(f"messages: the chat template made {found} placeholders of {len(images)} pictures")
        return Prompt(text, images)

    def _content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self.neutral([content])[0]
        texts = iter(self.neutral([part["text"] for part in content if part["type"] == "text"]))
        return [
            {"type": "text", "text": next(texts)} if part["type"] == "text" else {"type": "image"} for part in content
        ]
