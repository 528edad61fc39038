"""Objects written to an S3 server: whole and checked, conditional, in spite of faults that a proxy injects."""

import hashlib
import os
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import s3fs  # noqa: E402
from servers.object_store import FAULTS, FaultyStore, Request, serve_store  # noqa: E402

from sdxl_trainer.data.stores import remote, uploads  # noqa: E402
from sdxl_trainer.data.stores.uploads import (  # noqa: E402
    delete_objects,
    describe_object,
    list_objects,
    put_bytes,
    read_bytes,
    upload_file,
)


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyStore]:
    with serve_store() as proxy:
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("uploads")
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(running: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # so that this project's own retries are tried
    running.requests.clear()
    yield running
    running.choose_fault = lambda request: None


def fail_first(number: int, fault: str, *methods: str) -> Callable[[Request], str | None]:
    """Return a chooser that makes the first `number` requests by some methods fail."""
    left = [number]

    def choose(request: Request) -> str | None:
        if request.method not in methods or not left[0]:
            return None
        left[0] -= 1
        return fault

    return choose


def test_files_and_bytes_come_back_as_they_were(proxy, tmp_path):
    content = os.urandom(70_000)
    (tmp_path / "a.tar").write_bytes(content)
    upload = upload_file(tmp_path / "a.tar", "s3://uploads/one/a.tar")
    assert read_bytes("s3://uploads/one/a.tar") == content
    assert upload.sha256 == hashlib.sha256(content).hexdigest()
    assert upload.item.checksum == hashlib.md5(content).hexdigest() and upload.item.size == len(content)
    assert put_bytes(b"{}", "s3://uploads/one/b.json")
    found = list_objects("s3://uploads/one")
    assert [(item.url, item.size) for item in found] == [
        ("s3://uploads/one/a.tar", 70_000),
        ("s3://uploads/one/b.json", 2),
    ]
    assert found[0].checksum == upload.item.checksum
    put_bytes(b"x", "s3://uploads/one-more/c")  # a folder whose name begins alike
    assert len(list_objects("s3://uploads/one")) == 2
    delete_objects(["s3://uploads/one/a.tar", "s3://uploads/one/never-there"])
    assert [item.url for item in list_objects("s3://uploads/one")] == ["s3://uploads/one/b.json"]
    assert list_objects("s3://uploads/nothing") == []


def test_a_large_file_is_sent_in_parts_and_appears_whole(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "CHUNK_BYTES", 5 << 20)
    content = os.urandom(11 << 20)
    (tmp_path / "big").write_bytes(content)
    seen: list[int] = []

    def look(request: Request) -> None:
        if "partNumber" in request.path:
            proxy.choose_fault = lambda request: None
            seen.append(len(list_objects("s3://uploads/parts")))
            proxy.choose_fault = look

    proxy.choose_fault = look
    upload = upload_file(tmp_path / "big", "s3://uploads/parts/big")
    assert seen and set(seen) == {0}  # looked for while parts were sent
    assert upload.item.checksum.endswith("-3") and read_bytes("s3://uploads/parts/big") == content
    (tmp_path / "big").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileExistsError):
        upload_file(tmp_path / "big", "s3://uploads/parts/big", only_if_absent=True)
    assert read_bytes("s3://uploads/parts/big") == content


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_moment_are_retried(proxy, tmp_path, fault):
    (tmp_path / "a").write_bytes(b"1" * 1000)
    url = f"s3://uploads/faults/{fault}"
    for number, write in enumerate(
        (
            lambda: upload_file(tmp_path / "a", f"{url}/file").item.size,
            lambda: upload_file(tmp_path / "a", f"{url}/file", only_if_absent=True).item.size,
            lambda: upload_file(tmp_path / "a", f"{url}/new", only_if_absent=True).item.size,
            lambda: put_bytes(b"2" * 1000, f"{url}/bytes") * 1000,
            lambda: put_bytes(b"3" * 1000, f"{url}/lock", only_if_absent=True) * 1000,
        )
    ):
        proxy.choose_fault = fail_first(1, fault, "PUT")
        assert write() == 1000, number
    proxy.choose_fault = fail_first(1, fault, "GET", "HEAD", "DELETE")
    assert len(list_objects(url)) == 4
    proxy.choose_fault = fail_first(1, fault, "GET", "HEAD", "DELETE")
    delete_objects([f"{url}/file"])
    proxy.choose_fault = fail_first(1, fault, "GET", "HEAD", "DELETE")
    assert read_bytes(f"{url}/lock") == b"3" * 1000 and describe_object(f"{url}/new").size == 1000


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("internal", "internal error"),
        ("slow", "reduce your request rate"),
        ("expired", "token has expired"),
        ("reset", "Connection"),
    ],
)
def test_faults_that_last_are_named(proxy, tmp_path, monkeypatch, fault, message):
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.01)
    (tmp_path / "a").write_bytes(b"1")
    proxy.choose_fault = lambda request: fault if request.method == "PUT" else None
    with pytest.raises(remote.StoreError, match=f"^s3://uploads/last: .*{message}"):
        upload_file(tmp_path / "a", "s3://uploads/last")
    num_tries = len([request for request in proxy.requests if request.path.startswith("/uploads/last")])
    assert remote.ATTEMPTS <= num_tries <= 2 * remote.ATTEMPTS


