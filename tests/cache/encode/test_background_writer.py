"""The background writer bounds its memory, does not wait for the disk, and loses no error."""

import threading
import time
from dataclasses import replace

import pytest
from cache_samples import make_entry, make_sample

from sdxl_trainer.cache.encode.background_writer import BackgroundWriter
from sdxl_trainer.cache.encode.storage import EncodedItem, NpzStorage
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter, TextPart, read_latest

SAMPLE = make_sample()


class GatedStorage:
    """Storage that writes one item for each release of its gate, and fails for some keys."""

    def __init__(self, failing: tuple[str, ...] = ()):
        self.gate = threading.Semaphore(0)
        self.failing = failing
        self.written: list[str] = []
        self.is_closed = False

    def write(self, item: EncodedItem) -> ManifestEntry:
        self.gate.acquire()
        if item.entry.key in self.failing:
            raise OSError(28, "No space left on device")
        self.written.append(item.entry.key)
        return replace(item.entry, bytes=100, sha256="x")

    def write_packed(
        self, entry: ManifestEntry, content: bytes, record: bytes, text: bytes | None = None
    ) -> ManifestEntry:
        raise NotImplementedError

    def close(self) -> None:
        self.is_closed = True


def build(folder, storage, **options) -> BackgroundWriter:
    return BackgroundWriter(storage, ManifestWriter(folder, 0), **options)


def make_item(key: object) -> EncodedItem:
    return EncodedItem(make_entry(str(key)), SAMPLE)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_number_of_items_in_flight_is_limited(tmp_path):
    storage = GatedStorage()
    writer = build(tmp_path, storage, num_threads=2, max_in_flight=5)
    submitted = []

    def submit_all() -> None:
        for number in range(20):
            writer.submit(make_item(number))
            submitted.append(number)

    thread = threading.Thread(target=submit_all)
    thread.start()
    wait_until(lambda: len(submitted) == 5)
    time.sleep(0.1)
    assert len(submitted) == 5 and storage.written == []  # the sixth waits
    for released in range(1, 16):
        storage.gate.release()
        wait_until(lambda released=released: len(submitted) == 5 + released)
        assert len(submitted) - len(storage.written) <= 5
    storage.gate.release(5)
    thread.join()
    writer.close()
    assert storage.is_closed and (writer.num_written, writer.bytes_written) == (20, 2000)
    assert set(read_latest(tmp_path)) == {str(number) for number in range(20)}


def test_submitting_does_not_wait_for_the_disk(tmp_path):
    storage = GatedStorage()
    writer = build(tmp_path, storage, max_in_flight=8)
    for number in range(8):
        writer.submit(make_item(number))  # the gate is closed, so waiting for the disk would never end
    assert read_latest(tmp_path) == {}
    storage.gate.release(8)
    writer.close()
    assert len(read_latest(tmp_path)) == 8


def test_an_error_reaches_the_next_submit_and_close(tmp_path):
    storage = GatedStorage(failing=("b",))
    writer = build(tmp_path, storage, num_threads=1, max_in_flight=4)
    for key in "abc":
        writer.submit(make_item(key))
    storage.gate.release(3)
    wait_until(lambda: writer._error is not None)
    # Submitting again never blocks.
    for _ in range(10):
        with pytest.raises(OSError, match="No space left"):
            writer.submit(make_item("d"))
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert storage.is_closed
    # Only items on disk are listed, and later items are not written to a full disk.
    assert storage.written == ["a"] and set(read_latest(tmp_path)) == {"a"}


def test_an_item_that_no_file_can_hold_is_skipped_and_the_others_go_on(tmp_path):
    skipped = []
    (tmp_path / "folder.npz" / "x").mkdir(parents=True)
    (tmp_path / "file").touch()
    writer = BackgroundWriter(
        NpzStorage(tmp_path, "float32"), ManifestWriter(tmp_path, 0), lambda entry, error: skipped.append(entry.key)
    )
    bad, good = ["x" * 252, "file/x", "folder"], ["a", "x" * 251, "ä" * 125]
    for key in [*bad, *good]:
        writer.submit(make_item(key))
    writer.close()
    assert sorted(skipped) == sorted(bad) and set(read_latest(tmp_path)) == set(good)


def test_latents_whose_text_has_too_long_a_name_leave_no_file(tmp_path):
    name = "x" * 245
    entry = replace(make_entry(name), text=TextPart(f"{name}_te_outputs.npz", 0, "", "", "", 1))
    with pytest.raises(OSError, match="too long"):
        NpzStorage(tmp_path, "float32").write_packed(entry, b"latents", b"{}", b"text")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_last_item_reaches_close(tmp_path):
    storage = GatedStorage(failing=("a",))
    writer = build(tmp_path, storage)
    writer.submit(make_item("a"))
    storage.gate.release()
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert read_latest(tmp_path) == {} and writer.num_written == 0


def test_an_item_that_the_full_disk_keeps_from_the_manifest_is_not_listed(tmp_path, monkeypatch):
    storage = GatedStorage()
    storage.gate.release(9)
    manifest = ManifestWriter(tmp_path, 0)
    append, lines = manifest.append, []

    def fail_at_third(entry: ManifestEntry) -> None:
        lines.append(entry.key)
        if len(lines) == 3:
            raise OSError(28, "No space left on device")
        append(entry)

    monkeypatch.setattr(manifest, "append", fail_at_third)
    writer = BackgroundWriter(storage, manifest, num_threads=1)
    for key in "abcdef":
        try:
            writer.submit(make_item(key))
        except OSError:
            break
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert set(read_latest(tmp_path)) == {"a", "b"} and writer.num_written == 2
