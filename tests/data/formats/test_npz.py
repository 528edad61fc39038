"""The fast reader of npz files: numpy's own answers, or a refusal, and never a copy or a pickle."""

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
    """The files that were left to zipfile."""
    read, load = [], npz._load_any
    monkeypatch.setattr(npz, "_load_any", lambda content, limits: (read.append(len(content)), load(content, limits))[1])
    return read


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


def test_what_is_out_of_the_ordinary_is_left_to_zipfile(slow_reads):
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
    """Takes bytes and cannot go back."""

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


def test_a_size_in_a_zip64_field_is_understood(slow_reads):
    content = save(a=NUMBERS)
    assert struct.unpack_from("<L", content, 22)[0] == 0xFFFFFFFF  # numpy writes members so
    assert np.array_equal(load_arrays(content, LIMITS)["a"], NUMBERS) and slow_reads == []


@pytest.mark.parametrize("compressed", [False, True])
def test_refusals(compressed):
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


def test_every_flipped_byte_is_refused_or_does_no_harm():
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


def test_a_checksum_that_was_checked_otherwise_is_not_checked_twice():
    content = bytearray(save(a=NUMBERS))
    content[400] ^= 1
    with pytest.raises(NpzError, match="not a readable npz file: `a` has another CRC-32"):
        load_arrays(bytes(content), LIMITS)
    assert load_arrays(bytes(content), LIMITS, check_crc=False)["a"].shape == NUMBERS.shape
