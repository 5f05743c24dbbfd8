# SPDX-License-Identifier: Apache-2.0
"""Pictures and prompts in, tensors for the model out. Needs Pillow and NumPy, never torchvision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, LlavaImageProcessorPil, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils.hub import cached_file

from cumo.checkpoints.files import read_json, reading
from cumo.checkpoints.published_config import is_published
from cumo.config import CuMoConfig
from cumo.models.pictures import check_extent, mean_colour, pad_to_square, to_rgb
from cumo.models.prompts import CHAT_TEMPLATE
from cumo.models.tokenizer import IMAGE_TOKEN, mistral_tokenizer


def clip_image_processor(image_size: int = 336, pad: bool = True, **options: Any) -> LlavaImageProcessorPil:
    """CLIP's preprocessing, in PIL.

    Args:
        image_size: height and width of the result.
        pad: pad pictures to squares with the mean colour first, as in all but the first published stage of training;
            otherwise their middle square is taken.
        options: further options of transformers' image processor, such as `image_mean` and `image_std`.
    """
    size = {"height": image_size, "width": image_size}
    return LlavaImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size, do_pad=pad, **options)


def _in_pil(image_processor: Any) -> Any:
    """The same preprocessing in PIL, as loading gives torchvision's, up to 0.03 off, wherever that is installed."""
    if image_processor is None or getattr(image_processor, "backend", "pil") == "pil":
        return image_processor
    options = image_processor.to_dict()
    if options.get("image_processor_type") != "LlavaImageProcessor":
        options["do_pad"] = False  # the others do not pad to squares
    return LlavaImageProcessorPil.from_dict(options)


def _is_batch(images: Any) -> bool:
    return isinstance(images, (list, tuple))


