"""Latent files: round trips, files of other programs, and bad files, which are refused by name."""

import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import FIXTURES

from sdxl_trainer.data.formats.latent_header import read_latent_header
from sdxl_trainer.data.formats.latents import (
    BadLatentError,
    LatentSample,
    find_latent_file,
    pack_latents,
    parse_latents,
    read_latents,
    write_latents,
)
from sdxl_trainer.data.images.bucket import Size

LATENTS = np.random.default_rng(0).standard_normal((4, 8, 12)).astype(np.float32)
GOOD = LatentSample(latents=LATENTS, original_size=(100, 70), crop_ltrb=(1.0, 2.0, 97.0, 66.0))
NUMBERS = {"original_size": np.array([100, 70]), "crop_ltrb": np.array([1, 2, 97, 66])}


def save(path: Path, compressed: bool = False, **arrays) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def add_member(path: Path, name: str, header: str, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """Append a member to an npz, with any text as its npy header."""
    head = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr(name, head + content)
    return path


def round_as(dtype: str, values: np.ndarray) -> np.ndarray:
    """Round float32 values to a smaller type with torch, and return them as float32."""
    return torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("parts", [(), ("std",), ("flipped",), ("std", "flipped", "flipped_std")])
def test_round_trip(tmp_path, dtype, parts):
    arrays = {part: LATENTS[:, ::-1] * (number + 2) for number, part in enumerate(parts)}
    sample = LatentSample(latents=LATENTS, original_size=(1920, 1080), crop_ltrb=(10.0, 0.0, 106.0, 64.0), **arrays)
    content = write_latents(tmp_path / "x.npz", sample, dtype)
    assert (tmp_path / "x.npz").read_bytes() == content
    assert os.listdir(tmp_path) == ["x.npz"]  # no temporary file is left
    read = read_latents(tmp_path / "x.npz", (96, 64))
    assert read.dtype == dtype and read.latents.dtype == ("float32" if dtype == "bfloat16" else dtype)
    assert (read.original_size, read.crop_ltrb, read.bucket) == ((1920, 1080), (10, 0, 106, 64), (96, 64))
    for part in ("latents", "std", "flipped", "flipped_std"):
        given, found = getattr(sample, part), getattr(read, part)
        assert found is None if given is None else np.array_equal(found, round_as(dtype, given.copy())), part


def test_bfloat16_is_read_by_plain_numpy_as_documented(tmp_path):
    """The recipe of docs/CACHE.md works. A program that looks for `latents` finds none, instead of the integers."""
    # Ties go to even, and too large values become infinity, as in torch.
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1.5e-39, 3.3e38, 0.1, 0.0, -2.7], np.float32)
    write_latents(
        tmp_path / "x.npz",
        LatentSample(latents=values.repeat(4).reshape(4, 2, 4), original_size=(1, 1), crop_ltrb=(0, 0, 1, 1)),
        "bfloat16",
    )
    with np.load(tmp_path / "x.npz") as arrays:
        assert set(arrays) == {"latents_bf16", "original_size", "crop_ltrb"}
        stored = arrays["latents_bf16"]
    assert stored.dtype == np.uint16
    plain = (stored.astype("uint32") << 16).view("float32")
    assert np.array_equal(plain.ravel()[::4], round_as("bfloat16", values))
    with pytest.raises(BadLatentError, match="`latents_bf16` is int64, not uint16"):
        read_latents(save(tmp_path / "y.npz", latents_bf16=stored.astype(np.int64), **NUMBERS))


@pytest.mark.parametrize("part", ["latents_std", "latents_flipped", "latents_flipped_std"])
def test_every_array_is_checked(tmp_path, part):
    with pytest.raises(BadLatentError, match="not at its bucket's 96x64|unlike latents"):
        read_latents(save(tmp_path / "x.npz", latents=LATENTS, **{part: LATENTS[:, :7]}), (96, 64))
    with pytest.raises(BadLatentError, match=rf"`{part}` is \[4, 7, 12\], unlike latents \[4, 8, 12\]"):
        read_latents(save(tmp_path / "x.npz", latents=LATENTS, **{part: LATENTS[:, :7]}))
    with pytest.raises(BadLatentError, match="not finite"):
        read_latents(save(tmp_path / "x.npz", latents=LATENTS, **{part: LATENTS * np.nan}), (96, 64))


