"""Images: decoded as a viewer shows them, cropped to their bucket, and refused with a reason if they are bad."""

import hashlib
import io
import resource
import struct
import threading
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, JpegImagePlugin, features

from sdxl_trainer.data.images.bucket import BucketRule, Placement, list_buckets
from sdxl_trainer.data.images.transforms import (
    DECODE_ERRORS,
    BadImageError,
    decode_image,
    decode_rgb,
    prepare_image,
    read_image_size,
    resize_and_crop,
)

RULE = BucketRule(resolution_px=128, min_px=64, max_px=256, step_px=32)
BUCKETS = list_buckets(RULE)
RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode(image: Image.Image, file_format: str = "PNG", **options) -> np.ndarray:
    decoded = decode_image(encode(image, file_format, **options))
    assert decoded.mode == "RGB"
    return np.asarray(decoded)


def draw_quarters() -> Image.Image:
    """Return an image of 60x40 px with a colour in each quarter: red, green above blue, white."""
    image = Image.new("RGB", (60, 40), RED)
    image.paste(GREEN, (30, 0, 60, 20))
    image.paste(BLUE, (0, 20, 30, 40))
    image.paste(WHITE, (30, 20, 60, 40))
    return image


def get_corners(pixels: np.ndarray) -> list[tuple]:
    """Return the colours a little inside the corners: top left, top right, bottom left, bottom right."""
    return [tuple(int(value) for value in pixels[y, x]) for y in (4, -5) for x in (4, -5)]