class CuMoProcessor(ProcessorMixin):
    """Tokenizer and image processor of CuMo in one.

    In a prompt, `<image>` stands for a picture; it becomes `image_seq_length` placeholder ids. Padding is on the left,
    as generation needs. A BOS is prepended unless the prompt already starts with two.

    Args:
        image_processor: a PIL image processor of transformers, such as of `clip_image_processor`.
        tokenizer: a tokenizer with `<image>` as special token, such as of `mistral_tokenizer`.
        image_seq_length: features per picture: `num_patches` of the vision configuration.
        high_resolution_size: give the pictures at this size too, as `pixel_values_large`, for an encoder with
            `high_resolution`.
        chat_template: the published `mistral_instruct_system` by default.
        kwargs: of transformers' `ProcessorMixin`.

    Raises:
        ValueError: `image_seq_length` or `high_resolution_size` is no positive integer, or `tokenizer` is None or has
            no `<image>`.

    Examples:
        >>> import numpy as np
        >>> from cumo import CuMoProcessor
        >>> processor = CuMoProcessor.from_pretrained("checkpoint")  # a folder, or a name on the hub
        >>> batch = processor(np.zeros((20, 30, 3), np.uint8), "<image>\\nWhat is this?", return_tensors="pt")
        >>> batch["pixel_values"].shape
        torch.Size([1, 3, 28, 28])
        >>> int((batch["input_ids"] == processor.image_token_id).sum()) == processor.image_seq_length
        True
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 576,
        high_resolution_size: int | None = None,
        chat_template: Any = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("image_seq_length", image_seq_length), ("high_resolution_size", high_resolution_size)):
            if not (name == "high_resolution_size" and value is None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if tokenizer is None:
            raise ValueError(f"tokenizer: expected a tokenizer with the special token {IMAGE_TOKEN}, got None")
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if image_token_id is None or image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"tokenizer: expected one with the special token {IMAGE_TOKEN}, got one without")
        tokenizer.padding_side = "left"
        self.image_seq_length = image_seq_length
        self.high_resolution_size = high_resolution_size
        self.image_token = IMAGE_TOKEN
        self.image_token_id = image_token_id
        super().__init__(
            _in_pil(image_processor),
            tokenizer,
            chat_template=CHAT_TEMPLATE if chat_template is None else chat_template,
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers; of a published model, which has no processor, the one it was trained with.

        Raises:
            ValueError: a published model without its `tokenizer.model`.
        """
        with reading(pretrained_model_name_or_path, "a processor: tokenizer and image processor"):
            return cls._from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _from_pretrained(cls, name: Any, **kwargs: Any) -> Any:
        hub = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "revision", "token") if key in kwargs}
        found = [
            cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
            for file in ("processor_config.json", "config.json", "tokenizer.model")
        ]
        if found[0] is not None or found[1] is None:
            return super().from_pretrained(name, **kwargs)
        published = read_json(Path(found[1]))
        if not is_published(published):
            return super().from_pretrained(name, **kwargs)
        if found[2] is None:
            raise ValueError(f"{name}: expected the tokenizer.model of a published model, found none")
        vision = CuMoConfig.from_pretrained(name, **hub).vision_config
        pad = published.get("image_aspect_ratio", "pad") == "pad"
        return cls(
            clip_image_processor(vision.encoder_config.image_size, pad=pad),
            mistral_tokenizer(found[2]),
            image_seq_length=vision.num_patches,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        return_mm_token_type_ids: bool = False,
        return_text_replacement_offsets: bool = False,
        add_special_tokens: bool = True,
        text_kwargs: dict[str, Any] | None = None,
        images_kwargs: dict[str, Any] | None = None,
        common_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model.

        Args:
            images: for one prompt a picture or a list; for several a list of lists, or all pictures one after the
                other, also as an array or tensor of four dimensions. See `to_rgb` for what counts as a picture. None
                for prompts without.
            text: a prompt or several; None for pictures alone.
            return_tensors: "pt" or "np"; lists by default.
            return_mm_token_type_ids: give `mm_token_type_ids` too, 1 for placeholders and 0 for text.
            return_text_replacement_offsets: give `text_replacement_offsets` too, as transformers has it: for each
                prompt, where its placeholders stand and what they became. vLLM asks for it.
            add_special_tokens: begin with BOS.
            text_kwargs: options of the tokenizer, as are all further ones; `padding=True` for several prompts.
            images_kwargs: options of the image processor.
            common_kwargs: options named above, as a dict.

        Raises:
            ValueError: a sample has more or fewer pictures than `<image>` in its prompt, truncation cut into one, or
                `images` holds something else, such as a prompt, which is to be given as `text`.
        """
        options = {**kwargs, **(common_kwargs or {}), **(text_kwargs or {})}
        return_tensors = options.pop("return_tensors", return_tensors)
        return_mm_token_type_ids = options.pop("return_mm_token_type_ids", return_mm_token_type_ids)
        return_offsets = options.pop("return_text_replacement_offsets", return_text_replacement_offsets)
        add_special_tokens = options.pop("add_special_tokens", add_special_tokens)
        for name in ("videos", "audio"):
            if options.pop(name, None) is not None:
                raise ValueError(f"{name}: expected None, as CuMo takes pictures and text only")
        data: dict[str, Any] = {}
        if text is None:
            flat = _flatten(images)
        else:
            texts = [text] if isinstance(text, str) else list(text)
            flat = self._match(texts, images)
            data.update(self._tokenize(texts, add_special_tokens, options))
            if return_mm_token_type_ids:
                data["mm_token_type_ids"] = [
                    [int(token == self.image_token_id) for token in row] for row in data["input_ids"]
                ]
        large = None
        if flat:
            pictures = [to_rgb(image) for image in flat]
            data["pixel_values"] = self._pixels(pictures, None, images_kwargs or {})
            if self.high_resolution_size is not None:
                large = self._pixels(pictures, self.high_resolution_size, images_kwargs or {})
        batch = BatchFeature(data, tensor_type=return_tensors)
        if return_offsets and text is not None:
            batch["text_replacement_offsets"] = [self._replacements(prompt) for prompt in texts]
        if large is not None:
            batch["pixel_values_large"] = [BatchFeature({"large": large}, tensor_type=return_tensors)["large"]]
        return batch

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt of the chat template, placeholders of its pictures included, without looking at pictures.

        As in `apply_chat_template`, the tokenizer adds a BOS only where the template wrote none.
        """
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos and prompt.startswith(bos))
        return list(self._tokenize([prompt], add_special_tokens, {})["input_ids"][0])

    def check_extent(self, picture: Image.Image, size: int | None = None, pad: bool | None = None) -> None:
        """See `cumo.models.pictures.check_extent`; size and padding by default as they are here."""
        edge = dict(self.image_processor.size).get("shortest_edge") or 1  # others go straight to their size
        pads = getattr(self.image_processor, "do_pad", False) if pad is None else pad
        check_extent(picture, size or self.high_resolution_size or edge, bool(pads))

    def _replacements(self, prompt: str) -> list[dict[str, Any]]:
        """Positions of the placeholders in a prompt, before and after they are expanded."""
        expanded = self.image_token * self.image_seq_length
        found = []
        for index, match in enumerate(re.finditer(re.escape(self.image_token), prompt)):
            begin = match.start() + index * (len(expanded) - len(self.image_token))
            new_span = (begin, begin + len(expanded))
            entry = {"type": "image", "span": match.span(), "new_span": new_span}
            found.append(entry | {"text": self.image_token, "replacement": expanded})
        return found

    def _match(self, texts: list[str], images: Any) -> list[Any]:
        """All pictures one after the other, after a check that every prompt has its own."""
        wanted = [text.count(self.image_token) for text in texts]
        if _is_batch(images) and any(_is_batch(entry) for entry in images):
            groups = [_flatten(entry) for entry in images]
            if len(groups) != len(texts):
                raise ValueError(f"images: expected {len(texts)} lists for {len(texts)} prompts, got {len(groups)}")
            given = [len(group) for group in groups]
            flat = [image for group in groups for image in group]
        else:
            flat = _flatten(images)
            given, left = [], len(flat)
            for index, count in enumerate(wanted):
                given.append(left if index == len(wanted) - 1 else min(count, left))
                left -= given[-1]
        for index, (count, expected) in enumerate(zip(given, wanted, strict=True)):
            if count != expected:
                raise ValueError(
                    f"images: sample {index}: expected {expected} for as many {self.image_token} in its text, "
                    f"got {count}"
                )
        return flat

    def _tokenize(self, texts: list[str], add_special_tokens: bool, options: dict[str, Any]) -> dict[str, Any]:
        wanted = [text.count(self.image_token) * self.image_seq_length for text in texts]
        texts = [text.replace(self.image_token, self.image_token * self.image_seq_length) for text in texts]
        bos = self.tokenizer.bos_token
        if add_special_tokens and bos:
            # The chat template writes both of the published BOS tokens; the tokenizer adds one of them again.
            texts = [text.removeprefix(bos) if text.startswith(bos * 2) else text for text in texts]
        encoding = dict(self.tokenizer(texts, add_special_tokens=add_special_tokens, **options))
        for index, (row, expected) in enumerate(zip(encoding["input_ids"], wanted, strict=True)):
            if row.count(self.image_token_id) != expected:
                raise ValueError(
                    f"text: sample {index}: expected {expected} placeholders of pictures, got "
                    f"{row.count(self.image_token_id)}; truncation must not cut into a picture"
                )
        return encoding

    def _pixels(self, pictures: list[Image.Image], size: int | None, options: dict[str, Any]) -> np.ndarray[Any, Any]:
        """[images, 3, H, H]; `size` in place of the H of the image processor."""
        options = {key: value for key, value in options.items() if key != "return_tensors"}
        for picture in pictures:
            self.check_extent(picture, size, options.get("do_pad"))
        if self._is_plain_padding(options):
            # The same steps without the copies between arrays and pictures, of which there are many: a long thin
            # picture grows by orders of magnitude before it is scaled down.
            side = size or self.image_processor.size["shortest_edge"]
            pictures = [self._square(picture, side) for picture in pictures]
            options["do_pad"] = False
        if size is not None:
            square = {"height": size, "width": size}
            by_edge = getattr(self.image_processor.size, "shortest_edge", None) or (
                "shortest_edge" in self.image_processor.size
            )
            options.update(size={"shortest_edge": size} if by_edge else square, crop_size=square)
        return np.stack(self.image_processor(pictures, **options)["pixel_values"])

    def _is_plain_padding(self, options: dict[str, Any]) -> bool:
        """Whether pictures are padded to squares and scaled, with no options in the place of the processor's."""
        processor = self.image_processor
        crop = {key: processor.crop_size[key] for key in ("height", "width")} if processor.crop_size else {}
        edge = getattr(processor.size, "shortest_edge", None) or dict(processor.size).get("shortest_edge")
        return bool(
            not options
            and getattr(processor, "do_pad", False)
            and processor.do_resize
            and edge
            and set(crop.values()) == {edge}
        )

    def _square(self, picture: Image.Image, side: int) -> Image.Image:
        """Padded with the mean colour, and scaled to `side`."""
        padded = pad_to_square(picture, mean_colour(self.image_processor))
        return padded.resize((side, side), resample=self.image_processor.resample)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:  # noqa: ARG002
        """How many placeholders pictures of these (height, width) take: all the same. vLLM asks for it."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` returns."""
        names = [*self.tokenizer.model_input_names, "pixel_values"]
        names = [name for name in names if name != "token_type_ids"]
        return names if self.high_resolution_size is None else [*names, "pixel_values_large"]


def _flatten(images: Any) -> list[Any]:
    """A list of pictures, without None, of however nested ones."""
    if images is None:
        return []
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    return [image for entry in images for image in _flatten(entry)] if _is_batch(images) else [images]


AutoProcessor.register(CuMoConfig, CuMoProcessor, exist_ok=True)
