# SPDX-License-Identifier: Apache-2.0
"""Tokenizer and processor: ids against SentencePiece itself, pictures of every kind, batches, saving and loading."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoProcessor, AutoTokenizer, LlavaImageProcessorPil, PreTrainedTokenizerFast

from cumo.models.pictures import to_rgb
from cumo.models.processor import CuMoProcessor, clip_image_processor
from cumo.models.prompts import encode, render, render_text
from cumo.models.tokenizer import IMAGE_TOKEN, mistral_tokenizer

WORDS = ["<s>", "</s>", "<unk>", "a", "b", "what", "is", "this", "[", "]", "INST", "/", "\n"]
TEXTS = [
    "",
    " ",
    "Hello world",
    " leading",
    "   three leading",
    "trailing  ",
    "a  b   c    d     e" + " " * 17 + "f" + " " * 40,
    "line\nline\n\nline\n",
    "\n\n  indented\n\tand a tab",
    "naïve café, Ünïcödé, 画像に何が写っていますか？",
    "🐱 and 👩‍👩‍👧, \u0000\u0001 \U0010ffff",
    "\u2581literal\u2581\u2581marks ",
    "no-break\u00a0space, ideographic\u3000space",
    "def f(x):\n    return x  # 1234567.89\n",
    "<0x0A> and <0x41> and <unk>ed",
    "[INST] [/INST] <<SYS>>",
]


@pytest.fixture(scope="module")
def model_file():
    pytest.importorskip("sentencepiece", reason="reading a tokenizer.model needs sentencepiece")
    spec = find_spec("mistral_common")
    if spec is None:
        pytest.skip("the tokenizer.model of Mistral comes with mistral_common, which is not installed")
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def mistral(model_file):
    return mistral_tokenizer(model_file)


@pytest.fixture
def tokenizer():
    """A tokenizer of a few words, for which nothing has to be installed."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


@pytest.fixture
def processor(tokenizer):
    return CuMoProcessor(clip_image_processor(28), tokenizer, image_seq_length=4)


def picture(height=20, width=30, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def random_texts(count):
    """Texts of letters that SentencePiece joins, spaces and characters that it does not know, the same each time."""
    draw = np.random.default_rng(0)
    alphabet = list("etaoin shrdlu  \n.,:0123<>[]éß") + ["\u2581", "猫", "🐱", "  ", "the", " in", "ing "]
    return ["".join(draw.choice(alphabet, draw.integers(1, 40))) for _ in range(count)]


def test_ids_are_those_of_sentencepiece(mistral, model_file):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in [text for text in TEXTS if "<unk>" not in text] + random_texts(1000):
        assert mistral(text)["input_ids"] == [reference.bos_id(), *reference.encode(text)], repr(text)


def test_control_pieces_are_never_merged_from_text(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="training a tokenizer.model needs sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["then there the theme he she other that"] * 50),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["the"],
        vocab_size=300,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    reference, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), mistral_tokenizer(path)
    for text in ["then the theme", "xthe", "other"]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)


def test_texts_come_back(mistral):
    for text in ["Hello world", "a  b   c", "line\nline\n", "画像に何が 🐱"]:
        assert mistral.decode(mistral(text)["input_ids"], skip_special_tokens=True) == text


def test_the_image_token_cuts_a_text_in_two(mistral):
    size = len(mistral)
    ids = mistral(f"[INST] {IMAGE_TOKEN}\nWhat")["input_ids"]
    left, right = (mistral(text, add_special_tokens=False)["input_ids"] for text in ("[INST] ", "\nWhat"))
    assert ids == [mistral.bos_token_id, *left, size - 1, *right]


def test_a_tokenizer_saved_and_reloaded_is_the_same(mistral, tmp_path):
    mistral.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.padding_side == "left"
    for text in [*TEXTS, *random_texts(100), f"<s>[INST] {IMAGE_TOKEN}\nhi [/INST] a </s>"]:
        assert reloaded(text)["input_ids"] == mistral(text)["input_ids"], repr(text)


def test_no_tokenizer_model(tmp_path):
    pytest.importorskip("sentencepiece", reason="reading a tokenizer.model needs sentencepiece")
    with pytest.raises(ValueError, match="path: expected a SentencePiece tokenizer.model, got"):
        mistral_tokenizer(tmp_path / "tokenizer.model")


def test_chat_ids_equal_those_of_the_prompts(mistral):
    processor = CuMoProcessor(clip_image_processor(28), mistral, image_seq_length=1)
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "Why?"}]}]
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\nWhy?"}]
    expected = encode(mistral, render("mistral_instruct_system", turns), processor.image_token_id).input_ids
    assert expected[:2] == [mistral.bos_token_id] * 2
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    for text in (processor.apply_chat_template(messages), render_text("mistral_instruct_system", turns)):
        assert processor(picture(), text)["input_ids"] == [expected]


