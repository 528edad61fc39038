"""Compact manifests: every command of the cache reads columns as it reads lines."""

from cache_samples import hash_items, run_job, write_settings

from sdxl_trainer.data.formats.manifest import list_manifest_parts, read_latest
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