def test_the_latents_of_an_image_are_found_under_every_name(tmp_path):
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    cache.mkdir()
    image = images / "a [1].jpg"
    assert find_latent_file(image, cache) is None
    (images / "a 1_0100x0070_sdxl.npz").touch()  # matches only if the brackets are read as a pattern
    assert find_latent_file(image, cache) is None
    for name in (
        "cache/a [1]_0100x0070_sdxl.npz",
        "cache/a [1].npz",
        "images/a [1]_0100x0070_sdxl.npz",
        "images/a [1].npz",
    ):
        (tmp_path / name).touch()  # each name is preferred to the names above it
        assert find_latent_file(image, cache) == tmp_path / name
    (images / "b.npz").touch()
    assert find_latent_file(images / "b.npz", cache) == images / "b.npz"  # an npz may take the place of an image


def test_files_have_the_keys_and_types_that_other_programs_expect(tmp_path):
    write_latents(tmp_path / "x.npz", GOOD)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        found = {key: (arrays[key].dtype.str, arrays[key].shape) for key in arrays}
        assert arrays["original_size"].tolist() == [100, 70] and arrays["crop_ltrb"].tolist() == [1, 2, 97, 66]
    assert found == {"latents": ("<f4", (4, 8, 12)), "original_size": ("<i8", (2,)), "crop_ltrb": ("<f8", (4,))}
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


def test_equal_samples_give_equal_bytes_at_any_time(monkeypatch):
    first = pack_latents(GOOD)
    monkeypatch.setattr(time, "localtime", lambda *_: time.struct_time((2031, 2, 3, 4, 5, 6, 0, 34, 0)))
    monkeypatch.setattr(time, "time", lambda: 1.9e9)
    numbers = {"original_size": (100, 70), "crop_ltrb": (1, 2, 97, 66)}  # a crop of integers instead of floats
    assert pack_latents(LatentSample(latents=LATENTS.copy(), **numbers)) == first
    assert pack_latents(LatentSample(latents=-LATENTS, **numbers)) != first


@pytest.mark.parametrize(
    ("file", "bucket", "crop", "mean"),
    [
        ("kohya_cache/img000000_0348x0256_sdxl.npz", (288, 224), (0.0, 6.0, 288.0, 217.86206896551724), -0.1495676),
        ("seed_cache/img000000.npz", (288, 208), (0.0, 0.0, 0.0, 0.0), -0.1503405),
    ],
)
def test_files_of_other_programs_are_read(file, bucket, crop, mean):
    sample = read_latents(FIXTURES / file, bucket)
    assert (sample.original_size, sample.crop_ltrb, sample.bucket) == ((348, 256), crop, bucket)
    assert sample.flipped is not None and sample.flipped.shape == sample.latents.shape and sample.std is None
    assert sample.latents.dtype == np.float32 and sample.latents.mean() == pytest.approx(mean, abs=1e-6)
    with pytest.raises(BadLatentError, match=f"encoded at {bucket[0]}x{bucket[1]} px, not at its bucket's 256x256"):
        read_latents(FIXTURES / file, (256, 256))


@pytest.mark.parametrize("compressed", [False, True])
def test_keys_may_end_in_the_height_and_width_of_the_latents(tmp_path, compressed):
    """Recent versions of kohya's scripts write them so, one resolution after the other into one file."""
    large = np.concatenate([LATENTS, LATENTS], 1)
    arrays = {
        **{"latents_8x12": LATENTS, "latents_flipped_8x12": -LATENTS, "original_size_8x12": np.array([100, 70])},
        **{"crop_ltrb_8x12": np.array([1, 2, 97, 66]), "alpha_mask_8x12": np.ones((64, 96), np.float32)},
        **{"latents_16x12": large, "original_size_16x12": np.array([101, 140])},
    }
    path = save(tmp_path / "x_0100x0070_sdxl.npz", compressed, **arrays)
    small = read_latents(path, Size(96, 64))
    assert np.array_equal(small.latents, LATENTS) and small.flipped is not None and small.alpha_mask is not None
    assert (small.original_size, small.crop_ltrb) == ((100, 70), (1, 2, 97, 66))
    assert np.array_equal(read_latents(path, Size(96, 128)).latents, large)
    header = read_latent_header(str(path))  # of the largest
    assert (header.bucket, header.original_size, header.flipped, header.masked) == ((96, 128), (101, 140), False, False)


