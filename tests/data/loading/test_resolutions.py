"""Several resolutions of one image in one cache, and a list of buckets in the settings."""

import json
import shutil
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_samples import hash_items, list_files, run_job, write_settings
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.schema import Config, DataConfig
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.formats.latents import read_latents
from sdxl_trainer.data.formats.manifest import ManifestWriter, read_identity, read_latest, verify_identity
from sdxl_trainer.data.images.bucket import BucketRule, Placement, choose_bucket, list_buckets, place_image, split_key
from sdxl_trainer.data.images.demo_set import draw_demo_set
from sdxl_trainer.data.index.index import Index, open_record_index, open_sample_index
from sdxl_trainer.data.index.join import LatentSelection
from sdxl_trainer.data.index.selection import build_bucket_rules
from sdxl_trainer.data.loading.loader import build_plan
from sdxl_trainer.data.order.plan import Position

NUM_IMAGES = 6
LOW = BucketRule(resolution_px=64, min_px=32, max_px=256, step_px=32)
HIGH = BucketRule(resolution_px=128, min_px=32, max_px=256, step_px=32)
BOTH = LatentSelection(prefixes=("", "64px/"))
WORDS = ("data.min_bucket_px=32", "data.resolution_px=[64, 128]")


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny_folder) -> Path:
    """Write settings, images, and full caches of both resolutions in both formats: `npz` and `shards`."""
    folder = tmp_path_factory.mktemp("filled")
    settings = write_settings(
        folder, tiny_folder / "model", draw_demo_set(folder / "data", num_images=NUM_IMAGES), flip=True
    )
    for form in ("npz", "shards"):
        assert run_job(settings, f"cache.dir={folder / form}", f"cache.format={form}", *WORDS) == 0
    return folder


@pytest.fixture(params=["npz", "shards"])
def cache(request, filled, tmp_path):
    """Return settings, overrides and cache folder of a copy of a full cache."""
    shutil.copytree(filled / request.param, tmp_path / "latents")
    words = (f"cache.dir={tmp_path / 'latents'}", f"cache.format={request.param}", *WORDS)
    return filled / "settings.yaml", words, tmp_path / "latents"


def open_index(filled: Path, folder: Path, selection: LatentSelection = BOTH) -> Index:
    records = open_record_index(folder, [filled / "data" / "metadata.json"], [])
    return open_sample_index(folder, records, selection)


def test_bucket_rules_ignore_the_order_and_the_largest_has_no_prefix():
    rules = build_bucket_rules(DataConfig(resolution_px=[512, 1024, 768]))  # pyright: ignore[reportCallIssue]
    assert list(rules) == ["", "768px/", "512px/"]
    assert rules == build_bucket_rules(DataConfig(resolution_px=[768, 512, 1024]))  # pyright: ignore
    assert rules[""] == BucketRule(resolution_px=1024, min_px=256, max_px=2048, step_px=64)
    # Each resolution has its own buckets, listed and chosen as by kohya's scripts.
    assert place_image((1920, 1080), rules[""], list_buckets(rules[""])) == Placement((1344, 768), (1365, 768), 10, 0)
    assert place_image((1920, 1080), rules["512px/"], list_buckets(rules["512px/"])).bucket == (640, 384)
    assert split_key("512px/a/b") == ("512px/", "a/b") and split_key("a512px/b") == ("", "a512px/b")


@given(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), st.permutations(list_buckets(HIGH)))
def test_fixed_buckets_are_chosen_as_by_kohya(size, buckets):
    data = DataConfig(buckets=buckets)  # pyright: ignore[reportCallIssue]
    [rule] = build_bucket_rules(data).values()
    assert list_buckets(rule) == buckets and rule.area_px == 128 * 128
    placement = place_image(size, rule, list_buckets(rule))
    ratio = size[0] / size[1]
    error = abs(placement.bucket[0] / placement.bucket[1] - ratio)
    assert error == min(abs(width / height - ratio) for width, height in buckets) or placement.bucket == size
    left, top, right, bottom = placement.crop
    assert (right - left, bottom - top) == placement.bucket and right <= placement.resized[0]
    assert bottom <= placement.resized[1] and placement.bucket in (placement.resized, *buckets)


def test_the_first_of_two_fixed_buckets_of_one_ratio_is_used():
    assert choose_bucket((700, 700), [(1024, 1024), (512, 512)]) == (1024, 1024)
    assert choose_bucket((700, 700), [(512, 512), (1024, 1024)]) == (512, 512)
    assert choose_bucket((1024, 1024), [(512, 512), (1024, 1024)]) == (1024, 1024)


