"""Opening of image content with Pillow: the formats that are accepted, plug-ins, and PNG files with large texts."""

import io
import struct
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import IO

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sdxl_trainer.data.images.image_files import PLUG_INS

# Pillow's other formats are no photos or drawings, or run another program (EPS runs Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "QOI", "HEIF", "JXL")
FORMATS_WITHOUT_MARK = ("TGA",)  # tried last: its files do not begin with a mark
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK = struct.Struct(">I4s")  # length and kind; the content and 4 bytes of CRC follow
TEXT_KINDS = (b"tEXt", b"zTXt", b"iTXt")
XMP = b"XML:com.adobe.xmp\x00\x00"  # may hold the rotation; the last byte says that it is not compressed

# Pillow's limit of 1 MB refuses images with a large colour profile.
PngImagePlugin.MAX_TEXT_CHUNK = max(16 << 20, PngImagePlugin.MAX_TEXT_CHUNK)


def open_image(content: bytes) -> Image.Image:
    """Open an image; Pillow reads the header. Texts of a PNG are dropped: Pillow refuses images with large texts.

    Raises:
        UnidentifiedImageError: not an image in one of FORMATS.
        one of DECODE_ERRORS (transforms.py): the header is damaged.
    """
    return open_image_stream(io.BytesIO(drop_png_texts(content)))


def open_image_stream(stream: IO[bytes]) -> Image.Image:
    """Like `open_image`, but read only the header from a stream, and all texts before the pixels."""
    try:
        image = Image.open(stream, formats=list_formats())
    except UnidentifiedImageError:  # Pillow's own message names the buffer by its address
        stream.seek(0)
        raise UnidentifiedImageError(describe_no_image(stream.read(64))) from None
    colour = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(colour, tuple) and ";16" in str(image.tile[0][3]):
        # Pillow keeps the upper halves of 16-bit pixels, but the lower ones of the transparent colour.
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    return image


def describe_no_image(head: bytes) -> str:
    """Return what a file is that Pillow cannot open, by its first bytes."""
    if not head:
        return "the file is empty (0 bytes)"
    if head.lstrip().startswith(b"<"):
        return "a web page or a drawing (HTML, SVG), not an image of pixels: download the image itself"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not an image: run git lfs pull"
    return "not an image in a format that Pillow knows"


def drop_png_texts(content: bytes) -> bytes:
    """Return a PNG without its texts, except uncompressed XMP; other content is returned unchanged."""
    if not content.startswith(PNG_SIGNATURE) or not any(kind in content for kind in TEXT_KINDS):
        return content
    return b"".join([PNG_SIGNATURE, *_iterate_kept_chunks(memoryview(content))])


def _iterate_kept_chunks(content: memoryview) -> Iterator[memoryview]:
    """Yield the chunks of a PNG that are no texts, and whatever follows the last whole chunk."""
    start = kept = len(PNG_SIGNATURE)
    while start + CHUNK.size <= len(content):
        length, kind = CHUNK.unpack_from(content, start)
        body = start + CHUNK.size
        end = body + length + 4
        if kind in TEXT_KINDS and content[body : body + len(XMP)] != XMP:
            yield content[kept:start]
            kept = end
        start = end
    yield content[kept:]


@cache
def list_formats() -> tuple[str, ...]:
    """List the accepted formats that Pillow can open here, with its installed plug-ins."""
    for name in dict.fromkeys(PLUG_INS.values()):
        if find_spec(name) is not None:
            module = import_module(name)
            if hasattr(module, "register_heif_opener"):
                module.register_heif_opener()
    Image.init()
    return tuple(name for name in (*FORMATS, *FORMATS_WITHOUT_MARK) if name in Image.OPEN)
