"""Storage that fails for a moment: transient errors are retried, stale handles reopened, permanent errors reported."""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loguru import logger

from sdxl_trainer.data import files
from sdxl_trainer.data.formats.latent_header import read_latent_header
from sdxl_trainer.data.formats.latents import BadLatentError, LatentSample, pack_latents
from sdxl_trainer.data.formats.manifest import TextIdentity
from sdxl_trainer.data.formats.shards import OpenFile
from sdxl_trainer.data.formats.text_cache import read_text_state, write_text_state
from sdxl_trainer.data.formats.text_outputs import BadTextError, TextOutputs, pack_text, read_text_variant
from sdxl_trainer.data.loading import latent_store
from sdxl_trainer.data.loading.latent_store import LatentStore
from sdxl_trainer.data.stores import remote
from sdxl_trainer.data.stores.shard_copies import ShardCopies

BUCKET = (64, 64)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the seconds of each wait instead of waiting."""
    slept: list[float] = []
    monkeypatch.setattr(files.time, "sleep", slept.append)
    return slept


def fail_reads(monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> list[int]:
    """Make one read after the other fail with these errors. Return a list that records the id of each file read."""
    read, file_ids = OpenFile.read, []

    def fail_first(self: OpenFile, *span: int) -> memoryview:
        file_ids.append(id(self))
        if codes:
            code = codes.pop(0)
            raise OSError(code, os.strerror(code))
        return read(self, *span)

    monkeypatch.setattr(OpenFile, "read", fail_first)
    return file_ids


@pytest.mark.parametrize("offset", [None, 512])
@pytest.mark.parametrize(
    ("codes", "attempts"),
    [([], 1), ([errno.EIO, errno.ESTALE], 3), ([errno.ESTALE] * 3, 3), ([errno.EACCES], 1)],
)
def test_reads_of_latents_are_retried_after_transient_errors(
    offset: int | None,
    codes: list[int],
    attempts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
) -> None:
    latents = np.arange(256, dtype=np.float32).reshape(4, 8, 8)
    content = pack_latents(LatentSample(latents=latents, original_size=BUCKET, crop_ltrb=(0, 0, *BUCKET)))
    (tmp_path / "x").write_bytes(b"-" * (offset or 0) + content)
    fail_reads(monkeypatch, list(codes))
    row = {"file": "x", "offset": offset, "bytes": len(content)}
    found = LatentStore(tmp_path).read([row], BUCKET)[0]
    assert len(waits) == attempts - 1
    if len(codes) < attempts:
        assert isinstance(found, LatentSample) and np.array_equal(found.latents, latents)
    else:
        assert isinstance(found, BadLatentError) and os.strerror((codes or [0])[-1]) in str(found)


@pytest.mark.parametrize(
    ("error", "is_beyond"),
    [
        (OSError("503, message='Service Unavailable', url='http://host/set/416.tar'"), False),
        (FileNotFoundError("http://host/set/416.tar"), False),
        (OSError("[Errno 22] The requested range is not satisfiable"), True),
        (OSError("An error occurred (InvalidRange) when calling the GetObject operation"), True),
        (type("ClientResponseError", (OSError,), {"status": 416})("Requested"), True),
    ],
)
def test_a_number_in_the_name_of_a_shard_is_no_answer(error: Exception, is_beyond: bool) -> None:
    """Samples beyond the end of a shard are bad; errors of the store are not the samples' fault."""
    span = remote.RemoteSpan("http://host/set/416.tar", 0, 5)
    assert remote._verify_answer(error, span) == (b"" if is_beyond else error)


def test_copies_of_another_cache_at_the_same_url_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = [np.full((4, 8, 8), value, np.float32) for value in (1, 2)]
    old, new = (
        pack_latents(LatentSample(latents=each, original_size=BUCKET, crop_ltrb=(0, 0, *BUCKET))) for each in latents
    )
    monkeypatch.setattr(latent_store, "read_spans", lambda spans: [new for _ in spans])
    copies = ShardCopies(tmp_path, 1 << 30, lambda _: "copy")
    row = {"file": "s3://bucket/x.tar", "offset": 0, "bytes": len(new), "sha256": hashlib.sha256(new).digest()}
    for whole in (True, False):
        (tmp_path / ("copy.tar" if whole else "copy.holes")).write_bytes(old)
        (found,) = LatentStore(tmp_path, copies).read([row], BUCKET)
        assert isinstance(found, LatentSample) and np.array_equal(found.latents, latents[1])
    assert copies.read(row["file"], 0, len(new)) == new
    (found,) = LatentStore(tmp_path, copies).read([row | {"sha256": None}], BUCKET)
    assert isinstance(found, LatentSample) and np.array_equal(found.latents, latents[1])


