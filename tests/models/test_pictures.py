# SPDX-License-Identifier: Apache-2.0
"""Pictures with a flaw that is none of the picture's, and those that would grow beyond memory."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cumo.data.pixels import PixelReader
from cumo.models.pictures import MAX_PIXELS, check_extent, pad_to_square, read_rgb, to_rgb
from cumo.models.processor import clip_image_processor
from tests.data.samples import byte_processor

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))


def stored(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return io.BytesIO(file.getvalue())


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_as_pillow_has_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = read_rgb(stored(NOISE, exif=exif), "it")
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
    turn = {**turns, 7: "TRANSVERSE", 8: "ROTATE_90"}.get(orientation)
    expected = NOISE if turn is None else NOISE.transpose(Image.Transpose[turn])
    for image in (read, to_rgb(read)):  # once is enough
        assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells of damaged metadata
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff", b""])
def test_damaged_metadata_do_not_cost_the_picture(exif):
    read = read_rgb(stored(NOISE, exif=exif), "it")
    assert np.array_equal(np.asarray(read), np.asarray(NOISE))


def test_metadata_that_cannot_be_written_again():
    """Turning a picture must not need what else its metadata hold."""
    tiff = (
        b"II*\0\x08\0\0\0\x02\0" + b"\x12\x01\x03\0\x01\0\0\0\x03\0\0\0" + b"\x00\x90\x02\0\x04\0\0\0abcd" + b"\0" * 4
    )
    read = read_rgb(stored(NOISE, exif=b"Exif\0\0" + tiff), "it")
    assert np.array_equal(np.asarray(read), np.asarray(NOISE.transpose(Image.Transpose.ROTATE_180)))


def test_palettes_with_degrees_of_transparency_warn_of_nothing():
    image = NOISE.quantize(16)
    image.info["transparency"] = bytes(range(16))
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(NOISE.quantize(16).convert("RGB")))


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", stored(NOISE).getvalue()[:60], b"GIF89a" + b"\xff" * 30]
)
def test_damaged_files_are_named(content, tmp_path):
    path = tmp_path / "a b.png"
    path.write_bytes(content)
    for way in (to_rgb, lambda path: read_rgb(path, f"picture {str(path)!r}")):
        with pytest.raises(ValueError, match="a b.png.*cannot be decoded"):
            way(path)


def test_paths_that_are_none(tmp_path):
    with pytest.raises(IsADirectoryError, match="test_paths"):
        read_rgb(tmp_path, "it")
    with pytest.raises(FileNotFoundError, match="absent.png"):
        read_rgb(tmp_path / "absent.png", "it")
    with pytest.raises(ValueError, match="it: expected a path, got one with a NUL character"):
        read_rgb(tmp_path / "a\0b", "it")


def test_more_pixels_than_pillow_trusts(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    with pytest.raises(ValueError, match="it: cannot be decoded"):
        read_rgb(stored(NOISE), "it")


def test_pictures_that_would_grow_beyond_memory():
    """They are refused before anything of that size is made: neither would fit into this machine."""
    long = Image.new("RGB", (60_000, 1))
    for pad, word in ((True, "padding"), (False, "scaling")):
        reader, processor = PixelReader(clip_image_processor(336, pad), pad), clip_image_processor(336, pad)
        for way in (lambda: reader([long]), lambda: whole(images=[long])):  # noqa: B023
            whole = byte_processor()
            whole.image_processor = processor
            with pytest.raises(ValueError, match=f"got 60000 x 1, of which {word} makes"):
                way()
    check_extent(Image.new("1", (int(MAX_PIXELS**0.5), 1)), 336, True)
    check_extent(Image.new("1", (4000, 1)), 336, False)


PIXELS = np.asarray(NOISE)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.transpose(2, 0, 1),
        torch.from_numpy(PIXELS.copy()),
        torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
        np.concatenate([PIXELS, PIXELS[..., :1]], axis=-1),
        np.concatenate([PIXELS, PIXELS[..., :1]], axis=-1).transpose(2, 0, 1),
    ],
    ids=["channels first", "tensor", "tensor with channels first", "four channels", "four channels first"],
)
def test_arrays_and_tensors_with_channels_last_or_first(array):
    assert np.array_equal(np.asarray(to_rgb(array)), PIXELS)


def test_channels_are_last_where_both_would_fit():
    array = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert np.array_equal(np.asarray(to_rgb(array)), array)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.float32), "got array of float32"),
        (torch.zeros(3, 4, 4), "got tensor of torch.float32"),
        (np.zeros((5, 4, 2), np.uint8), r"\[3 or 4, H, W\], got \[5, 4, 2\]"),
        (torch.zeros(5, dtype=torch.uint8), r"got \[5\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got \[0, 4, 3\]"),
    ],
)
def test_arrays_that_are_no_picture(array, message):
    with pytest.raises(ValueError, match=f"images: expected .*{message}"):
        to_rgb(array)


def test_floats_are_scaled_and_not_cut_off():
    grey = np.asarray(NOISE.convert("L"))
    for values in (grey.astype(np.float32), grey.astype(np.float32) / 255):
        read = to_rgb(Image.fromarray(values))
        assert np.array_equal(np.asarray(read), np.repeat(grey[..., None], 3, axis=-1))
    assert np.asarray(to_rgb(Image.fromarray(np.full((2, 2), 0.8, np.float32)))).max() == 204
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    assert np.array_equal(np.asarray(to_rgb(sixteen))[..., 0], grey)


@pytest.mark.parametrize("value", [-0.5, 256.0, float("nan"), float("inf")])
def test_floats_of_another_range_are_refused(value):
    with pytest.raises(ValueError, match="images: expected numbers of 0 to 1 or 0 to 255 in a picture of mode F, got"):
        to_rgb(Image.fromarray(np.array([[0.5, value]], np.float32)))


@pytest.mark.parametrize("text", ["<image>\nWhat is this?", "What", "absent file.png", "a=b"])
def test_a_prompt_in_the_place_of_a_picture(text):
    with pytest.raises(ValueError, match="images: expected the path of a file, .*; a prompt is given as text="):
        to_rgb(text)


def test_padding_to_a_square():
    padded = np.asarray(pad_to_square(NOISE, (1, 2, 3)))
    assert padded.shape == (12, 12, 3) and np.array_equal(padded[2:10], PIXELS)
    assert (padded[:2] == (1, 2, 3)).all() and (padded[10:] == (1, 2, 3)).all()
    square = NOISE.crop((0, 0, 8, 8))
    assert pad_to_square(square, (1, 2, 3)) is square
