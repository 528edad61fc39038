"""Verify, repair, pack, unpack and adopt: bad items are named and repaired, and nothing else changes."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_samples import hash_items, list_files, make_entry, make_sample, run_job, write_settings
from disk_calls import DiskCalls
from PIL import Image
from programs import FIXTURES

from sdxl_trainer.cache.encode.storage import EncodedItem, NpzStorage, ShardStorage, list_shards, read_item, verify_item
from sdxl_trainer.cache.upkeep.verify import verify_entries
from sdxl_trainer.data.formats.latents import pack_latents, parse_latents, read_latents
from sdxl_trainer.data.formats.manifest import read_identity, read_latest
from sdxl_trainer.data.formats.shards import compute_sample_span, iterate_members
from sdxl_trainer.data.images.demo_set import draw_demo_set
from sdxl_trainer.data.index.index import open_record_index, open_sample_index

KOHYA = (
    "data.resolution_px=256",
    "data.min_bucket_px=64",
    "data.max_bucket_px=512",
    "data.bucket_step_px=32",
    "cache.flip=true",
)


@pytest.fixture(scope="module")
def model(tiny_folder) -> Path:
    return tiny_folder / "model"


@pytest.fixture(scope="module")
def filled(tmp_path_factory, model) -> Path:
    """Return a folder with settings and two filled caches of eight images, `npz` and `shards`."""
    folder = tmp_path_factory.mktemp("filled")
    settings = write_settings(folder, model, draw_demo_set(folder / "data", num_images=8))
    for form in ("npz", "shards"):
        assert run_job(settings, f"cache.dir={folder / form}", f"cache.format={form}") == 0
    return folder


@pytest.fixture(params=["npz", "shards"])
def cache(request, filled, tmp_path):
    """Return (settings, words for the job, cache folder) of a copy of a filled cache."""
    shutil.copytree(filled / request.param, tmp_path / "latents")
    words = (f"cache.dir={tmp_path / 'latents'}", f"cache.format={request.param}")
    return filled / "settings.yaml", words, tmp_path / "latents"


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ 0x10]))


@pytest.mark.parametrize(("form", "dtype"), [("npz", "float32"), ("npz", "bfloat16"), ("shards", "bfloat16")])
def test_every_flipped_byte_is_found(tmp_path, form, dtype):
    storage = NpzStorage(tmp_path, dtype) if form == "npz" else ShardStorage(tmp_path, dtype, 0, 1 << 30)
    items = [
        EncodedItem(make_entry(f"k{n}", bucket=(32, 32)), make_sample(n, (32, 32)), record=b'{"a": 1}') for n in (0, 1)
    ]
    entries = {entry.key: entry for entry in map(storage.write, items)}
    storage.close()
    clean = verify_entries(tmp_path, entries)
    assert (clean.bad, clean.bad_shards, clean.num_items) == ({}, {}, 2)
    path = tmp_path / entries["k1"].file
    whole = path.read_bytes()
    for place in range(len(whole)):
        flip(path, place)
        result = verify_entries(tmp_path, entries, num_threads=1)
        found = set(result.bad) | set(result.bad_shards)
        assert found == {get_owner(place, entries, path.name, len(whole))}, place
        flip(path, place)
    assert path.read_bytes() == whole
    for content in (whole + b"\0", whole[:-1], b""):
        path.write_bytes(content)
        result = verify_entries(tmp_path, entries)
        assert result.bad or result.bad_shards
    path.unlink()
    assert "cannot be read: No such file" in verify_item(tmp_path, entries["k1"])


def get_owner(place: int, entries: dict, name: str, size: int) -> str:
    """Return the key of the item that a byte belongs to, or the shard's name."""
    for key, entry in entries.items():
        if entry.offset is None and entry.file == name:
            return key
        if entry.offset is not None:
            span = compute_sample_span(key, entry.record_bytes, entry.offset, entry.bytes)
            start, end = span.offset, span.end
            if start <= place < end:
                return key
    return f"shards/{name}"


def test_wrong_latents_with_a_right_checksum_are_found(tmp_path):
    good = make_sample()
    for latents, reason in (
        (np.full_like(good.latents, np.nan), "not finite"),
        (good.latents[:, :4], "was encoded at 96x32 px, not at its bucket's 96x64 px"),
    ):
        content = pack_latents(replace(good, latents=latents))
        (tmp_path / "a.npz").write_bytes(content)
        entry = make_entry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        assert reason in verify_item(tmp_path, entry)


