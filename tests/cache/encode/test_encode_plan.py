"""The encode plan: each image is on exactly one rank, shares are even, and stale latents are found."""

import json
import os
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
from cache_samples import RULE, make_entry
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trainer.cache.encode.encode_plan import (
    EncodePlanner,
    PlanTotals,
    Resolution,
    assign_positions,
    build_share,
    classify_entry,
    compute_costs,
)
from sdxl_trainer.data.files import HashedFile, hash_file
from sdxl_trainer.data.formats.manifest import Identity
from sdxl_trainer.data.images.bucket import BucketRule
from sdxl_trainer.data.index.index import open_record_index
from sdxl_trainer.data.index.missing_latents import (
    BadImage,
    EncodingSettings,
    choose_output_file,
    find_shared_files,
    plan_missing_latents,
)

IDENTITY = Identity(
    vae_sha256="ab",
    vae_precision="fp32",
    dtype="float32",
    posterior="sample",
    flip=False,
    resolution_px=128,
    min_bucket_px=64,
    max_bucket_px=256,
    bucket_step_px=32,
    no_upscale=False,
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_are_disjoint_complete_and_even(world_size):
    costs = np.random.default_rng(0).integers(1, 2**21, 1000)
    shares = [assign_positions(costs, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(1000))
    assert all((np.diff(share) > 0).all() for share in shares)
    sums = [costs[share].sum() for share in shares]
    assert max(sums) - min(sums) <= costs.max() and max(sums) / min(sums) < 1.01
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.integers(0, 2**40), max_size=50), st.integers(1, 9))
def test_shares_cover_any_list(costs, world_size):
    shares = [assign_positions(np.array(costs, np.int64), rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(costs)))
    sums = [sum(costs[place] for place in share) for share in shares]
    assert max(sums) - min(sums) <= 2 * max(costs, default=0)


def test_costs_are_pixels_of_the_bucket():
    sizes = np.array([[0, 0], [50, 50], [5000, 5000]], np.int32)
    assert compute_costs(sizes[:, 0], sizes[:, 1], RULE).tolist() == [128**2] * 3
    rule = BucketRule(resolution_px=128, min_px=64, max_px=256, step_px=32, no_upscale=True)
    assert compute_costs(sizes[:, 0], sizes[:, 1], rule).tolist() == [128**2, 2500, 128**2]


@pytest.fixture
def source(tmp_path):
    """Return an image and a manifest entry that matches it."""
    path = tmp_path / "a.png"
    path.write_bytes(b"some bytes of an image")
    status = path.stat()
    entry = make_entry(
        identity=IDENTITY.name,
        source_path=str(path),
        source_bytes=status.st_size,
        source_mtime_ns=status.st_mtime_ns,
        source_sha256=hash_file(path),
    )
    return path, entry


def test_an_entry_that_matches_is_valid(source):
    path, entry = source
    assert classify_entry(entry, str(path), IDENTITY.name) == ("valid", None)
    assert classify_entry(None, str(path), IDENTITY.name) == ("new", None)


@pytest.mark.parametrize("name", [field.name for field in fields(Identity)])
def test_a_change_of_any_identity_field_makes_latents_stale(source, name):
    path, entry = source
    value = getattr(IDENTITY, name)
    other = replace(IDENTITY, **{name: not value if isinstance(value, bool) else value * 2 or ((64, 64),)})
    assert classify_entry(entry, str(path), other.name) == ("stale", None)


def test_a_replaced_image_is_noticed_and_a_touched_one_is_not(source, tmp_path):
    path, entry = source
    content = path.read_bytes()
    path.write_bytes(content + b"!")
    assert classify_entry(entry, str(path), IDENTITY.name) == ("changed", None)
    path.write_bytes(content.replace(b"some", b"same"))  # same size, other time
    os.utime(path, ns=(1, 1))
    assert classify_entry(entry, str(path), IDENTITY.name) == ("changed", None)
    path.write_bytes(content)
    os.utime(path, ns=(2, 2))
    state, refreshed = classify_entry(entry, str(path), IDENTITY.name)
    assert (state, refreshed) == ("valid", replace(entry, source_mtime_ns=2))
    assert classify_entry(refreshed, str(path), IDENTITY.name) == ("valid", None)  # without hashing again


def test_a_moved_or_missing_image_counts_as_unchanged(source, tmp_path):
    path, entry = source
    moved = shutil.copy2(path, tmp_path / "moved.png")
    assert classify_entry(entry, moved, IDENTITY.name)[0] == "valid"
    path.unlink()
    assert classify_entry(entry, str(path), IDENTITY.name) == ("valid", None)
    adopted = replace(entry, source_bytes=0, source_mtime_ns=0, source_sha256="", adopted=True)
    assert classify_entry(adopted, moved, IDENTITY.name) == ("valid", None)


def test_masks_are_compared_like_images(source, tmp_path):
    path, entry = source
    mask = tmp_path / "a-masklabel.png"
    mask.write_bytes(b"some mask")
    status = mask.stat()
    masked = replace(entry, mask=HashedFile(str(mask), status.st_size, status.st_mtime_ns, hash_file(mask)))
    assert classify_entry(entry, str(path), IDENTITY.name, str(mask)) == ("changed", None)  # a new mask
    assert classify_entry(masked, str(path), IDENTITY.name) == ("changed", None)  # a deleted mask
    assert classify_entry(masked, str(path), IDENTITY.name, str(mask)) == ("valid", None)
    os.utime(mask, ns=(3, 3))
    state, refreshed = classify_entry(masked, str(path), IDENTITY.name, str(mask))
    assert (state, refreshed) == ("valid", replace(masked, mask=replace(masked.mask, mtime_ns=3)))
    mask.write_bytes(b"same mask")
    assert classify_entry(masked, str(path), IDENTITY.name, str(mask)) == ("changed", None)
    adopted = replace(entry, source_bytes=0, source_mtime_ns=0, source_sha256="", adopted=True)
    assert classify_entry(adopted, str(path), IDENTITY.name, str(mask)) == ("changed", None)
    path.unlink()
    # Without its image, an entry stays valid, because nothing can be encoded.
    for known, mask_path in ((masked, None), (masked, str(mask)), (entry, str(mask))):
        assert classify_entry(known, str(path), IDENTITY.name, mask_path) == ("valid", None)


