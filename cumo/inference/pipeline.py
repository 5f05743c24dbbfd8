# SPDX-License-Identifier: Apache-2.0
"""Answer conversations with pictures: the single entry point to a trained model."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import CompileConfig

from cumo.inference.conversation import Conversation, PromptBuilder
from cumo.inference.features import FeatureCache, PreparedPicture, picture_key
from cumo.inference.loading import load
from cumo.inference.options import Completion, GenerationOptions
from cumo.inference.rows import Row, RowSampler, RowStopping
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.pictures import to_rgb
from cumo.models.processor import CuMoProcessor

DEFAULT_CACHE_BYTES = 256 << 20


class CuMoPipeline:
    """Answers conversations with a model.

    A conversation is a list of messages {"role": "system", "user" or "assistant", "content": ...}. Content is a string,
    or a list of parts {"type": "text", "text": ...} and {"type": "image", "image": ...}: a PIL image, a path, a uint8
    array or a result of `prepare_picture`. Text that would read as a control token is made ordinary text; see
    `PromptBuilder`.

    Greedy answers do not depend on the rest of the batch, on streaming or on cached features, up to the rounding of the
    model's dtype. Pictures are encoded one by one (each is many tiles, which fill a GPU), so their features do not
    depend on other pictures at all.

    Only one thread generates at a time; others wait.

    Args:
        model: the model, in the dtype and on the device where it is to run.
        processor: the model's processor.
        compile: whether to compile the decoding step. Implies `static_cache`; takes minutes at the first answer.
        static_cache: whether to keep keys and values in memory that is reserved when an answer begins.
        feature_cache_bytes: bytes for embeddings of pictures, on the model's device; 0 for no cache.

    Raises:
        ValueError: `processor` does not fit `model`.

    Examples:
        >>> from cumo.inference import CuMoPipeline, GenerationOptions
        >>> pipe = CuMoPipeline.from_pretrained("checkpoint")  # a folder of either layout, or a name on the hub
        >>> content = [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is this?"}]
        >>> conversation = [{"role": "user", "content": content}]
        >>> (completion,) = pipe.generate([conversation], GenerationOptions(max_new_tokens=4))
        >>> completion.completion_tokens
        4
        >>> "".join(pipe.stream(conversation, GenerationOptions(max_new_tokens=4))).strip() == completion.text
        True
    """

    def __init__(
        self,
        model: CuMoForConditionalGeneration,
        processor: CuMoProcessor,
        *,
        compile: bool = False,
        static_cache: bool = False,
        feature_cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        for name, expected, given in (
            ("image_token_id", model.config.image_token_id, processor.image_token_id),
            ("image_seq_length", model.config.vision_config.num_patches, processor.image_seq_length),
        ):
            if given != expected:
                raise ValueError(f"processor: expected {name}={expected} of the model, got {given}")
        self.model = model
        self.processor = processor
        self.features = FeatureCache(feature_cache_bytes)
        self._prompts = PromptBuilder(processor)
        self._compile = compile
        self._static_cache = static_cache or compile
        self._lock = threading.Lock()
        self._eos_ids = _eos_ids(model, processor)
        # No answer may hold a picture's placeholder.
        image_token_id = processor.image_token_id
        self._suppressed = [image_token_id] if image_token_id < model.config.text_config.vocab_size else []

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        quantization: str | None = None,
        compile: bool = False,
        static_cache: bool = False,
        feature_cache_bytes: int = DEFAULT_CACHE_BYTES,
        **options: Any,
    ) -> CuMoPipeline:
        """Load a model and its processor.

        Args:
            name: folder in this package's layout or the published one, or a name on the hub.
            dtype: "auto" for the dtype of the checkpoint, "float32", "bfloat16" or "float16".
            device: None for the first GPU, or the CPU where there is none.
            quantization: "int8" or "nf4" for the linear layers of the language model, except its routers and its head;
                needs bitsandbytes.
            compile: see `CuMoPipeline`.
            static_cache: see `CuMoPipeline`.
            feature_cache_bytes: see `CuMoPipeline`.
            options: further arguments of the model's `from_pretrained`: `revision`, `token`, `model_base`,
                `device_map`, `attn_implementation`, ...

        Raises:
            ValueError: an argument or the checkpoint is invalid.
            ImportError: a package that quantisation needs is not installed.
        """
        model, processor = load(name, dtype=dtype, device=device, quantization=quantization, **options)
        return cls(
            model, processor, compile=compile, static_cache=static_cache, feature_cache_bytes=feature_cache_bytes
        )

    @property
    def max_tokens(self) -> int | None:
        """Largest number of tokens of prompt and answer together; None if the language model has no limit."""
        return getattr(self.model.config.text_config, "max_position_embeddings", None)

    def generate(
        self,
        conversations: Sequence[Conversation],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
    ) -> list[Completion]:
        """Answer conversations in one batch.

        Args:
            conversations: any number of conversations.
            options: options for all of them, or one for each; `GenerationOptions()` by default.

        Raises:
            ValueError: a conversation is malformed or longer than the model's limit.
        """
        if options is None or isinstance(options, GenerationOptions):
            options = [options or GenerationOptions()] * len(conversations)
        if len(options) != len(conversations):
            raise ValueError(f"options: expected {len(conversations)}, one for each conversation, got {len(options)}")
        rows = [self.prepare(*pair) for pair in zip(conversations, options, strict=True)]
        self.run(rows)
        return [row.completion() for row in rows]

    def stream(self, conversation: Conversation, options: GenerationOptions | None = None) -> Iterator[str]:
        """Answer one conversation, piece by piece. Closing the iterator ends the answer and frees the model.

        Args:
            conversation: the conversation to answer.
            options: options of the answer; `GenerationOptions()` by default.

        Raises:
            ValueError: `conversation` is malformed or longer than the model's limit.
        """
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        row = self.prepare(conversation, options or GenerationOptions(), pieces.put)
        return self._stream(row, pieces)

    def _stream(self, row: Row, pieces: queue.SimpleQueue[Any]) -> Iterator[str]:
        def work() -> None:
            try:
                self.run([row])
                pieces.put(None)
            except BaseException as error:  # raised again in the thread that reads the pieces
                pieces.put(error)

        worker = threading.Thread(target=work, name="cumo-stream", daemon=True)
        try:
            worker.start()
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            row.cancel()
            if worker.ident is not None:  # None: it was never started
                worker.join()

    def prepare(
        self,
        conversation: Conversation,
        options: GenerationOptions,
        on_text: Callable[[str], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> Row:
        """Prepare a row for `run`: check the conversation, tokenise its prompt, prepare its pictures for the encoder.

        Args:
            conversation: the conversation to answer.
            options: options of the answer.
            on_text: called with each piece of the answer, in the thread that runs the model.
            on_end: called in that thread once the answer has ended; other rows of the batch may still go on.

        Raises:
            ValueError: `conversation` is malformed or longer than the model's limit.
        """
        prompt = self._prompts.build(conversation)
        ids = self.processor.prompt_ids(prompt.text)
        room = options.max_new_tokens if self.max_tokens is None else self.max_tokens - len(ids)
        if room < 1:
            raise ValueError(
                f"messages: expected a prompt below the {self.max_tokens} tokens of the model, got {len(ids)}"
            )
        pictures = [self.prepare_picture(image) for image in prompt.images]
        row = Row(ids, pictures, options, self.processor.tokenizer, on_text, on_end)
        row.max_new_tokens = min(row.max_new_tokens, room)
        return row

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> None:
        """Answer rows from `prepare` in one batch. Cancelled rows end at the next token."""
        if not rows:
            return
        with self._lock:
            embeddings, mask = self._embed(rows)
            model: Any = self.model
            model.generate(
                inputs_embeds=embeddings,
                attention_mask=mask,
                generation_config=self._generation_config(max(row.max_new_tokens for row in rows)),
                logits_processor=LogitsProcessorList([RowSampler(rows, self._suppressed)]),
                stopping_criteria=StoppingCriteriaList([RowStopping(rows, self._eos_ids)]),
            )

    def exclusive(self) -> AbstractContextManager[Any]:
        """Return a lock as a context manager, for callers that use parts of the model themselves."""
        return self._lock

    def prepare_picture(self, image: Any) -> PreparedPicture:
        """Return a picture in the encoder's form, or its embeddings if they are in the cache.

        Args:
            image: a PIL image, the path of a file, a uint8 array, or a result of this method.

        Raises:
            ValueError: `image` is none of these.
        """
        if isinstance(image, PreparedPicture):
            return image
        # A string is a path, never an address.
        if isinstance(image, (str, os.PathLike)) and not os.path.isfile(image):
            raise ValueError(f"image: expected a picture or the path of a file, got {str(image)[:200]!r}")
        picture = to_rgb(image)
        key = picture_key(picture)
        found = self.features.get(key)
        return PreparedPicture(key, found, self.pixels(picture) if found is None else {})

    def pixels(self, picture: Image.Image) -> dict[str, Any]:
        """Return the vision encoder's input for an RGB picture, on the CPU in float32."""
        batch = self.processor(images=[picture], return_tensors="pt")
        return {name: batch[name] for name in ("pixel_values", "pixel_values_large") if name in batch}

    def on_device(self, pixels: dict[str, Any]) -> dict[str, Any]:
        """Return `pixels` in the dtype and on the device of the encoder."""
        weight: Any = self.model.vision_tower.get_input_embeddings().weight

        def moved(value: Any) -> Any:
            return [moved(each) for each in value] if isinstance(value, list) else value.to(weight.device, weight.dtype)

        return {name: moved(value) for name, value in pixels.items()}

    def picture_embeddings(self, picture: PreparedPicture) -> Tensor:
        """Return a picture's embeddings [patches, LLM width], from the cache if they are there."""
        found = picture.embeddings if picture.embeddings is not None else self.features.peek(picture.key)
        if found is None:
            features = self.model.get_image_features(**self.on_device(picture.pixels))
            assert features.embeddings is not None
            found = features.embeddings[0]
            self.features.put(picture.key, found)
        return found

    def _embed(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return the embeddings [B, L, D] of the prompts and their mask [B, L], padded on the left."""
        longest = max(len(row.prompt_ids) for row in rows)
        padding = [longest - len(row.prompt_ids) for row in rows]
        ids = torch.tensor([[0] * pad + list(row.prompt_ids) for pad, row in zip(padding, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * len(row.prompt_ids) for pad, row in zip(padding, rows, strict=True)])
        table: Any = self.model.get_input_embeddings()
        device = table.weight.device
        features = [self.picture_embeddings(picture) for row in rows for picture in row.pictures]
        stacked = torch.stack(features).to(device) if features else None  # the model may be spread over several devices
        return self.model.embed(ids.to(device), stacked), mask.to(device)

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        pad = self.processor.tokenizer.pad_token_id
        usable = pad is not None and pad < self.model.config.text_config.vocab_size
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(self._eos_ids) or None,
            pad_token_id=pad if usable else next(iter(sorted(self._eos_ids)), 0),
            use_cache=True,
            cache_implementation="static" if self._static_cache else None,
            disable_compile=not self._compile,
        )
        if self._compile:
            # No CUDA graphs: they keep one set of buffers, and batches come in many sizes.
            config.compile_config = CompileConfig(mode="default", dynamic=True)
            config.compile_config._compile_all_devices = True
        return config


def _eos_ids(model: CuMoForConditionalGeneration, processor: CuMoProcessor) -> frozenset[int]:
    """Return the tokens that end an answer: those of the generation configuration, and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ids, processor.tokenizer.eos_token_id] if token is not None)