def test_denied_writes_and_missing_buckets_are_named_at_once(proxy, tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    proxy.choose_fault = lambda request: "denied" if request.method == "PUT" else None
    for write in (lambda url: upload_file(tmp_path / "a", url), lambda url: put_bytes(b"1", url)):
        proxy.requests.clear()
        with pytest.raises(remote.StoreError, match="s3://uploads/x: PermissionError: Access Denied"):
            write("s3://uploads/x")
        assert len([request for request in proxy.requests if request.method == "PUT"]) == 1
    proxy.choose_fault = lambda request: None
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        put_bytes(b"1", "s3://no-such-bucket/x")


def test_one_of_two_conditional_writes_wins(proxy, tmp_path):
    assert put_bytes(b"a", "s3://uploads/lock", only_if_absent=True)
    assert not put_bytes(b"b", "s3://uploads/lock", only_if_absent=True)
    assert read_bytes("s3://uploads/lock") == b"a"
    assert put_bytes(b"a", "s3://uploads/lock", only_if_absent=True)  # its own, whose answer was lost


def test_other_bytes_on_the_store_are_an_error(proxy, tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 5000)
    (tmp_path / "b").write_bytes(b"2" * 5000)
    content = (tmp_path / "a").read_bytes()
    store = s3fs.S3FileSystem()

    def spoil(request: Request) -> None:
        if request.method == "HEAD":  # the object is described after it was written
            proxy.choose_fault = lambda request: None
            store.pipe_file("uploads/spoilt", content[:-1] + b"0")

    proxy.choose_fault = spoil
    with pytest.raises(remote.StoreError, match="s3://uploads/spoilt: the store holds other bytes than were sent"):
        upload_file(tmp_path / "a", "s3://uploads/spoilt")


def test_a_checksum_that_is_not_of_the_bytes_is_no_error(proxy, tmp_path, monkeypatch):
    """As with a bucket that encrypts by KMS."""
    build = uploads.build_stored_object
    monkeypatch.setattr(
        uploads,
        "build_stored_object",
        lambda url, fields: build(url, {**fields, "ETag": f'"{"0" * 32}"'}),
    )
    (tmp_path / "a").write_bytes(b"1" * 5000)
    assert upload_file(tmp_path / "a", "s3://uploads/encrypted").item.checksum == "0" * 32


def test_stores_of_other_protocols(tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 50)
    folder = "memory://cache/x"
    upload_file(tmp_path / "a", f"{folder}/shards/a.tar", only_if_absent=True)
    (tmp_path / "b").write_bytes(b"2" * 50)
    with pytest.raises(FileExistsError):
        upload_file(tmp_path / "b", f"{folder}/shards/a.tar", only_if_absent=True)
    assert [(item.url, item.size) for item in list_objects(folder)] == [(f"{folder}/shards/a.tar", 50)]
    delete_objects([f"{folder}/shards/a.tar", f"{folder}/shards/b.tar"])
    assert list_objects(folder) == []
