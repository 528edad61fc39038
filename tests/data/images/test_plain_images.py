"""The fast decoders give Pillow's bits, and leave to it whatever is out of the ordinary."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from sdxl_trainer.data.images.plain_images import decode_plain

RGB = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8).repeat(3, 0)
IMAGE = Image.fromarray(RGB)


def encode(form: str, image: Image.Image = IMAGE, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def turn() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


def decode(content: bytes) -> np.ndarray | None:
    return decode_plain(content, Image.open(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 60, "subsampling": "4:2:0", "progressive": True}),
        ("JPEG", {"quality": 95, "subsampling": "4:4:4", "restart_marker_rows": 1}),
        ("PNG", {}),
        ("PNG", {"compress_level": 0}),
        ("WEBP", {"quality": 80}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_the_bits_are_pillows(form: str, options: dict) -> None:
    content = encode(form, **options)
    pixels = decode(content)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def add_behind_pixels(content: bytes, kind: bytes) -> bytes:
    """A chunk before a PNG's last one."""
    stream = io.BytesIO()
    PngImagePlugin.putchunk(stream, kind, turn().tobytes()[6:])
    return content[:-12] + stream.getvalue() + content[-12:]


@pytest.mark.parametrize(
    "content",
    [
        encode("JPEG", IMAGE.convert("L")),
        encode("JPEG", IMAGE.convert("CMYK")),
        encode("JPEG", exif=turn()),
        encode("PNG", IMAGE.convert("P")),
        encode("PNG", IMAGE.convert("RGBA")),
        encode("PNG", transparency=(1, 2, 3)),
        encode("PNG", exif=turn()),
        add_behind_pixels(encode("PNG"), b"eXIf"),
        encode("WEBP", Image.merge("RGBA", [*IMAGE.split(), IMAGE.convert("L")]), lossless=True),
        encode("WEBP", exif=turn()),
        encode("WEBP", save_all=True, append_images=[Image.new("RGB", IMAGE.size)]),
        encode("BMP"),
    ],
)
def test_what_is_not_plain_is_left_to_pillow(content: bytes) -> None:
    assert decode(content) is None


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_torn_images_are_left_to_pillow(form: str) -> None:
    content = encode(form)
    for share in (0.5, 0.9, 0.99):
        assert decode_plain(content[: int(share * len(content))], Image.open(io.BytesIO(content))) is None
