"""Compact manifests: every command of the cache reads columns as it reads lines."""

import shutil

from cache_samples import hash_items, make_entry, run_job, write_settings

from sdxl_trainer.cache.encode.storage import list_shards
from sdxl_trainer.data.formats import manifest_columns
from sdxl_trainer.data.formats.manifest import ManifestWriter, list_manifest_parts, read_latest
from sdxl_trainer.data.formats.manifest_compaction import compact_parts
from sdxl_trainer.data.images.demo_set import draw_demo_set


def test_a_compact_manifest_serves_every_command(tmp_path, tiny_folder, capsys):
    settings = write_settings(tmp_path, tiny_folder / "model", draw_demo_set(tmp_path / "data", num_images=3))
    folder = tmp_path / "latents"
    words = (f"cache.dir={folder}", "cache.format=shards")
    assert run_job(settings, *words) == 0
    entries, items = read_latest(folder), hash_items(folder)
    assert run_job(settings, *words, "--compact") == 0
    [part] = list_manifest_parts(folder)
    assert part.suffix == ".parquet" and read_latest(folder) == entries
    assert run_job(settings, *words, "--verify") == 0 and run_job(settings, *words) == 0
    assert hash_items(folder) == items and list_manifest_parts(folder) == [part]
    assert "MB instead of" in capsys.readouterr().err


def test_parts_of_several_ranks_lose_no_entry(tmp_path, monkeypatch):
    """Ranks number their lines alike, so merged files have equal highest numbers."""
    monkeypatch.setattr(manifest_columns, "SMALL_ROWS", 50)
    manifests = [ManifestWriter(tmp_path, rank) for rank in range(4)]
    for rank, manifest in enumerate(manifests):
        for item in range(30):
            manifest.append(make_entry(f"{rank}-{item}"))
        manifest.close()
    entries = read_latest(tmp_path)
    compact_parts(tmp_path)
    assert len(entries) == 120 and read_latest(tmp_path) == entries
    assert len(list_manifest_parts(tmp_path)) == 2
    monkeypatch.setattr(manifest_columns, "SMALL_ROWS", 150)
    compact_parts(tmp_path)
    assert len(list_manifest_parts(tmp_path)) == 1 and read_latest(tmp_path) == entries


def test_shards_that_the_job_has_not_made_stay(tmp_path, tiny_folder, capsys):
    settings = write_settings(tmp_path, tiny_folder / "model", draw_demo_set(tmp_path / "data", num_images=3))
    assert run_job(settings, "cache.format=shards") == 0
    shards = list_shards(tmp_path / "latents")
    shutil.copytree(tmp_path / "latents" / "shards", tmp_path / "set" / "shards")
    words = [f"cache.dir={tmp_path / 'set'}", "cache.format=shards", f"data.metadata=[{tmp_path}/set/shards/*.tar]"]
    assert run_job(settings, *words) == 0
    assert list_shards(tmp_path / "set") == shards != []
    shutil.rmtree(tmp_path / "latents" / "manifest")
    run_job(settings, "cache.format=shards")
    assert set(shards) <= set(list_shards(tmp_path / "latents")) and "replaced" not in capsys.readouterr().err