def test_chat_of_other_parts_is_refused(processor):
    with pytest.raises(Exception, match="expected parts of type text or image, got video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])
    with pytest.raises(Exception, match="expected user and assistant in turns, got assistant as message 1"):
        processor.apply_chat_template([{"role": "assistant", "content": "a"}])


def test_batch_of_none_one_and_two_pictures(processor):
    texts = [f"{IMAGE_TOKEN} what {IMAGE_TOKEN} is", "this", f"{IMAGE_TOKEN} a b"]
    pictures = [picture(20, 30, 1), picture(50, 10, 2), picture(28, 28, 3)]
    batch = processor([pictures[:2], [], pictures[2:]], texts, padding=True, return_tensors="pt")
    image, word = processor.image_token_id, {name: index for index, name in enumerate(WORDS)}
    rows = [
        [0, *[image] * 4, word["what"], *[image] * 4, word["is"]],
        [0, word["this"]],
        [0, *[image] * 4, word["a"], word["b"]],
    ]
    longest = max(map(len, rows))
    assert batch["input_ids"].tolist() == [[word["<unk>"]] * (longest - len(row)) + row for row in rows]
    assert batch["attention_mask"].tolist() == [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    alone = [processor(image, IMAGE_TOKEN, return_tensors="pt")["pixel_values"] for image in pictures]
    assert torch.equal(batch["pixel_values"], torch.cat(alone))
    assert batch["pixel_values"].dtype == torch.float32
    flat = processor(pictures, texts, padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], flat[name]) for name in batch)


def test_text_only(processor):
    batch = processor(text=["a", "a b"], padding=True, return_tensors="pt")
    assert set(batch) <= set(processor.model_input_names)
    assert "pixel_values" not in batch


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images: sample 0: expected 1 for as many <image> in its text, got 0"),
        ([1], "images: sample 1: expected 1 for as many <image> in its text, got 0"),
        ([1, 2, 3], "images: sample 1: expected 1 for as many <image> in its text, got 2"),
        ([[1, 2], []], "images: sample 0: expected 1 for as many <image> in its text, got 2"),
        ([[1], []], "images: sample 1: expected 1 for as many <image> in its text, got 0"),
        ([[1, 2]], "images: expected 2 lists for 2 prompts, got 1"),
    ],
    ids=["none", "too-few", "too-many", "two-in-the-first", "none-in-the-second", "too-few-lists"],
)
def test_number_of_pictures(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images, [f"{IMAGE_TOKEN} a", f"{IMAGE_TOKEN} b"])


def test_truncation_must_not_cut_into_a_picture(processor):
    with pytest.raises(ValueError, match="text: sample 0: expected 4 placeholders of pictures, got 2"):
        processor(picture(), f"a {IMAGE_TOKEN}", truncation=True, max_length=4)
    assert len(processor(picture(), f"{IMAGE_TOKEN} a b a b", truncation=True, max_length=6)["input_ids"][0]) == 6


def test_padding_has_the_mean_colour_on_both_sides(processor):
    pixels = processor(picture(28, 14), IMAGE_TOKEN, return_tensors="pt")["pixel_values"][0]
    assert pixels[..., :7].abs().max() < 0.02 and pixels[..., 21:].abs().max() < 0.02
    assert pixels[..., 7:21].abs().mean() > 0.5


@pytest.mark.parametrize("pad", [True, False], ids=["padded", "cropped"])
def test_other_backends_give_way_to_pil(tokenizer, pad):
    class LlavaImageProcessor(LlavaImageProcessorPil):
        backend = "torchvision"

    other = LlavaImageProcessor.from_dict(clip_image_processor(28, pad=pad).to_dict())
    processor = CuMoProcessor(other, tokenizer, image_seq_length=4)
    assert processor.image_processor.backend == "pil"
    expected = clip_image_processor(28, pad=pad)(picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(picture(), IMAGE_TOKEN, return_tensors="pt")["pixel_values"], expected)


def test_high_resolution_is_taken_from_the_original(tokenizer):
    processor = CuMoProcessor(clip_image_processor(28), tokenizer, image_seq_length=4, high_resolution_size=84)
    image = picture(84, 84)
    batch = processor(image, IMAGE_TOKEN, return_tensors="pt")
    (large,) = batch["pixel_values_large"]
    expected = clip_image_processor(84)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(large, expected)
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    moved = batch.to(torch.float64)
    assert moved["pixel_values"].dtype == moved["pixel_values_large"][0].dtype == torch.float64
    assert set(batch) <= set(processor.model_input_names)
    assert "pixel_values_large" not in processor(text="a")


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def opaque(mode):
    """The picture `GREY` in another mode."""
    return Image.fromarray(GREY).convert(mode)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(lambda: Image.fromarray(GREY), id="greyscale"),
        pytest.param(lambda: opaque("LA"), id="greyscale-and-alpha"),
        pytest.param(lambda: opaque("RGBA"), id="RGBA"),
        pytest.param(lambda: opaque("P"), id="palette"),
        pytest.param(lambda: opaque("RGB").convert("CMYK"), id="CMYK"),
        pytest.param(lambda: Image.fromarray(GREY.astype(np.uint16) * 257), id="16-bit"),
        pytest.param(lambda: Image.fromarray(GREY.astype(np.int32) * 257), id="16-bit-in-32"),
        pytest.param(lambda: Image.fromarray(GREY.astype(np.int32)), id="8-bit-in-32"),
        pytest.param(lambda: GREY, id="array"),
        pytest.param(lambda: np.stack([GREY] * 3, axis=-1), id="array-of-three-channels"),
    ],
)
def test_every_kind_of_picture_becomes_rgb(processor, image):
    rgb = to_rgb(image())
    assert rgb.mode == "RGB"
    assert np.array_equal(np.asarray(rgb), np.stack([GREY] * 3, axis=-1))
    assert processor(image(), IMAGE_TOKEN, return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)