def list_regions(folder: Path, form: str) -> list[tuple[Path, int]]:
    """Return a byte of each region of a cache's files: (path, place)."""
    entries = sorted(read_latest(folder).values(), key=lambda entry: entry.key)
    if form == "npz":
        content = (folder / entries[0].file).read_bytes()
        places = [3, content.index(b"NUMPY"), 600, content.index(b"PK\1\2") + 20, len(content) - 3]
        return [(folder / entries[number].file, place) for number, place in enumerate(places)]
    entry = entries[0]
    start, _ = compute_sample_span(entry.key, entry.record_bytes, entry.offset, entry.bytes)
    path = folder / entry.file
    last = next(folder / other.file for other in entries if other.file != entry.file)
    return [
        (path, start + 2),
        (path, start + 515),
        (path, entry.offset - 500),
        (path, entry.offset + 700),
        (last, last.stat().st_size - 5),
    ]


def test_repair_replaces_exactly_the_bad_items(cache, capsys):
    settings, words, folder = cache
    form = words[1].partition("=")[2]
    hashes, before = hash_items(folder), list_files(folder)
    assert run_job(settings, *words, "--verify") == 0
    regions = list_regions(folder, form)
    touched = {str(path.relative_to(folder)) for path, _ in regions}
    for path, place in regions:
        flip(path, place)
        assert run_job(settings, *words, "--verify") == 1, (path, place)
        if form == "shards":
            flip(path, place)  # one byte at a time, because several bytes of one item are one bad item
    printed = capsys.readouterr().err
    assert all(Path(name).name in printed for name in touched) and "run with --repair" in printed
    for path, place in regions if form == "shards" else []:
        flip(path, place)
    assert run_job(settings, *words, "--repair") == 0
    assert run_job(settings, *words, "--verify") == 0
    assert hash_items(folder) == hashes
    after = list_files(folder)
    for name, changed in before.items():
        if name.endswith((".npz", ".tar")) and name not in touched:
            assert after[name] == changed, name
    if form == "shards":
        keys = [
            key for file in list_shards(folder) for key, kind, *_ in iterate_members(folder / file) if kind == "npz"
        ]
        assert sorted(keys) == sorted(hashes)  # no shard holds the bad sample any more
        assert not touched & set(list_shards(folder))
    else:
        assert set(name for name in after if name.endswith(".npz")) == {f"{key}.npz" for key in hashes}


def test_repair_does_not_encode_images_that_were_never_cached(cache):
    settings, words, folder = cache
    (folder / "manifest" / "part-00000.jsonl").write_bytes(b"")
    assert run_job(settings, *words, "--repair") == 0 and read_latest(folder) == {}
    assert run_job(settings, *words) == 0 and len(hash_items(folder)) == 8
    assert run_job(settings, *words, "--verify") == 0


