"""The fast way through images that are nothing but RGB: nearly all of a set.

libjpeg-turbo, libspng and libwebp, called without Pillow around them, give the same bits in two thirds of the time, for
Pillow packs them four bytes a pixel and copies them once more. Whatever is out of the ordinary, damage too, is left to
Pillow.
"""

import struct
from collections.abc import Callable, Iterator
from functools import partial

import imagecodecs
import numpy as np
import simplejpeg
from PIL import ExifTags, Image

# `strict`: of a torn JPEG libjpeg itself only warns.
DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "JPEG": partial(simplejpeg.decode_jpeg, colorspace="RGB", strict=True),
    "PNG": imagecodecs.spng_decode,
    "WEBP": imagecodecs.webp_decode,
}
ERRORS = (ValueError, RuntimeError)  # all that these decoders raise
PNG_CHUNK = struct.Struct(">L4s")
PNG_SIGNATURE_BYTES, PNG_CRC_BYTES = 8, 4


def decode_plain(content: bytes, image: Image.Image) -> np.ndarray | None:
    """[H, W, 3] uint8 of an image, as Pillow would decode it, or None: Pillow has to.

    Args:
        image: the image opened by Pillow, not loaded, not drafted.
    """
    decode = DECODERS.get(image.format or "")
    if decode is None or image.mode != "RGB" or "transparency" in image.info or getattr(image, "is_animated", False):
        return None
    if image.format == "PNG" and not _ends_with_pixels(content):
        return None
    if Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) != 1:  # not PNG's own way, which loads the image
        return None
    try:
        pixels = decode(content)
    except ERRORS:
        return None
    return pixels if pixels.dtype == np.uint8 and pixels.shape == (image.height, image.width, 3) else None


def _ends_with_pixels(content: bytes) -> bool:
    """Whether nothing follows the pixels of a PNG, such as EXIF that turns it."""
    kinds = list(_list_chunks(content))
    return b"IDAT" in kinds and set(kinds[kinds.index(b"IDAT") :]) == {b"IDAT", b"IEND"}


def _list_chunks(content: bytes) -> Iterator[bytes]:
    place = PNG_SIGNATURE_BYTES
    while place + PNG_CHUNK.size <= len(content):
        size, kind = PNG_CHUNK.unpack_from(content, place)
        yield kind
        place += PNG_CHUNK.size + size + PNG_CRC_BYTES