def test_both_resolutions_of_each_image_are_cached(cache, filled):
    _, _, folder = cache
    entries = read_latest(folder)
    sizes = json.loads((filled / "data" / "metadata.json").read_text())
    assert set(entries) == {*sizes, *(f"64px/{key}" for key in sizes)}
    identity = read_identity(folder)
    assert identity is not None and verify_identity(folder) is None
    for key, entry in entries.items():
        prefix, name = split_key(key)
        rule = LOW if prefix else HIGH
        placement = place_image(tuple(sizes[name]["original_size"]), rule, list_buckets(rule))
        assert (entry.bucket, entry.resized, entry.crop) == (placement.bucket, placement.resized, placement.crop)
        assert entry.identity == (identity["further"][prefix] if prefix else identity["name"])
        span = None if entry.offset is None else (entry.offset, entry.bytes)
        assert span or entry.file == f"{key}.npz"
        assert read_latents(folder / entry.file, entry.bucket, span).bucket == entry.bucket


def test_the_index_holds_each_image_at_each_resolution(cache, filled):
    _, _, folder = cache
    index = open_index(filled, folder)
    keys = index.arrow_column("key").to_pylist()
    assert len(index) == index.summary.num_wanted == 2 * NUM_IMAGES
    assert keys == [*keys[:NUM_IMAGES], *(f"64px/{key}" for key in keys[:NUM_IMAGES])]
    records = [index.record(row) for row in range(len(index))]
    assert [record["key"] for record in records] == keys[:NUM_IMAGES] * 2
    plan = build_plan(index, 1, 0)
    rows = [plan.batch(Position(0, number)).rows[0] for number in range(plan.num_batches(0))]
    assert sorted(rows) == list(range(2 * NUM_IMAGES))
    # A run at one resolution uses only its latents.
    assert open_index(filled, folder, LatentSelection()).arrow_column("key").to_pylist() == keys[:NUM_IMAGES]


def test_latents_of_both_resolutions_are_found_without_a_manifest(filled, tmp_path):
    shutil.copytree(filled / "npz", tmp_path / "latents")
    listed = open_index(filled, tmp_path / "latents")
    shutil.rmtree(tmp_path / "latents" / "manifest")
    found = open_index(filled, tmp_path / "latents")
    assert found.summary.num_unlisted == 2 * NUM_IMAGES and found.hash_rows() == listed.hash_rows()
    for name in ("original_width", "resized_width", "crop_left", "crop_top"):
        assert np.array_equal(found.column(name), listed.column(name)), name