def test_a_damaged_manifest_is_found_and_repaired(cache, capsys):
    settings, words, folder = cache
    hashes, part = hash_items(folder), folder / "manifest" / "part-00000.jsonl"
    size = part.stat().st_size
    flip(part, size // 2)
    assert run_job(settings, *words, "--verify") == 1
    assert "damaged line of the manifest" in capsys.readouterr().err
    assert run_job(settings, *words, "--repair") == 0
    assert run_job(settings, *words, "--verify") == 0 and hash_items(folder) == hashes
    flip(folder / "cache.json", 40)
    assert run_job(settings, *words, "--verify") == 1
    assert "cache.json: damaged" in capsys.readouterr().err
    assert run_job(settings, *words) == 0 and run_job(settings, *words, "--verify") == 0


def test_the_temporary_files_of_a_killed_job_are_deleted(cache):
    settings, words, folder = cache
    (folder / "deep").mkdir()
    (folder / next(iter(read_latest(folder).values())).file).unlink()  # the item that the job was writing
    leftovers = [folder / place / ".x.npz.0123abcd.tmp" for place in (".", "manifest", "logs", "shards", "index")]
    for leftover in leftovers:
        leftover.parent.mkdir(exist_ok=True)
        leftover.touch()
    assert run_job(settings, *words) == 0
    assert list(folder.rglob(".*.tmp")) == []


def test_a_deleted_file_is_encoded_again_by_the_next_job(cache):
    settings, words, folder = cache
    hashes = hash_items(folder)
    entry = min(read_latest(folder).values(), key=lambda entry: entry.key)
    (folder / entry.file).unlink()
    assert run_job(settings, *words) == 0
    assert hash_items(folder) == hashes and run_job(settings, *words, "--verify") == 0


def test_only_settings_that_change_the_latents_encode_again(cache, tmp_path):
    settings, words, folder = cache
    form = words[1]
    before = list_files(folder)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    for other in (("cache.batch_size=3",), ("cache.num_workers=1",), (f"cache.dir={moved}",), ("cache.shard_mb=7",)):
        assert run_job(settings, *words, *other) == 0
        report = json.loads(((moved if "dir" in other[0] else folder) / "cache_report.json").read_text())
        assert report["encoded"] == 0 and report["cached"] == 8, other
    assert {name: changed for name, changed in list_files(folder).items() if name.endswith((".npz", ".tar"))} == {
        name: changed for name, changed in before.items() if name.endswith((".npz", ".tar"))
    }
    assert run_job(settings, *words, "cache.dtype=float16") == 0
    assert json.loads((folder / "cache_report.json").read_text())["encoded"] == 8
    assert run_job(settings, *words, "cache.dtype=float16", "--verify") == 0
    assert all(read_item_dtype(folder, entry) == "float16" for entry in read_latest(folder).values())
    if form.endswith("shards"):
        assert {entry.file for entry in read_latest(folder).values()} == set(list_shards(folder))


def read_item_dtype(folder: Path, entry) -> str:
    return parse_latents(read_item(folder, entry).npz, entry.bucket).dtype


def test_a_replaced_image_is_encoded_again_and_no_other(filled, model, tmp_path):
    metadata = draw_demo_set(tmp_path / "data", num_images=8)
    settings = write_settings(tmp_path, model, metadata, format="shards")
    assert run_job(settings) == 0
    hashes = hash_items(tmp_path / "latents")
    image_file = sorted((tmp_path / "data" / "images").iterdir())[0]
    with Image.open(image_file) as image:
        turned = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    turned.save(image_file)
    others = sorted((tmp_path / "data" / "images").iterdir())[1:]
    os.utime(others[0])  # a new time, but the same content
    assert run_job(settings) == 0
    assert json.loads((tmp_path / "latents" / "cache_report.json").read_text())["encoded"] == 1
    now = hash_items(tmp_path / "latents")
    assert {key for key in hashes if now[key] != hashes[key]} == {image_file.stem}
    assert run_job(settings, "--verify") == 0  # no shard holds the old sample
    assert run_job(settings) == 0
    assert json.loads((tmp_path / "latents" / "cache_report.json").read_text())["encoded"] == 0


def test_pack_and_unpack_keep_every_byte(cache):
    settings, words, folder = cache
    hashes, form = hash_items(folder), words[1].partition("=")[2]
    order = ["--pack", "--unpack"] if form == "npz" else ["--unpack", "--pack"]
    for mode in order:
        assert run_job(settings, *words, mode) == 0
        assert hash_items(folder) == hashes
        assert run_job(settings, *words, "--verify") == 0
        npz = {name for name in list_files(folder) if name.endswith(".npz")}
        if mode == "--pack":
            assert npz == set() and {entry.file for entry in read_latest(folder).values()} == set(list_shards(folder))
            records = {
                key
                for file in list_shards(folder)
                for key, kind, *_ in iterate_members(folder / file)
                if kind == "json"
            }
            assert records == set(hashes)
        else:
            assert npz == {f"{key}.npz" for key in hashes} and list_shards(folder) == []
        files = list_files(folder)
        assert run_job(settings, *words, mode) == 0  # again, with nothing to do
        assert {name: time for name, time in list_files(folder).items() if name.endswith((".npz", ".tar"))} == {
            name: time for name, time in files.items() if name.endswith((".npz", ".tar"))
        }
        assert run_job(settings, *words) == 0
        assert json.loads((folder / "cache_report.json").read_text())["encoded"] == 0


@pytest.mark.parametrize("form", ["npz", "shards"])
def test_files_are_deleted_only_after_their_successors_are_on_disk(filled, model, tmp_path, monkeypatch, form):
    """Encoding, packing, unpacking, and replacing shards that are partly out of date."""
    data, folder = tmp_path / "data", tmp_path / "latents"
    shutil.copytree(filled / "data", data)
    settings = write_settings(tmp_path, model, data / "metadata.json")
    words = (f"cache.format={form}",)
    calls = DiskCalls(monkeypatch)
    assert run_job(settings, *words) == 0
    for mode in ("--pack", "--unpack", "--pack"):
        before = calls.num_deletions
        assert run_job(settings, *words, mode) == 0
        assert calls.num_deletions > before or (mode, form) == ("--pack", "shards")
    image = Path(next(iter(read_latest(folder).values())).source_path)
    Image.new("RGB", Image.open(image).size).save(image)
    before = calls.num_deletions
    assert run_job(settings, "cache.format=shards") == 0
    assert calls.num_deletions > before, "a shard was replaced"
    assert calls.faults == [] and calls.num_renames > 16
    assert run_job(settings, *words, "--verify") == 0


def test_packing_leaves_bad_items_in_place(filled, tmp_path, capsys):
    folder = tmp_path / "latents"
    shutil.copytree(filled / "npz", folder)
    words = (filled / "settings.yaml", f"cache.dir={folder}")
    entry = next(iter(read_latest(folder).values()))
    flip(folder / entry.file, 700)
    assert run_job(*words, "--pack") == 1
    assert f"{entry.file}: SHA-256 differs from the manifest" in capsys.readouterr().err
    assert [name for name in list_files(folder) if name.endswith(".npz")] == [entry.file]
    assert run_job(*words, "--repair") == 0 and run_job(*words, "--verify") == 0


def test_commands_without_a_cache_are_wrong_input(tmp_path, model, capsys):
    settings = write_settings(tmp_path, model, draw_demo_set(tmp_path / "data", num_images=2))
    for mode in ("--verify", "--pack", "--unpack"):
        assert run_job(settings, mode) == 2
        assert "holds no latent cache" in capsys.readouterr().err
    assert run_job(settings, "--adopt") == 0
    printed = capsys.readouterr().err
    assert "found no files to adopt: expected <stem>.npz or <stem>_<width>" in printed
    assert f"{tmp_path}/latents" in printed


@pytest.fixture
def foreign(tmp_path, model):
    """Return (settings, folder) of images with kohya's latents beside them."""
    folder = tmp_path / "images"
    shutil.copytree(FIXTURES / "kohya_cache", folder)
    (folder / "metadata.json").unlink()
    return write_settings(tmp_path, model, dir=None), folder


def test_kohyas_cache_is_adopted_unchanged(foreign, capsys):
    settings, folder = foreign
    before = list_files(folder)
    assert run_job(settings, *KOHYA, "--adopt") == 0
    entries = read_latest(folder)
    assert {entry.file for entry in entries.values()} == {
        "img000000_0348x0256_sdxl.npz",
        "img000001_0359x0264_sdxl.npz",
    }
    entry = entries["img000000"]
    assert entry.adopted and entry.bucket == (288, 224) and entry.original_size == (348, 256)
    # The crop is the one that kohya made, which differs from the crop in its file.
    assert entry.resized == (305, 224) and entry.crop == (8, 0, 296, 224)
    assert entry.source_sha256 == hashlib.sha256((folder / "img000000.jpg").read_bytes()).hexdigest()
    assert read_identity(folder)["flip"] is True
    assert run_job(settings, *KOHYA, "--verify") == 0
    assert run_job(settings, *KOHYA) == 0
    assert json.loads((folder / "cache_report.json").read_text())["encoded"] == 0
    assert run_job(settings, *KOHYA, "--adopt") == 0  # again, with nothing to do
    assert {name: time for name, time in list_files(folder).items() if name in before} == before
    assert run_job(settings, *KOHYA, "--pack") == 0
    assert run_job(settings, *KOHYA, "--verify") == 0
    assert before.items() <= list_files(folder).items()  # another program's files stay


def test_files_that_do_not_fit_are_named_and_not_adopted(foreign, capsys):
    settings, folder = foreign
    (folder / "img000000_0348x0256_sdxl.npz").unlink()
    shutil.copy(FIXTURES / "seed_cache" / "img000000.npz", folder)  # squeezed into another bucket
    assert run_job(settings, *KOHYA, "--adopt") == 1
    printed = capsys.readouterr().err
    assert "img000000 is not adopted" in printed and "288x208, the settings give 288x224" in printed
    assert set(read_latest(folder)) == {"img000001"}


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("cache.dtype=float16", "holds float32, cache.dtype is float16"),
        ("cache.posterior=moments", "lacks moments, cache.posterior is moments"),
        ("data.resolution_px=320", "the settings give"),
    ],
)
def test_latents_of_other_settings_are_not_adopted(foreign, capsys, word, reason):
    settings, folder = foreign
    assert run_job(settings, *KOHYA, word, "--adopt") == 1
    assert reason in capsys.readouterr().err and read_latest(folder) == {}