@pytest.mark.parametrize(("width", "height"), [(30, 20), (20, 30), (28, 28), (1, 1), (300, 7), (7, 301), (57, 56)])
@pytest.mark.parametrize("high_resolution_size", [None, 56])
def test_padding_is_that_of_transformers(tokenizer, width, height, high_resolution_size):
    """Pictures are padded and scaled without its copies, to the same pixels."""
    image_processor = clip_image_processor(28)
    processor = CuMoProcessor(image_processor, tokenizer, image_seq_length=4, high_resolution_size=high_resolution_size)
    image = picture(height, width)
    batch = processor(images=image, return_tensors="pt")
    expected = image_processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=0)
    if high_resolution_size is not None:
        size = {"shortest_edge": 56}, {"height": 56, "width": 56}
        expected = image_processor(image, size=size[0], crop_size=size[1], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(batch["pixel_values_large"][0], expected, rtol=0, atol=0)


def test_pictures_are_turned_upright(tmp_path):
    image, exif = picture(4, 6), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    for turned in (tmp_path / "turned.png", str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png")):
        assert np.array_equal(np.asarray(to_rgb(turned)), np.asarray(upright))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "images: expected PIL images, paths, addresses or uint8 arrays, got int"),
        (np.zeros((4, 4)), "got array of float64"),
        (np.zeros((2, 4, 5), dtype=np.uint8), r"expected arrays of shape \[H, W\], .*, got \[2, 4, 5\]"),
    ],
    ids=["number", "floats", "no-channels"],
)
def test_what_is_no_picture(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(image)


def test_number_of_tokens(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (300, 5)])
    assert (data.num_image_tokens, data.num_image_patches) == ([4, 4], [1, 1])
    batch = processor(picture(), f"a {IMAGE_TOKEN}", return_mm_token_type_ids=True)
    assert batch["mm_token_type_ids"] == [[0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("load", [CuMoProcessor, AutoProcessor], ids=["CuMoProcessor", "AutoProcessor"])
def test_saved_and_reloaded(tokenizer, tmp_path, load):
    processor = CuMoProcessor(
        clip_image_processor(28), tokenizer, image_seq_length=3, high_resolution_size=56, chat_template="{{ 'a' }}"
    )
    processor.save_pretrained(tmp_path)
    reloaded = load.from_pretrained(tmp_path)
    assert isinstance(reloaded, CuMoProcessor)
    assert reloaded.image_processor.backend == "pil"
    assert reloaded.chat_template == "{{ 'a' }}"
    actual, expected = (p(picture(), f"{IMAGE_TOKEN} a b", return_tensors="pt") for p in (reloaded, processor))
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["image_seq_length", "high_resolution_size"])
def test_bad_arguments(tokenizer, name):
    with pytest.raises(ValueError, match=f"{name}: expected a positive integer, got 0"):
        CuMoProcessor(clip_image_processor(28), tokenizer, **{name: 0})


def test_a_tokenizer_is_needed():
    with pytest.raises(ValueError, match="tokenizer: expected a tokenizer with the special token <image>, got None"):
        CuMoProcessor(clip_image_processor(28))


def test_pictures_in_one_array(processor):
    arrays = np.stack([np.asarray(picture(seed=seed)) for seed in (0, 1)])
    expected = processor([picture(seed=0), picture(seed=1)], IMAGE_TOKEN * 2, return_tensors="pt")
    for images in (arrays, torch.from_numpy(arrays), torch.from_numpy(arrays).permute(0, 3, 1, 2)):
        assert torch.equal(
            processor(images, IMAGE_TOKEN * 2, return_tensors="pt")["pixel_values"], expected.pixel_values
        )


def test_a_prompt_as_first_argument(processor):
    with pytest.raises(ValueError, match="a prompt is given as text="):
        processor(f"{IMAGE_TOKEN} a")


def test_tokenizer_without_the_image_token():
    names = {"bos_token": "<s>", "unk_token": "<unk>"}
    backend = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="tokenizer: expected one with the special token <image>"):
        CuMoProcessor(clip_image_processor(28), PreTrainedTokenizerFast(tokenizer_object=backend, **names))
