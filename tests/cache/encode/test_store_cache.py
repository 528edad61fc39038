"""A cache on an S3 server: the same latents as on disk, nothing encoded twice, faults and mistakes named."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_samples import run_job, write_settings

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import orjson  # noqa: E402
import s3fs  # noqa: E402
from servers.object_store import FaultyStore, serve_store  # noqa: E402

from sdxl_trainer.data.formats.manifest import ManifestEntry, read_latest  # noqa: E402
from sdxl_trainer.data.formats.shards import compute_sample_span  # noqa: E402
from sdxl_trainer.data.images.demo_set import draw_demo_set  # noqa: E402
from sdxl_trainer.data.stores import remote  # noqa: E402
from sdxl_trainer.data.stores.cache_mirror import name_mirror  # noqa: E402
from sdxl_trainer.data.stores.uploads import list_objects, read_bytes  # noqa: E402

BUCKET = "caches"
SHARDS = ("cache.format=shards", "cache.shard_mb=1", "cache.spool_gb=0.01")


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyStore]:
    with serve_store() as proxy:
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(running: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    running.requests.clear()
    yield running
    running.choose_fault = lambda request: None
    running.ignores_ranges = False


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("store")
    return write_settings(folder, tiny_folder / "model", draw_demo_set(folder / "data", num_images=12))


@pytest.fixture(scope="module")
def local(settings: Path) -> dict[str, str]:
    """Hash of each item of the same cache on disk."""
    folder = settings.parent / "local"
    assert run_job(settings, f"cache.dir={folder}", *SHARDS) == 0
    return {key: entry.sha256 for key, entry in read_latest(folder).items()}


def list_words(settings: Path, name: str) -> tuple[str, ...]:
    """Words for a cache of its own, whose mirror lies in a folder of its own."""
    return (f"cache.dir=s3://{BUCKET}/{name}", f"run.dir={settings.parent / name}", *SHARDS)


def get_mirror(settings: Path, name: str) -> Path:
    return name_mirror(settings.parent / name, f"s3://{BUCKET}/{name}")


def read_report(settings: Path, name: str) -> dict:
    return orjson.loads((get_mirror(settings, name) / "cache_report.json").read_bytes())


def read_store(name: str, folder: Path) -> dict[str, ManifestEntry]:
    """Return the entries on the store, as another machine finds them. Each shard is whole and listed."""
    url = f"s3://{BUCKET}/{name}"
    objects = {item.url[len(url) + 1 :]: item.size for item in list_objects(url)}
    (folder / "manifest").mkdir(parents=True)
    for part in (part for part in objects if part.startswith("manifest/")):
        (folder / part).write_bytes(read_bytes(f"{url}/{part}"))
    entries = read_latest(folder)
    shards = {file for file in objects if file.startswith("shards/")}
    assert shards == {entry.file for entry in entries.values()}
    for shard in shards:
        held = [entry for entry in entries.values() if entry.file == shard]
        ends = sum(compute_sample_span(entry.key, entry.record_bytes, entry.offset, entry.bytes).size for entry in held)
        assert objects[shard] == ends + 1024
    assert not [name for name in objects if name.startswith(("pending/", "lock/"))]
    assert {name for name in objects if name.startswith("manifest/object-")} == {
        f"manifest/object-{shard.removeprefix('shards/')}.json" for shard in shards
    }
    assert "cache.json" in objects
    return entries


def test_a_cache_on_a_store_holds_the_latents_of_one_on_disk(settings, local, proxy, tmp_path):
    words = list_words(settings, "same")
    assert run_job(settings, *words) == 0
    found = read_store("same", tmp_path / "a")
    assert {key: entry.sha256 for key, entry in found.items()} == local
    spooled = [path for path in (get_mirror(settings, "same") / "spool").rglob("*") if path.is_file()]
    assert [path for path in spooled if path.suffix != ".lock"] == []
    assert run_job(settings, *words) == 0
    assert read_report(settings, "same")["encoded"] == 0
    # Another machine finds everything there.
    assert run_job(settings, *words, f"run.dir={tmp_path / 'other'}") == 0
    mirror = name_mirror(tmp_path / "other", f"s3://{BUCKET}/same")
    assert orjson.loads((mirror / "cache_report.json").read_bytes())["encoded"] == 0
    assert read_store("same", tmp_path / "b") == found