def test_the_plan_lists_missing_and_stale_items(tmp_path):
    content = {f"k{number}": {"caption": "x", "original_size": [100 + number, 90]} for number in range(5)}
    content["k4"] = {"caption": "x"}
    (tmp_path / "m.json").write_text(json.dumps(content))
    index = open_record_index(tmp_path, [tmp_path / "m.json"], [])
    entries = {key: make_entry(key, identity=IDENTITY.name) for key in ("k0", "k1", "k2", "gone")}
    entries["k1"] = replace(entries["k1"], identity="another")
    (tmp_path / "k0.npz").touch()
    (tmp_path / "k1.npz").touch()  # the file of k2 is missing
    resolution = Resolution(RULE, IDENTITY)
    planner = EncodePlanner(index, tmp_path, entries, beside=False)
    plans = [planner.plan(build_share(index, resolution, rank, 2)) for rank in range(2)]
    assert plans[0].counts + plans[1].counts == {"valid": 1, "stale": 1, "missing": 1, "new": 2}
    items = {item.key: item for plan in plans for item in plan.items}
    assert sorted(items) == ["k1", "k2", "k3", "k4"] and len(plans[0].items) + len(plans[1].items) == 4
    assert items["k3"].size == (103, 90) and items["k4"].size is None
    assert json.loads(items["k3"].record)["caption"] == "x"
    assert plans[0].totals == PlanTotals(plans[0].counts, plans[0].bytes_needed, len(plans[0].items))
    assert sum(plan.bytes_needed for plan in plans) >= 4 * 128 * 128 // 64 * 4 * 4
    entries = {key: replace(entry, file="shards/x.tar", offset=0) for key, entry in entries.items()}
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".x.tar.partial").touch()  # a killed or running job
    share = build_share(index, resolution, 0, 1)
    assert share.keys == ["k0", "k1", "k2", "k3", "k4"]
    assert EncodePlanner(index, tmp_path, entries, beside=False).plan(share).counts["missing"] == 0


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("a", "a.npz"),
        ("a.b", "a.b.npz"),
        ("sub/a", "sub/a.npz"),
        ("../a", "%2E%2E%2Fa.npz"),
        ("/etc/a", "%2Fetc%2Fa.npz"),
        ("a/../../b", "a%2F%2E%2E%2F%2E%2E%2Fb.npz"),
        ("a%20b", "a%20b.npz"),
        ("a%2Fb", "a%252Fb.npz"),
        ("./a", "%2E%2Fa.npz"),
        ("sub//a", "sub%2F%2Fa.npz"),
        ("a\0b", "a%00b.npz"),
        ("sub/x_te_outputs", "sub/x%5Fte_outputs.npz"),
        ("x%5Fte_outputs", "x%255Fte_outputs.npz"),
        ("manifest/empty", "manifest/%65mpty.npz"),
    ],
)
def test_no_key_names_a_file_outside_the_cache_or_of_another_key(key, file, tmp_path):
    assert choose_output_file(key, "/images/x.jpg", beside=False) == file
    assert (tmp_path / file).resolve().is_relative_to(tmp_path.resolve())
    assert choose_output_file(key, "/images/x.jpg", beside=True) == "/images/x.npz"
    assert choose_output_file("512px/" + key, "/images/x.jpg", beside=False) == "512px/" + file


def test_images_beside_which_the_latents_of_another_lie(tmp_path):
    for path, name in (("a.png", "x_te_outputs"), ("manifest/a.jpg", "empty")):
        image = (tmp_path / path).with_stem(name)
        assert choose_output_file("k", str(image), beside=True).count("%") == 1
    paths = ["a.png", "a.jpg", "b.png", "b.png", "sub/a.png", "c.npz", "c.png"]
    records = {f"k{number}": {"image_path": path, "caption": "x"} for number, path in enumerate(paths)}
    (tmp_path / "m.json").write_text(json.dumps(records))
    index = open_record_index(tmp_path, [tmp_path / "m.json"], [])
    refused = find_shared_files(index.table)
    assert sorted(refused) == [1, 6] and sorted(find_shared_files(index.table, with_text=True)) == [1, 3, 6]
    assert refused[1].startswith(f"{tmp_path}/a.jpg: its latents would replace those of {tmp_path}/a.png")
    entries = {"k1": make_entry("k1", identity=IDENTITY.name)}
    planner = EncodePlanner(index, tmp_path, entries, beside=True, refused=refused)
    items = {item.key: item for item in planner.plan(build_share(index, Resolution(RULE, IDENTITY), 0, 1)).items}
    assert items["k1"].refusal == refused[1] and items["k1"].outdated == entries["k1"]
    assert {key for key, item in items.items() if item.refusal} == {"k1", "k6"}
    encoding = EncodingSettings((("", RULE),), beside=True, flip=False)
    plans = list(plan_missing_latents(index.table, np.array([1]), "", encoding))
    assert plans == [BadImage("k1", refused[1])]
