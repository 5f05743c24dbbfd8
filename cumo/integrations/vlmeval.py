# SPDX-License-Identifier: Apache-2.0
"""CuMo as a model of VLMEvalKit, which knows it after `register`:

    import cumo.integrations.vlmeval as cumo_vlmeval
    cumo_vlmeval.register("cumo-mistral-7b", "path/to/checkpoint")

VLMEvalKit is on no package index; install it from its source. Written against its state of August 2026.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vlmeval.vlm.base import BaseModel

from cumo.inference import CuMoPipeline, GenerationOptions

Message = list[dict[str, str]]


def content_of(message: Message) -> list[dict[str, str]]:
    """Convert a message of VLMEvalKit to the parts of one of our messages.

    Raises:
        ValueError: `message` holds something other than text and pictures.
    """
    parts = []
    for item in message:
        if item["type"] == "text":
            parts.append({"type": "text", "text": item["value"]})
        elif item["type"] == "image":
            parts.append({"type": "image", "image": item["value"]})
        else:
            raise ValueError(f"message: expected text and images, got {item['type']!r}")
    return parts


class CuMo(BaseModel):  # type: ignore[misc]
    """CuMo as a model of VLMEvalKit, on `CuMoPipeline`, with VLMEvalKit's own prompts.

    Args:
        model_path: folder in this package's layout or the published one, or a name on the hub.
        max_new_tokens: largest number of tokens of an answer.
        temperature: 0 for greedy decoding.
        options: further arguments of `CuMoPipeline.from_pretrained`: `device`, `dtype`, `quantization`, ...

    Raises:
        ValueError: an argument or the checkpoint is invalid.
    """

    INTERLEAVE = True  # text and any number of pictures, in any order
    allowed_types = ["text", "image"]

    def __init__(self, model_path: str, max_new_tokens: int = 1024, temperature: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.options = GenerationOptions(max_new_tokens=max_new_tokens, temperature=temperature, seed=0)
        self.pipeline = CuMoPipeline.from_pretrained(model_path, **options)

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:  # noqa: ARG002
        """Return the answer to a message."""
        return self._answer([{"role": "user", "content": content_of(message)}])

    def chat_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:  # noqa: ARG002
        """Return the answer to the last turn of a conversation."""
        return self._answer([{"role": turn["role"], "content": content_of(turn["content"])} for turn in message])

    def _answer(self, conversation: list[dict[str, Any]]) -> str:
        (completion,) = self.pipeline.generate([conversation], self.options)
        return completion.text


def register(name: str, model_path: str, **options: Any) -> None:
    """Make VLMEvalKit's `--model NAME` load this checkpoint.

    Args:
        name: name that VLMEvalKit does not have yet.
        model_path: see `CuMo`.
        options: see `CuMo`.

    Raises:
        ValueError: `name` is taken.
    """
    from vlmeval.config import supported_VLM

    if name in supported_VLM:
        raise ValueError(f"name: expected one that VLMEvalKit does not have, got {name!r}")
    supported_VLM[name] = partial(CuMo, model_path=model_path, **options)