@pytest.mark.parametrize(
    ("orientation", "corners", "size"),
    [
        (1, [RED, GREEN, BLUE, WHITE], (60, 40)),
        (2, [GREEN, RED, WHITE, BLUE], (60, 40)),
        (3, [WHITE, BLUE, GREEN, RED], (60, 40)),
        (6, [BLUE, RED, WHITE, GREEN], (40, 60)),
        (8, [GREEN, WHITE, RED, BLUE], (40, 60)),
    ],
)
def test_exif_rotation_is_applied(tmp_path, orientation, corners, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.png"
    path.write_bytes(encode(draw_quarters(), exif=exif))
    prepared = prepare_image(path, RULE, BUCKETS)
    assert prepared.original_size == size
    assert get_corners(prepared.pixels) == corners
    assert (prepared.placement.bucket[0] > prepared.placement.bucket[1]) == (size[0] > size[1])


def test_transparent_areas_become_white():
    image = Image.new("RGBA", (4, 4), (*RED, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    assert decode(image)[0].tolist() == [[255] * 3, [127] * 3, list(RED), list(RED)]
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((0, 0), (0, 0))
    assert decode(grey)[0].tolist() == [[255] * 3, [0] * 3]


def test_palettes_with_and_without_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    assert decode(image)[0].tolist() == [list(RED), list(BLUE)]
    assert decode(image, transparency=0)[0].tolist() == [list(WHITE), list(BLUE)]
    assert decode(image, "GIF", transparency=1)[0].tolist() == [list(RED), list(WHITE)]
    # An RGB or grey PNG may declare one colour transparent, too.
    assert decode(Image.new("RGB", (1, 1), GREEN), transparency=GREEN)[0].tolist() == [list(WHITE)]
    assert decode(Image.new("L", (1, 1), 9), transparency=9)[0].tolist() == [list(WHITE)]


def test_other_colour_modes():
    assert decode(Image.new("L", (1, 1), 77))[0, 0].tolist() == [77] * 3
    assert decode(Image.new("1", (1, 1), 1))[0, 0].tolist() == [255] * 3
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink: red
    for file_format in ("JPEG", "TIFF"):
        assert np.abs(decode(cmyk, file_format)[8, 8].astype(int) - RED).max() <= 3


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "big-endian TIFF"])
def test_16_bit_grey_keeps_its_greys(file_format):
    ramp = (np.arange(0, 65536, 256) + 200).astype(np.uint16).reshape(16, 16)
    image = Image.fromarray(ramp)
    pixels = np.asarray(
        decode_image(encode_big_endian_tiff(ramp) if "big" in file_format else encode(image, file_format))
    )
    assert pixels[..., 0].ravel().tolist() == list(range(256))
    assert (pixels == pixels[..., :1]).all()


def encode_big_endian_tiff(values: np.ndarray) -> bytes:
    """Return a TIFF of 16-bit grey as old programs write it: header, pixels, directory."""
    height, width = values.shape
    data = values.astype(">u2").tobytes()
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, height),
        (279, 4, len(data)),
    ]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in tags
    )
    return b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + struct.pack(">H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("values", [np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)])
def test_grey_of_unknown_range_is_refused(values):
    with pytest.raises(ValueError, match="32-bit grey has no known range"):
        decode_image(encode(Image.fromarray(values), "TIFF"))


def build_png(size: tuple[int, int], colour: int, depth: int, rows: bytes, before: dict, after: dict) -> bytes:
    """Build a PNG with chunks (kind -> content) before and after its pixels. `colour`: 0 grey, 2 RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    chunks = {b"IHDR": header, **before, b"IDAT": zlib.compress(rows), **after, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks.items())


def test_16_bit_colour_keeps_its_colours_and_transparency():
    rows = b"".join(b"\0" + struct.pack(">6H", 0x1234, 0x8000, 0xFFFF, 0, 0x00FF, 0x0100) for _ in range(2))
    png = build_png((2, 2), 2, 16, rows, {b"tRNS": struct.pack(">3H", 0x1234, 0x8000, 0xFFFF)}, {})
    decoded = decode_rgb(png)
    assert decoded.alpha is not None and decoded.alpha.tolist() == [[0, 255]] * 2
    assert np.abs(decoded.pixels[0].astype(int) - [[255, 255, 255], [0, 0, 1]]).max() <= 1
    pixels = np.asarray(decode_image(build_png((2, 2), 2, 16, rows, {}, {})))
    assert np.abs(pixels[0].astype(int) - [[0x12, 0x80, 0xFF], [0, 0, 1]]).max() <= 1


def test_16_bit_grey_keeps_its_transparency():
    shades = [0x1234, 0x1235, 0xFF00, 0]
    png = build_png((4, 1), 0, 16, b"\0" + struct.pack(">4H", *shades), {b"tRNS": struct.pack(">H", 0x1234)}, {})
    decoded = decode_rgb(png)
    assert decoded.alpha is not None and decoded.alpha.tolist() == [[0, 255, 255, 255]]
    assert decoded.pixels[0, :, 0].tolist() == [255, 0x12, 0xFF, 0]


LONG = zlib.compress(bytes(20 << 20))  # beyond the limit of texts
TEXTS = {b"zTXt": b"a\0\0" + LONG, b"iTXt": b"XML\0\1\0\0\0" + LONG, b"tEXt": b"a\0b"}


@pytest.mark.parametrize(("before", "after"), [(TEXTS, {}), ({}, TEXTS)])
def test_large_texts_of_a_png_are_dropped_and_not_its_image(tmp_path, before, after):
    png = build_png((4, 1), 0, 8, b"\0\1\2\3\4", before, after)
    assert decode_rgb(png).pixels[0, :, 0].tolist() == [1, 2, 3, 4]
    (tmp_path / "x.png").write_bytes(png)
    assert read_image_size(tmp_path / "x.png") == read_image_size(tmp_path / "x.png", exact=False) == (4, 1)
    xmp = {b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'}
    assert decode_rgb(build_png((4, 1), 0, 8, b"\0\1\2\3\4", xmp | {b"tEXt": b"a\0b"}, {})).size == (1, 4)
    for kept in range(8, 45):
        with pytest.raises(DECODE_ERRORS):
            decode_rgb(png[:kept])


def test_an_image_that_is_too_narrow_is_refused_and_otherwise_cut_before_it_is_enlarged(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(build_png((1, 1_000_000), 0, 8, b"\0\7" * 1_000_000, {}, {}))
    with pytest.raises(BadImageError, match=r"x.png: 1x1000000 px is narrower than data.max_aspect_ratio = 20 allows"):
        prepare_image(path, RULE, BUCKETS)
    prepared = prepare_image(path, replace(RULE, max_aspect_ratio=1e9), BUCKETS)  # whole, it would take 12 GB
    assert prepared.placement.resized == (64, 64_000_000) and np.all(prepared.pixels == 7)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_a_cut_gives_the_pixels_of_the_whole(mode):
    # Within these limits no pixel overshoots black or white between the two passes of a filter.
    noise = np.random.default_rng(0).integers(90, 166, (700, 7, 3), np.uint8)
    placement = Placement((64, 192), (64, 6400), 0, 3104)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    whole = np.asarray(Image.fromarray(noise).resize(placement.resized, filters[mode]))[3104:3296]
    assert np.abs(resize_and_crop(noise, placement, mode).astype(int) - whole).max() <= 1
    grey = resize_and_crop(noise[..., 0], placement, mode)
    assert np.abs(grey.astype(int) - whole[..., 0]).max() <= 1


def test_too_little_memory_names_the_image(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(encode(Image.new("RGB", (6000, 6000))))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20), limits[1]))
    try:
        with pytest.raises(BadImageError, match=f"^{path}: cannot be decoded: .*memory"):
            prepare_image(path, RULE, BUCKETS)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert prepare_image(path, RULE, BUCKETS).original_size == (6000, 6000)


def make_profile() -> bytes:
    """Return an ICC profile that swaps sRGB's red and green, so that applying it is easy to see."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_applied(mode):
    image = Image.new("RGB", (8, 8), (200, 10, 60)).convert(mode)
    plain = np.asarray(decode_image(encode(image, "PNG")))
    applied = np.asarray(decode_image(encode(image, "PNG", icc_profile=make_profile())))
    assert np.abs(plain[0, 0].astype(int) - (200, 10, 60)).max() <= (12 if mode == "P" else 0)
    assert np.abs(applied.astype(int) - plain[..., [1, 0, 2]]).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", make_profile()[:200]):  # already sRGB, or damaged
        assert np.array_equal(np.asarray(decode_image(encode(image, "PNG", icc_profile=profile))), plain)


def test_colour_profiles_are_applied_to_the_crop(tmp_path):
    image = Image.new("RGB", (300, 200), (200, 10, 60))
    (tmp_path / "x.png").write_bytes(encode(image, "PNG", icc_profile=make_profile()))
    pixels = prepare_image(tmp_path / "x.png", RULE, BUCKETS).pixels
    assert pixels.flags.c_contiguous and np.abs(pixels.astype(int) - (10, 200, 60)).max() <= 2


def test_a_profile_of_another_colour_model_is_ignored():
    grey = Image.new("L", (8, 8), 77)
    pixels = np.asarray(decode_image(encode(grey, "PNG", icc_profile=make_profile().replace(b"RGB XYZ ", b"GRAYXYZ "))))
    assert (pixels == 77).all()
    image = Image.new("CMYK", (8, 8), (10, 200, 30, 0))
    plain = np.asarray(image.convert("RGB"))
    pixels = np.asarray(decode_image(encode(image, "TIFF", icc_profile=make_profile())))
    assert np.array_equal(pixels, plain)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_used(file_format):
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    pixels = decode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert pixels[16, 16].tolist() == list(RED)


def test_a_crop_holds_the_pixels_of_its_box():
    # Red and green encode each pixel's column and row. The image is resized to a third; 64 of 100 columns are kept.
    ramp = np.zeros((150, 300, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(300)[None] * 255 // 299, np.arange(150)[:, None]
    pixels = resize_and_crop(ramp, Placement((64, 32), (100, 50), 18, 9))
    assert pixels.shape == (32, 64, 3) and pixels.dtype == np.uint8
    columns, rows = (18 + np.arange(64) + 0.5) * 3 - 0.5, (9 + np.arange(32) + 0.5) * 3 - 0.5  # centres in the original
    assert np.abs(pixels[16, :, 0] - columns * 255 / 299).max() <= 1.5
    assert np.abs(pixels[:, 32, 1] - rows).max() <= 1.0
    assert pixels[..., 2].max() == 0


@pytest.mark.parametrize("place", [(0, 0), (37, 11), (236, 118)])
def test_a_crop_without_a_resize_is_exact(place):
    noise = np.random.default_rng(0).integers(0, 256, (150, 300, 3), np.uint8)
    pixels = resize_and_crop(noise, Placement((64, 32), (300, 150), *place))
    assert np.array_equal(pixels, noise[place[1] : place[1] + 32, place[0] : place[0] + 64])


@pytest.mark.parametrize("resized", [(213, 128), (320, 192), (500, 300), (71, 43)])
def test_resizing_is_pillows_bicubic(resized):
    noise = np.random.default_rng(0).integers(0, 256, (200, 333, 3), np.uint8)
    image = Image.fromarray(noise)
    whole = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    pixels = resize_and_crop(noise, Placement((64, 32), resized, 5, 3))
    assert np.abs(pixels.astype(int) - whole[3:35, 5:69]).max() <= 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_with_nearly_the_same_pixels(tmp_path, orientation, monkeypatch):
    coarse = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.jpg"
    Image.fromarray(coarse).resize((1500, 900), Image.Resampling.BICUBIC).save(path, exif=exif, quality=95)
    prepared = prepare_image(path, RULE, BUCKETS)
    draft_sizes = []
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda image, mode, size: draft_sizes.append(size))
    whole = prepare_image(path, RULE, BUCKETS)
    assert prepared.original_size == whole.original_size == ((1500, 900) if orientation == 1 else (900, 1500))
    assert prepared.placement == whole.placement
    resized = prepared.placement.resized[:: 1 if orientation == 1 else -1]
    assert draft_sizes == [(2 * resized[0], 2 * resized[1])]
    difference = np.abs(prepared.pixels.astype(int) - whole.pixels)
    assert 0 < difference.max() <= 6 and difference.mean() < 0.6, (difference.max(), difference.mean())


def test_size_time_and_checksum_of_the_file_are_kept(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(content := encode(draw_quarters()))
    prepared = prepare_image(path, RULE, BUCKETS)
    assert prepared.pixels.shape == (*reversed(prepared.placement.bucket), 3)
    assert (prepared.source_bytes, prepared.source_mtime_ns) == (len(content), path.stat().st_mtime_ns)
    assert prepared.source_sha256 == hashlib.sha256(content).hexdigest()


def test_a_bomb_is_refused_on_every_thread(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(encode(Image.new("RGB", (100, 100))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)  # up to twice this limit Pillow itself only warns
    reasons = []

    def prepare_repeatedly() -> None:
        for _ in range(50):
            with pytest.raises(BadImageError, match="100x100 pixels are more than 9999") as caught:
                prepare_image(path, RULE, BUCKETS)
            reasons.append(str(caught.value))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=prepare_repeatedly) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(reasons) == 200
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_999)
    with pytest.raises(BadImageError, match="cannot be decoded"):
        prepare_image(path, RULE, BUCKETS)


FORMATS = [
    file_format
    for file_format, feature in (
        ("PNG", None),
        ("JPEG", "jpg"),
        ("GIF", None),
        ("WEBP", "webp"),
        ("TIFF", None),
        ("AVIF", "avif"),
    )
    if feature is None or features.check(feature)
]


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_truncated_image_is_refused_by_name(tmp_path, file_format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    content = encode(noise, file_format)
    path = tmp_path / "x"
    for kept in (0, 3, len(content) // 2):
        path.write_bytes(content[:kept])
        with pytest.raises(BadImageError, match=f"^{path}: cannot be decoded: "):
            prepare_image(path, RULE, BUCKETS)


@pytest.mark.parametrize("name", ["absent.png", "."])
def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path, name):
    with pytest.raises(BadImageError, match="cannot be read: (No such file|Is a directory)"):
        prepare_image(tmp_path / name, RULE, BUCKETS)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "x"


EXIF = Image.Exif()
EXIF[0x0112] = 6
WHOLE = {
    file_format: encode(draw_quarters(), file_format, **({} if file_format == "GIF" else {"exif": EXIF}))
    for file_format in FORMATS
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(FORMATS), st.data())
def test_damage_at_most_makes_an_image_bad(damaged, file_format, data):
    content = bytearray(WHOLE[file_format])
    for place in data.draw(st.lists(st.integers(0, min(len(content), 400) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    damaged.write_bytes(content)
    try:
        prepared = prepare_image(damaged, RULE, BUCKETS)
    except BadImageError:
        return
    assert prepared.pixels.shape == (*reversed(prepared.placement.bucket), 3)
