"""The fast reader of npz files: it returns numpy's arrays or refuses the file, and never copies or unpickles."""

import io
import struct
import zipfile

import numpy as np
import pytest

from sdxl_trainer.data.formats import npz
from sdxl_trainer.data.formats.npz import NpzError, load_arrays

LIMITS = {"a": 10_000, "b": 10_000}
NUMBERS = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)


@pytest.fixture
def slow_reads(monkeypatch):
    """Record the sizes of the files that are read through zipfile."""
    sizes, load = [], npz._load_with_zipfile

    def record(content: bytes, limits: dict[str, int]) -> dict[str, np.ndarray]:
        sizes.append(len(content))
        return load(content, limits)

    monkeypatch.setattr(npz, "_load_with_zipfile", record)
    return sizes


def save(compressed: bool = False, **arrays) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        NUMBERS,
        np.asfortranarray(NUMBERS),
        NUMBERS.astype(">f8"),
        NUMBERS.astype(np.float16),
        np.arange(6, dtype=np.int64),
        np.array(7.5),
        np.zeros((3, 0, 2), np.float32),
        np.array([True, False]),
        np.array(["x", "yz"]),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_stored_arrays_are_views_of_the_bytes(array, slow_reads):
    content = save(a=array, b=NUMBERS)
    loaded = load_arrays(content, LIMITS)
    assert list(loaded) == ["a", "b"] and slow_reads == []
    assert loaded["a"].dtype == array.dtype and np.array_equal(loaded["a"], array)
    assert not loaded["a"].flags.writeable and not loaded["a"].flags.owndata
    for expected, found in zip(np.load(io.BytesIO(content)).values(), loaded.values(), strict=True):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert np.array_equal(load_arrays(memoryview(content), LIMITS)["a"], array)


def test_files_of_another_form_are_read_through_zipfile(slow_reads):
    assert np.array_equal(load_arrays(save(compressed=True, a=NUMBERS), LIMITS)["a"], NUMBERS)
    more = load_arrays(save(a=NUMBERS, alpha_mask=NUMBERS), LIMITS)
    assert np.array_equal(more["a"], NUMBERS) and more["alpha_mask"].size == 0  # named, not read
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = b"made by hand"
        archive.writestr("a.npy", save_npy(NUMBERS))
    assert np.array_equal(load_arrays(buffer.getvalue(), LIMITS)["a"], NUMBERS)
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:  # sizes come after the data
        archive.writestr("a.npy", save_npy(NUMBERS))
    assert np.array_equal(load_arrays(pipe.content, LIMITS)["a"], NUMBERS)
    assert len(slow_reads) == 4


class Pipe(io.RawIOBase):
    """A stream that can be written but not sought."""

    content = b""

    def write(self, data) -> int:
        self.content += bytes(data)
        return len(data)

    def tell(self):
        raise OSError

    def seekable(self) -> bool:
        return False


def save_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_size_in_a_zip64_field_is_read(slow_reads):
    content = save(a=NUMBERS)
    assert struct.unpack_from("<L", content, 22)[0] == 0xFFFFFFFF  # numpy writes the size of every member like this
    assert np.array_equal(load_arrays(content, LIMITS)["a"], NUMBERS) and slow_reads == []


@pytest.mark.parametrize("compressed", [False, True])
def test_pickles_bombs_and_other_files_are_refused(compressed):
    with pytest.raises(NpzError, match="`a` is pickled"):
        load_arrays(save(compressed, a=np.array([None])), LIMITS)
    with pytest.raises(NpzError, match=r"`a` (holds|claims to unpack to) 40\d+ bytes"):
        load_arrays(save(compressed, a=np.zeros(5000)), {"a": 40_000})
    for content in (b"", b"PK", b"nothing of the kind", save_npy(NUMBERS)):
        with pytest.raises(NpzError, match="not a readable npz file"):
            load_arrays(content, LIMITS)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_truncation_is_refused(compressed):
    content = save(compressed, a=NUMBERS, b=np.arange(3))
    for kept in range(len(content)):
        with pytest.raises(NpzError):
            load_arrays(content[:kept], LIMITS)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("dtype", "shape", "num_bytes"),
    [
        ("'V0'", "(3,)", 0),
        ("('<f4', (2,))", "(3,)", 24),
        ("'<f4'", f"({'0, ' * 80})", 0),
        ("'<f4'", f"(0, {10**30})", 0),
        ("'<f4'", f"(0, {2**62}, {2**62})", 0),
    ],
)
def test_a_header_that_numpy_cannot_build_is_refused(compression, dtype, shape, num_bytes):
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(num_bytes))
    with pytest.raises(NpzError, match="`a` claims "):
        load_arrays(buffer.getvalue(), LIMITS)


def test_every_flipped_byte_is_refused_or_harmless():
    content = bytearray(save(a=NUMBERS, b=np.arange(3)))
    for place in range(len(content)):
        for mask in (0x01, 0x80, 0xFF):
            content[place] ^= mask
            try:
                found = load_arrays(bytes(content), LIMITS)
            except NpzError:
                pass
            else:
                assert np.array_equal(found["a"], NUMBERS) and found["b"].tolist() == [0, 1, 2], place
            content[place] ^= mask


def test_the_crc_is_skipped_for_callers_with_a_better_checksum():
    content = bytearray(save(a=NUMBERS))
    content[400] ^= 1
    with pytest.raises(NpzError, match="not a readable npz file: the CRC-32 of `a` does not match"):
        load_arrays(bytes(content), LIMITS)
    assert load_arrays(bytes(content), LIMITS, check_crc=False)["a"].shape == NUMBERS.shape