@pytest.mark.parametrize("kind", ["text", "variants", "text state", "header"])
def test_reads_of_text_and_headers_are_retried_after_transient_errors(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    """zipfile would report an error of the disk as damage of the file, a bad sample."""
    outputs = TextOutputs(np.ones((77, 3), np.float32), np.ones((77, 4), np.float32), np.ones(4, np.float32))
    path, content = tmp_path / "x.npz", pack_text([outputs] * (2 if kind == "variants" else 1))
    if kind == "header":
        latents = np.ones((4, 8, 8), np.float32)
        content = pack_latents(LatentSample(latents=latents, original_size=BUCKET, crop_ltrb=(0, 0, *BUCKET)))
    path.write_bytes(content)
    identity = TextIdentity(
        encoder_sha256="1",
        encoder_2_sha256="2",
        tokenizer_sha256="3",
        tokenizer_2_sha256="4",
        max_tokens=75,
        dtype="float32",
    )
    write_text_state(tmp_path, identity, [], content)
    reads: dict[str, Callable[[], object]] = {
        "text": lambda: read_text_variant(path, None, len(content), 0, 1),
        "variants": lambda: read_text_variant(path, None, len(content), 1, 2),
        "text state": lambda: read_text_state(tmp_path),
        "header": lambda: read_latent_header(str(path)),
    }
    codes, expected = [errno.ESTALE, errno.EIO], reads[kind]()

    def fail_first(function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            if codes:
                code = codes.pop(0)
                raise OSError(code, os.strerror(code))
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "pread", fail_first(os.pread))
    monkeypatch.setattr(Path, "read_bytes", fail_first(Path.read_bytes))
    assert str(reads[kind]()) == str(expected) and expected is not None
    assert waits == [0.5, 2.0]
    codes += [errno.EIO] * 3
    if kind in ("text", "variants"):
        with pytest.raises(BadTextError, match="cannot be read: Input/output error"):
            reads[kind]()


def test_a_shard_with_a_stale_handle_is_reopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    content = pack_latents(
        LatentSample(latents=np.ones((4, 8, 8), np.float32), original_size=BUCKET, crop_ltrb=(0, 0, *BUCKET))
    )
    path, store = tmp_path / "x.tar", LatentStore(tmp_path)
    path.write_bytes(content)
    row = {"file": path.name, "offset": 0, "bytes": len(content)}
    stale = store._shards.open(str(path))
    file_ids = fail_reads(monkeypatch, [errno.ESTALE])
    assert isinstance(store.read([row], BUCKET)[0], LatentSample)
    assert file_ids[0] == id(stale) and file_ids[-1] != id(stale)


def test_a_store_that_does_not_answer_is_named_while_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The libraries of stores retry for minutes inside a single call."""
    lines: list[Any] = []
    sink = logger.add(lines.append, format="{message}")
    answered = threading.Event()

    class SilentStore:
        """Answers when the test has seen the second line."""

        def info(self, path: str) -> dict[str, Any]:
            assert answered.wait(60)
            return {"size": 3, "ETag": "a"}

    monkeypatch.setattr(remote, "REPORT_SECONDS", 0.02)
    monkeypatch.setattr(remote, "_last_report", 0.0)
    monkeypatch.setattr(remote, "open_store", lambda url: (SilentStore(), url))
    with ThreadPoolExecutor(1) as pool:
        described = pool.submit(remote.describe_objects, ["s3://bucket/a.tar", "s3://bucket/b.tar"])
        for _ in range(3000):
            if len(lines) < 2:
                time.sleep(0.01)
        answered.set()
        assert [item.size for item in described.result()] == [3, 3]
    logger.remove(sink)
    assert (
        len(lines) > 1
        and lines[0].startswith("s3://bucket/a.tar: no answer for ")
        and lines[0].record["extra"]["is_wait"]
    )


def test_retries_are_logged_after_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [100.0], []
    monkeypatch.setattr(remote, "_last_report", 0.0)
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + 6))
    sink = logger.add(lines.append, format="{message}")
    attempts = list(remote._iterate_attempts(8, "s3://bucket/a.tar"))
    logger.remove(sink)
    assert attempts == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [str(line).strip() for line in lines] == [
        f"s3://bucket/a.tar: no answer for {seconds} s; still trying" for seconds in (12, 24, 36)
    ]
