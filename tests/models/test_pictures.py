# SPDX-License-Identifier: Apache-2.0
"""Pictures with a flaw that is none of the picture's, and those that would grow beyond memory."""

import io

import numpy as np
import pytest
from PIL import Image

from cumo.data.pixels import PixelReader
from cumo.models.pictures import MAX_PIXELS, check_extent, read_rgb, to_rgb
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