def test_optional_arrays_may_be_missing_or_present(tmp_path):
    bare = read_latents(save(tmp_path / "x.npz", latents=LATENTS))
    assert (bare.original_size, bare.crop_ltrb) == ((96, 64), (0, 0, 96, 64))
    optional = {"latents_flipped": LATENTS, "alpha_mask": np.ones((64, 96), np.float32)}
    full = read_latents(save(tmp_path / "x.npz", compressed=True, latents=LATENTS.astype(">f8"), **NUMBERS, **optional))
    assert np.array_equal(full.latents, LATENTS) and full.crop_ltrb == (1, 2, 97, 66)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"latents": LATENTS[0]}, r"float32\[8, 12\], not floats \[channels, h, w\]"),
        ({"latents": LATENTS[None]}, r"\[1, 4, 8, 12\]"),
        ({"latents": LATENTS.astype(np.int32)}, "int32"),
        ({"latents": LATENTS.astype(np.complex64)}, "complex64"),
        ({"latents": LATENTS[:, :7]}, "encoded at 96x56 px, not at its bucket's 96x64 px"),
        ({"latents": np.where(LATENTS > 2, np.nan, LATENTS)}, "not finite"),
        ({"latents": np.where(LATENTS > 2, np.inf, LATENTS)}, "not finite"),
        ({"latents": LATENTS.astype(object)}, "pickled"),
        ({"latents": LATENTS, "original_size": np.array(["a", None], object)}, "`original_size` is pickled"),
        ({"latents_8x12": LATENTS[:0]}, r"latents are float32\[0, 8, 12\], not floats \[channels, h, w\]"),
        ({"latents_16x12": LATENTS.repeat(2, 1)}, "encoded at 96x128 px, not at its bucket's 96x64 px"),
        ({"hidden_state1": LATENTS}, "not a latent file"),
        ({}, "holds original_size, crop_ltrb, but no `latents`, floats .channels, .*: not a latent file"),
        ({"latents": LATENTS, "original_size": np.array([1, 2, 3])}, "not 2 finite numbers"),
        ({"latents": LATENTS, "original_size": np.array(7)}, "not 2 finite numbers"),
        ({"latents": LATENTS, "original_size": np.array([np.inf, 1])}, "not 2 finite numbers"),
        ({"latents": LATENTS, "crop_ltrb": np.array([0, 0, np.nan, 0])}, "not 4 finite numbers"),
        ({"latents": LATENTS, "crop_ltrb": np.array(["a", "b", "c", "d"])}, "not 4 finite numbers"),
    ],
)
def test_a_wrong_file_is_refused_with_its_reason(tmp_path, arrays, reason):
    path = save(tmp_path / "x.npz", **{**arrays, **NUMBERS, **arrays})
    with pytest.raises(BadLatentError, match=reason) as caught:
        read_latents(path, (96, 64))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(BadLatentError, match=r"cannot be read: (No such file|Is a directory)"):
            read_latents(path)


def test_bombs_are_refused_before_memory_is_allocated(tmp_path):
    claim = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4000000, 1000000)}\n"  # 64 TB
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        path = add_member(save(tmp_path / "claim.npz", **NUMBERS), "latents.npy", claim, bytes(8), compression)
        for read in (read_latents, lambda path: read_latent_header(str(path))):
            with pytest.raises(BadLatentError, match=r"`latents` claims float32\[4, 4000000, 1000000\] but holds 8 "):
                read(path)
    big = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4096, 4096)}\n"  # 256 MB of zeros in 256 kB
    path = add_member(save(tmp_path / "big.npz", **NUMBERS), "latents.npy", big, bytes(4 * 4096 * 4096 * 4))
    assert path.stat().st_size < 400_000
    with pytest.raises(BadLatentError, match="`latents` claims to unpack to 2684"):
        read_latents(path)
    with pytest.raises(BadLatentError, match="`crop_ltrb` claims to unpack to 800"):
        read_latents(save(tmp_path / "x.npz", compressed=True, latents=LATENTS, crop_ltrb=np.zeros(100_000)))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "x.npz"


