# SPDX-License-Identifier: Apache-2.0
"""CuMo as a model of lmms-eval: `--model cumo --model_args pretrained=FOLDER`.

lmms-eval finds it through this package's entry point `cumo` in the group `lmms_eval.models`, if both are installed in
one environment. Written against lmms-eval 0.7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cumo.inference import CuMoPipeline, GenerationOptions

if TYPE_CHECKING:
    from lmms_eval.api.instance import GenerationResult, Instance
    from lmms_eval.models.registry_v2 import ModelManifest

DEFAULT_NEW_TOKENS = 1024  # the default of lmms-eval's other models
# Settings of a task that `GenerationOptions` can express.
_KNOWN = ("max_new_tokens", "temperature", "top_p", "until", "do_sample", "num_beams")


def manifest() -> ModelManifest:
    """Return the manifest that the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="cumo", chat_class_path="cumo.integrations.lmms_eval_model.CuMoChat")


def options_of(settings: dict[str, Any]) -> GenerationOptions:
    """Convert a task's generation settings to `GenerationOptions`.

    Raises:
        ValueError: a setting is unknown, or asks for something that CuMo's pipeline does not do.
    """
    unknown = sorted(set(settings) - set(_KNOWN))
    if unknown:
        raise ValueError(f"generation_kwargs: expected keys of {list(_KNOWN)}, got {unknown}")
    if settings.get("num_beams") not in (None, 1):
        raise ValueError(f"generation_kwargs: num_beams: expected 1, got {settings['num_beams']!r}")
    until = settings.get("until") or ()
    sampled = settings.get("do_sample", (settings.get("temperature") or 0) > 0)
    return GenerationOptions(
        max_new_tokens=settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS,
        temperature=float(settings.get("temperature") or 1.0) if sampled else 0.0,
        top_p=1.0 if settings.get("top_p") is None else float(settings["top_p"]),
        stop=[until] if isinstance(until, str) else list(until),
        seed=0,
    )


def conversation_of(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Convert a conversation of lmms-eval's chat protocol to the form that `CuMoPipeline` takes.

    Raises:
        ValueError: `messages` holds something other than text and pictures.
    """
    from lmms_eval.protocol import ChatMessages

    chat = ChatMessages(messages=messages)
    _, videos, audios = chat.extract_media()
    if videos or audios:
        raise ValueError(f"messages: expected text and pictures, got {len(videos)} videos and {len(audios)} sounds")
    conversation: list[dict[str, Any]] = chat.to_hf_messages()
    return conversation


def answer(
    pipeline: CuMoPipeline,
    requests: Sequence[Instance],
    documents: Callable[[str, str, int], Any],
    batch_size: int,
    progress: Callable[[int], object],
) -> list[GenerationResult]:
    """Answer lmms-eval's requests and return the answers in their order. Requests with equal settings share batches.

    Args:
        pipeline: the pipeline that answers.
        requests: requests with the arguments (context, doc_to_messages, generation_kwargs, doc_id, task, split).
        documents: function that returns the document of (task, split, doc_id).
        batch_size: number of conversations in a call of the pipeline.
        progress: called with the number of requests that were just answered.
    """
    from lmms_eval.api.instance import GenerationResult, TokenCounts

    groups: dict[GenerationOptions, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(options_of(dict(request.args[2])), []).append(index)
    results: dict[int, GenerationResult] = {}
    for options, members in groups.items():
        for begin in range(0, len(members), batch_size):
            batch = members[begin : begin + batch_size]
            conversations = []
            for index in batch:
                _, to_messages, _, doc_id, task, split = requests[index].args
                conversations.append(conversation_of(to_messages(documents(task, split, doc_id))))
            for index, completion in zip(batch, pipeline.generate(conversations, options), strict=True):
                counts = TokenCounts(completion.prompt_tokens, completion.completion_tokens)
                results[index] = GenerationResult(completion.text, counts)
            progress(len(batch))
    return [results[index] for index in range(len(requests))]