def test_every_item_is_verified_and_only_the_bad_item_repaired(cache, capfd):
    settings, words, folder = cache
    before = hash_items(folder)
    assert run_job(settings, *words, "--verify") == 0
    entry = read_latest(folder)[sorted(before)[1]]  # 64px/…
    path = folder / entry.file
    content = bytearray(path.read_bytes())
    content[(entry.offset or 0) + entry.bytes // 2] ^= 1
    path.write_bytes(content)
    assert run_job(settings, *words, "--verify") == 1 and entry.file in capfd.readouterr().err
    assert run_job(settings, *words, "--repair") == 0
    report = json.loads((folder / "cache_report.json").read_text())
    assert report["encoded"] == 1 and report["cached"] == 2 * NUM_IMAGES
    assert hash_items(folder) == before


def test_packing_and_unpacking_keep_both_resolutions(cache):
    settings, words, folder = cache
    before = hash_items(folder)
    for mode in ("--pack", "--unpack", "--pack") if "cache.format=npz" in words else ("--unpack", "--pack"):
        assert run_job(settings, *words, mode) == 0
        assert hash_items(folder) == before
        files = [name for name in list_files(folder) if name.endswith(".npz")]
        assert len(files) == (2 * NUM_IMAGES if mode == "--unpack" else 0)


def test_adding_a_resolution_keeps_the_existing_latents(filled, tmp_path):
    settings, single = filled / "settings.yaml", (f"cache.dir={tmp_path}", "data.min_bucket_px=32")
    assert run_job(settings, *single) == 0
    before = {name: time for name, time in list_files(tmp_path).items() if name.endswith(".npz")}
    assert len(before) == NUM_IMAGES and "further" not in (read_identity(tmp_path) or {})
    assert run_job(settings, *single, "data.resolution_px=[128, 64]") == 0
    after = {name: time for name, time in list_files(tmp_path).items() if name.endswith(".npz")}
    assert len(after) == 2 * NUM_IMAGES and after.items() >= before.items()
    assert hash_items(tmp_path) == hash_items(filled / "npz")
    # Back at one resolution there is nothing to encode.
    assert run_job(settings, *single) == 0
    assert json.loads((tmp_path / "cache_report.json").read_text())["encoded"] == 0


def test_a_further_resolution_beside_the_images_has_its_own_folder(filled, tmp_path):
    shutil.copytree(filled / "data", tmp_path / "data")
    metadata = tmp_path / "data" / "metadata.json"
    words = (f"data.metadata=[{metadata}]", "cache.dir=null", *WORDS)
    assert run_job(filled / "settings.yaml", *words) == 0
    stems = set(json.loads(metadata.read_text()))
    assert {path.stem for path in (tmp_path / "data" / "images").glob("*.npz")} == stems
    assert {path.stem for path in (tmp_path / "data" / "images" / "64px").glob("*.npz")} == stems
    config, _ = load_config(filled / "settings.yaml", [*words, f"run.dir={tmp_path}"])
    index, problems = open_training_set(config)
    assert problems == [] and index is not None and len(index) == 2 * NUM_IMAGES


def test_fixed_buckets_make_another_cache(filled, tmp_path):
    words = (f"cache.dir={tmp_path}", "data.buckets=[[96, 64], [64, 96]]")
    assert run_job(filled / "settings.yaml", *words) == 0
    assert {entry.bucket for entry in read_latest(tmp_path).values()} == {(96, 64), (64, 96)}
    assert run_job(filled / "settings.yaml", *words, "data.resolution_px=256", "data.min_bucket_px=32") == 0
    assert json.loads((tmp_path / "cache_report.json").read_text())["encoded"] == 0  # these settings have no effect
    assert run_job(filled / "settings.yaml", f"cache.dir={tmp_path}", "data.buckets=[[64, 64]]") == 0
    assert json.loads((tmp_path / "cache_report.json").read_text())["encoded"] == NUM_IMAGES


def test_a_key_with_the_prefix_of_a_resolution_is_a_problem(tmp_path):
    records = {key: {"image_path": f"{key}.png", "caption": "x"} for key in ("a", "64px/a")}
    (tmp_path / "m.json").write_text(json.dumps(records))
    data = {"metadata": [tmp_path / "m.json"], "min_bucket_px": 32}
    for resolutions, expected in (([128], []), ([64, 128], ["a record has the key '64px/a'"])):
        config = Config.model_validate({"data": {**data, "resolution_px": resolutions}})
        assert [problem.rule for problem in open_checked_records(config)[1]] == expected


def test_latents_of_other_settings_are_not_trained_on(filled):
    """Changing the resolution without running the cache job again is a problem."""
    settings = filled / "settings.yaml"
    for words, made, wanted in (
        ([*WORDS, "data.bucket_step_px=64"], "px by 32", "px by 64"),
        ([*WORDS, "data.no_upscale=true"], "px by 32, but", "px by 32, no_upscale"),
        (["data.buckets=[[96, 64]]"], "data.resolution_px 128", "the settings have data.buckets [[96, 64]]"),
    ):
        config, _ = load_config(
            settings, [*words, f"cache.dir={filled / 'npz'}", f"run.dir={filled}", "cache.on_missing=skip"]
        )
        _, problems = open_training_set(config)
        assert [problem.key for problem in problems] == ["cache.dir"], words
        assert made in problems[0].rule and wanted in problems[0].rule and "launch/cache.sh" in problems[0].cure


def test_stale_latents_are_not_trained_on(filled, tmp_path):
    """A cache job that stopped halfway after a change of settings leaves latents of the old settings."""
    words = (f"cache.dir={tmp_path}", "cache.flip=false", "data.min_bucket_px=32")
    assert run_job(filled / "settings.yaml", *words) == 0
    entry = next(iter(read_latest(tmp_path).values()))
    with closing(ManifestWriter(tmp_path, 0)) as manifest:
        manifest.append(replace(entry, identity="0" * 16, listed_ns=time.time_ns()))
    config, _ = load_config(filled / "settings.yaml", [*words, f"run.dir={tmp_path}"])
    [problem] = open_training_set(config)[1]
    assert problem.key == "cache.dir" and problem.rule.startswith("holds 1 latents of other settings")
    assert run_job(filled / "settings.yaml", *words) == 0
    assert open_training_set(config)[1] == []