def make_compressed() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, latents=LATENTS, **NUMBERS)
    return buffer.getvalue()


FULL = LatentSample(
    latents=LATENTS,
    original_size=(100, 70),
    crop_ltrb=GOOD.crop_ltrb,
    std=LATENTS,
    flipped=LATENTS,
    flipped_std=LATENTS,
)


@given(st.sampled_from([pack_latents(GOOD), pack_latents(FULL), make_compressed()]), st.data())
def test_any_damage_is_refused_or_harmless(damaged, content, data):
    places = st.integers(0, len(content) - 1) | st.integers(max(0, len(content) - 400), len(content) - 1)
    torn = bytearray(content)
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        torn[place] = data.draw(st.integers(0, 255))
    damaged.write_bytes(torn[: data.draw(st.just(len(torn)) | st.integers(0, len(torn)))])
    try:
        sample = read_latents(damaged)
    except BadLatentError:
        return
    assert np.array_equal(sample.latents, LATENTS)


@pytest.mark.parametrize("kept", [0, 1, 100, 1000, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    (tmp_path / "x.npz").write_bytes(pack_latents(GOOD)[:kept])
    with pytest.raises(BadLatentError, match="not a readable npz file"):
        read_latents(tmp_path / "x.npz")


def test_the_header_agrees_with_the_whole_file(tmp_path):
    for number, (name, dtype) in enumerate((("a", "float32"), ("b", "float16"), ("c", "bfloat16"))):
        latents = np.ones((4, 8 + number, 12), np.float32)
        sample = LatentSample(
            latents=latents,
            original_size=(300, 200),
            crop_ltrb=(1, 2, 97, 66),
            std=latents * 2,
            flipped=latents,
            flipped_std=latents,
        )
        write_latents(tmp_path / f"{name}.npz", sample, dtype)
        header = read_latent_header(str(tmp_path / f"{name}.npz"))
        assert (header.bucket, header.original_size, header.crop_ltrb) == (
            (96, 64 + 8 * number),
            (300, 200),
            (1, 2, 97, 66),
        )
    np.savez_compressed(tmp_path / "d.npz", latents=np.zeros((4, 8, 12), np.float32))
    assert read_latent_header(str(tmp_path / "d.npz")).bucket == (96, 64)


@pytest.mark.parametrize("key", ["original_size", "crop_ltrb"])
def test_a_header_with_numbers_that_are_not_finite_is_bad(tmp_path, key):
    numbers = {"original_size": np.array([300.0, 200.0]), "crop_ltrb": np.array([1.0, 2.0, 97.0, 66.0])}
    for value in (np.inf, np.nan):
        numbers[key][1] = value
        np.savez(tmp_path / "x.npz", latents=np.ones((4, 8, 12), np.float32), **numbers)
        with pytest.raises(BadLatentError, match=f"`{key}` .* finite numbers"):
            read_latent_header(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("channels", [1, 16, 32])
def test_latents_of_any_number_of_channels(tmp_path, channels):
    latents = np.arange(channels * 6, dtype=np.float32).reshape(channels, 2, 3)
    sample = LatentSample(latents=latents, original_size=(24, 16), crop_ltrb=(0, 0, 24, 16), flipped=-latents)
    content = write_latents(tmp_path / "x.npz", sample, "float32")
    header = read_latent_header(str(tmp_path / "x.npz"))
    assert (header.channels, header.bucket, header.flipped) == (channels, (24, 16), True)
    assert np.array_equal(parse_latents(content, (24, 16), channels=channels).latents, latents)
    with pytest.raises(BadLatentError, match=f"has {channels} latent channels, and the VAE of the settings gives 4"):
        parse_latents(content, channels=4)