def test_latents_of_another_image_or_without_flip_are_not_adopted(foreign, capsys):
    settings, folder = foreign
    sample = read_latents(folder / "img000000_0348x0256_sdxl.npz")
    (folder / "img000000.npz").write_bytes(pack_latents(replace(sample, flipped=None)))  # this name has precedence
    Image.new("RGB", (400, 264)).save(folder / "img000001.jpg")
    assert run_job(settings, *KOHYA, "--adopt") == 1
    printed = capsys.readouterr().err
    assert "has no latents of the mirrored image" in printed
    assert "was made from an image of 359x264 px, which now has 400x264" in printed
    records = open_record_index(folder, [], [folder])
    index = open_sample_index(folder, records)
    assert len(records) == 2 and len(index) == 0 and index.summary.num_bad == 0, "what is refused is not trained"
    shutil.copy(folder / "img000000_0348x0256_sdxl.npz", folder / "img000000.npz")
    assert open_sample_index(folder, records).arrow_column("key").to_pylist() == ["img000000"]


def read_as_kohya(path: Path, bucket: tuple[int, int]) -> dict:
    """Read an SDXL latent file as kohya's scripts do, with their checks."""
    npz = np.load(path)
    assert npz["latents"].shape[1:3] == (bucket[1] // 8, bucket[0] // 8)
    if "latents_flipped" in npz:
        assert npz["latents_flipped"].shape == npz["latents"].shape
    return {
        "latents": npz["latents"],
        "original_size": npz["original_size"].tolist(),
        "crop_ltrb": npz["crop_ltrb"].tolist(),
        "flipped": npz["latents_flipped"] if "latents_flipped" in npz else None,
    }


@pytest.mark.parametrize("flipped", [False, True])
def test_other_programs_can_read_the_latents(tmp_path, model, flipped):
    settings = write_settings(tmp_path, model, draw_demo_set(tmp_path / "data", num_images=4), flip=flipped)
    assert run_job(settings) == 0
    folder = tmp_path / "latents"
    for entry in read_latest(folder).values():
        with np.load(folder / entry.file, allow_pickle=False) as arrays:
            found = {key: (arrays[key].dtype, arrays[key].shape) for key in arrays}
        shape = (4, entry.bucket[1] // 8, entry.bucket[0] // 8)
        assert found == {
            "latents": (np.float32, shape),
            **({"latents_flipped": (np.float32, shape)} if flipped else {}),
            "original_size": (np.int64, (2,)),
            "crop_ltrb": (np.float64, (4,)),
        }
        read = read_as_kohya(folder / entry.file, entry.bucket)
        with Image.open(entry.source_path) as image:
            assert read["original_size"] == list(image.size)
        assert read["crop_ltrb"] == list(entry.crop) and (read["flipped"] is not None) == flipped
        assert entry.crop[2] - entry.crop[0] == entry.bucket[0] and entry.crop[3] - entry.crop[1] == entry.bucket[1]


def test_latents_lie_beside_the_images_if_no_folder_is_given(tmp_path, model):
    settings = write_settings(tmp_path, model, draw_demo_set(tmp_path / "data", num_images=4), dir=None)
    assert run_job(settings) == 0
    images = [path for path in (tmp_path / "data" / "images").iterdir() if path.suffix != ".npz"]
    assert len(images) == 4 and all(path.with_suffix(".npz").is_file() for path in images)
    folder = tmp_path / "data"
    assert (folder / "cache.json").is_file() and run_job(settings, "--verify") == 0
    hashes = hash_items(folder)
    assert run_job(settings, "--pack") == 0 and not list((folder / "images").glob("*.npz"))
    assert run_job(settings, "--unpack") == 0 and hash_items(folder) == hashes
    assert all(path.with_suffix(".npz").is_file() for path in images)


def test_alpha_masks_are_stored_if_the_setting_is_on(tmp_path, model):
    """Check kohya's format of `alpha_mask`: float32 from 0 to 1 per pixel of the bucket, cropped like the image."""
    (tmp_path / "images").mkdir()
    ramp = np.linspace(0, 255, 200).astype(np.uint8)[None].repeat(100, 0)
    Image.merge("RGBA", [Image.new("L", (200, 100), 90)] * 3 + [Image.fromarray(ramp)]).save(tmp_path / "images/a.png")
    Image.new("RGB", (200, 100), "red").save(tmp_path / "images" / "b.png")
    (tmp_path / "images" / "a.txt").write_text("a caption")
    settings = write_settings(tmp_path, model, flip=True)
    folder = tmp_path / "latents"
    assert run_job(settings) == 0
    assert read_latents(folder / "a.npz").alpha_mask is None
    assert run_job(settings, "cache.alpha_mask=true") == 0  # the setting changes the latent files
    assert json.loads((folder / "cache_report.json").read_text())["encoded"] == 2
    entry, mask = read_latest(folder)["a"], read_latents(folder / "a.npz").alpha_mask
    assert mask is not None and mask.dtype == np.float32 and mask.shape == (entry.bucket[1], entry.bucket[0])
    across = (np.arange(entry.crop[0], entry.crop[2]) + 0.5) / entry.resized[0]
    np.testing.assert_allclose(mask, np.broadcast_to(across, mask.shape), atol=0.01)
    assert read_latents(folder / "b.npz").alpha_mask is None  # without a mask, the loss counts everywhere
    assert run_job(settings, "cache.alpha_mask=true", "--verify") == 0


@pytest.mark.parametrize("where", ["cache", "beside", "shards"])
def test_latents_are_found_by_their_image_when_its_key_changes(tmp_path, model, where, capsys):
    """A second image `1` gives both keys with their folders; after its removal the first one is called `1` again."""
    folder = tmp_path / "latents" if where != "beside" else tmp_path / "images"
    settings = write_settings(tmp_path, model)
    form = "shards" if where == "shards" else "npz"
    words = (settings, f"cache.format={form}", *(["cache.dir=null"] if where == "beside" else []))
    paths = {name: tmp_path / "images" / f"{name}.png" for name in ("a/1", "b/2", "b/1")}
    for number, path in enumerate(paths.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 96 + 32 * (number % 2)), (number * 90, 20, 20)).save(path)
        path.with_suffix(".txt").write_text("a")
    added = paths["b/1"].rename(tmp_path / "b1.png")

    def list_trained() -> dict[str, str]:
        records = open_record_index(folder, [], [tmp_path / "images"])
        index = open_sample_index(folder, records)
        latents = {}
        for row in map(index.row, range(len(index))):
            content, start = (folder / row["file"]).read_bytes(), row["offset"] or 0
            content = content[start : start + row["bytes"]] if row["bytes"] else content
            latents[row["key"]] = parse_latents(content).latents.tobytes()
        return latents

    assert run_job(*words) == 0
    before = list_trained()
    assert set(before) == {"1", "2"}
    added.rename(paths["b/1"])
    assert set(list_trained()) == {"a/1", "2"}, "found without a cache job, and not taken for those of b/1"
    capsys.readouterr()
    assert run_job(*words) == 0
    assert "1 images have another key than before" in capsys.readouterr().err
    now = list_trained()
    assert set(now) == {"a/1", "2", "b/1"} and now["a/1"] == before["1"] != now["b/1"]
    Image.new("RGB", (128, 96), (7, 200, 7)).save(paths["a/1"])
    assert run_job(*words) == 0 and run_job(*words, "--verify") == 0
    now = list_trained()
    assert set(now) == {"a/1", "2", "b/1"} and now["a/1"] != before["1"]
    paths["b/1"].unlink()
    assert list_trained()["1"] in (before["1"], now["a/1"])
    assert run_job(*words) == 0
    last = list_trained()["1"]
    distance = np.abs(np.frombuffer(last, np.float32) - np.frombuffer(now["a/1"], np.float32)).mean()
    assert distance < 0.5, "the image as it is now; the draw from the posterior follows the key"
    if where == "cache":
        assert run_job(*words, "--pack") == 0 and list_trained()["1"] == last
