# SPDX-License-Identifier: Apache-2.0
"""CuMo as a model of VLMEvalKit, which knows it after `register`:

    import cumo.integrations.vlmeval as cumo_vlmeval
    cumo_vlmeval.register("cumo-mistral-7b", "path/to/checkpoint")

VLMEvalKit is no package of an index: it is installed from its source. Written against its state of August 2026.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vlmeval.vlm.base import BaseModel

from cumo.inference import CuMoPipeline, GenerationOptions

Message = list[dict[str, str]]


def content_of(message: Message) -> list[dict[str, str]]:
    """A message of VLMEvalKit as parts of a message of ours.

    Raises:
        ValueError: it holds something else than text and pictures.
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
    """CuMo behind `CuMoPipeline`, with VLMEvalKit's own prompts.

    Args:
        model_path: folder of a checkpoint, of this package's layout or the published one, or a name on the hub.
        max_new_tokens: of an answer.
        temperature: 0 for greedy decoding.
        options: of `CuMoPipeline.from_pretrained`: `device`, `dtype`, `quantization`, ...

    Raises:
        ValueError: an argument or the checkpoint does not fit.
    """

    INTERLEAVE = True  # text and any number of pictures, in any order
    allowed_types = ["text", "image"]

    def __init__(self, model_path: str, max_new_tokens: int = 1024, temperature: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.options = GenerationOptions(max_new_tokens=max_new_tokens, temperature=temperature, seed=0)
        self.pipeline = CuMoPipeline.from_pretrained(model_path, **options)

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:  # noqa: ARG002
        """The answer to a message."""
        return self._answer([{"role": "user", "content": content_of(message)}])

    def chat_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:  # noqa: ARG002
        """The answer to the last turn of a conversation."""
        return self._answer([{"role": turn["role"], "content": content_of(turn["content"])} for turn in message])

    def _answer(self, conversation: list[dict[str, Any]]) -> str:
        (completion,) = self.pipeline.generate([conversation], self.options)
        return completion.text


def register(name: str, model_path: str, **options: Any) -> None:
    """Let VLMEvalKit's `--model NAME` mean this checkpoint.

    Args:
        name: not one that VLMEvalKit has already.
        model_path: see `CuMo`.
        options: see `CuMo`.

    Raises:
        ValueError: the name is taken.
    """
    from vlmeval.config import supported_VLM

    if name in supported_VLM:
        raise ValueError(f"name: expected one that VLMEvalKit does not have, got {name!r}")
    supported_VLM[name] = partial(CuMo, model_path=model_path, **options)
