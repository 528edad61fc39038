"""The cache job with `cache.text`: text encoder outputs are stored beside the latents and verified like them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_samples import hash_items, list_files, run_job, write_settings

from sdxl_trainer.cache.encode import text_caching
from sdxl_trainer.cache.encode.storage import list_shards, read_text_item
from sdxl_trainer.cache.models.encoders import load_text_encoders, load_tokenizers
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.formats.manifest import ManifestEntry, read_latest
from sdxl_trainer.data.formats.shards import iterate_members
from sdxl_trainer.data.formats.text_outputs import TextOutputs, parse_text_outputs
from sdxl_trainer.data.images.demo_set import draw_demo_set
from sdxl_trainer.train.networks.conditioning import TextConditioner

TEXT = "cache.text=true"
SHUFFLED = ("data.caption.shuffle=true", 'data.caption.separator=" "', "cache.text_variants=3")
DATA_SUFFIXES = (".npz", ".tar")


@pytest.fixture(scope="module")
def model(tiny_folder) -> Path:
    return tiny_folder / "model"


@pytest.fixture(scope="module")
def filled(tmp_path_factory, model) -> Path:
    """Return a folder with settings and two filled caches with text of eight images, `npz` and `shards`."""
    folder = tmp_path_factory.mktemp("filled")
    settings = write_settings(folder, model, draw_demo_set(folder / "data", num_images=8))
    for form in ("npz", "shards"):
        assert run_job(settings, f"cache.dir={folder / form}", f"cache.format={form}", TEXT) == 0
    return folder


@pytest.fixture(params=["npz", "shards"])
def cache(request, filled, tmp_path):
    """Return (settings, words for the job, cache folder) of a copy of a filled cache with its own metadata file."""
    shutil.copytree(filled / request.param, tmp_path / "latents")
    metadata = json.loads((filled / "data" / "metadata.json").read_text())
    for record in metadata.values():
        record["image_path"] = str(filled / "data" / record["image_path"])
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    words = (
        f"cache.dir={tmp_path / 'latents'}",
        f"cache.format={request.param}",
        f"data.metadata=[{tmp_path / 'metadata.json'}]",
        TEXT,
    )
    return filled / "settings.yaml", words, tmp_path / "latents"


def read_texts(folder: Path) -> dict[str, list[TextOutputs]]:
    texts = {}
    for key, entry in read_latest(folder).items():
        content = read_text_item(folder, entry)
        assert content is not None and entry.text is not None, key
        texts[key] = parse_text_outputs(content, entry.text.variants)
    return texts


def hash_texts(folder: Path) -> dict[str, str]:
    return {key: entry.text.sha256 for key, entry in read_latest(folder).items() if entry.text is not None}


def get_report(folder: Path) -> dict:
    return json.loads((folder / "cache_report.json").read_text())


def encode(model: Path, caption: str, max_tokens: int = 75) -> TextOutputs:
    """Encode a caption as training does."""
    source, config = ModelSource(model), ModelConfig(path=str(model))
    conditioner = TextConditioner(load_text_encoders(source, config))
    ids = [
        torch.from_numpy(tokenizer.encode(caption, max_tokens))[None] for tokenizer in load_tokenizers(source, config)
    ]
    hidden, pooled = conditioner.encode(*ids)
    width = source.read_config("text_encoder")["hidden_size"]
    return TextOutputs(hidden[0, :, :width].numpy(), hidden[0, :, width:].numpy(), pooled[0].numpy())


def assert_near(found: TextOutputs, wanted: TextOutputs) -> None:
    for name in vars(wanted):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)


def test_outputs_equal_those_of_training(filled, model):
    captions = {key: r["caption"] for key, r in json.loads((filled / "data/metadata.json").read_text()).items()}
    plain, packed = read_texts(filled / "npz"), read_texts(filled / "shards")
    assert plain.keys() == packed.keys() == captions.keys()
    assert hash_texts(filled / "npz") == hash_texts(filled / "shards")  # outputs do not depend on order and batch
    for key, (outputs,) in plain.items():
        assert_near(outputs, encode(model, captions[key]))
    # Names and format are as in kohya's scripts.
    key, entry = next(iter(read_latest(filled / "npz").items()))
    assert entry.text is not None and entry.text.file == f"{key}_te_outputs.npz" and entry.file == f"{key}.npz"
    with np.load(filled / "npz" / entry.text.file, allow_pickle=False) as arrays:
        shapes = {name: (arrays[name].dtype, arrays[name].shape) for name in arrays}
    assert {name: (np.float32, shape[1]) for name, shape in shapes.items()} == shapes
    assert list(shapes) == ["hidden_state1", "hidden_state2", "pool2"] and shapes["hidden_state1"][1][0] == 77
    members = [
        kind for file in list_shards(filled / "shards") for _, kind, *_ in iterate_members(filled / "shards" / file)
    ]
    assert members == ["json", "npz", "te.npz"] * 8


def test_weighted_captions_of_an_own_class(filled, model, tmp_path, monkeypatch):
    """Their states are those of the plain caption, times the weights; the weighting is part of the identity."""
    (tmp_path / "own.py").write_text(
        "class Own:\n    def caption(self, record, rng):\n        return '(a red circle:1.5), [azure]'\n"
    )
    (tmp_path / "aliases.csv").write_text("azure,blue\n")
    words = [
        f"cache.dir={tmp_path / 'latents'}",
        f"data.strategy={tmp_path / 'own.py'}:Own",
        f"data.caption.aliases={tmp_path / 'aliases.csv'}",
        "data.caption.weighted=true",
        "data.max_tokens=300",
        TEXT,
    ]
    settings = filled / "settings.yaml"
    assert run_job(settings, *words) == 0 and get_report(tmp_path / "latents")["encoded"] == 8
    texts = read_texts(tmp_path / "latents")
    plain = encode(model, "a red circle, blue", 300)
    weights = np.ones((302, 1), np.float32)
    weights[1:4], weights[5] = 1.5, 1 / 1.1  # after the start mark; the comma has a token of its own
    expected = TextOutputs(plain.hidden_1 * weights, plain.hidden_2 * weights, plain.pooled)
    for (outputs,) in texts.values():
        assert outputs.hidden_1.shape[0] == 302
        assert_near(outputs, expected)
    # Without `weighted`, or with other aliases, all is made anew; the latents are kept.
    latents = hash_items(tmp_path / "latents")
    assert run_job(settings, *words) == 0 and get_report(tmp_path / "latents")["encoded"] == 0
    (tmp_path / "aliases.csv").write_text("azure,green\n")
    assert run_job(settings, *words) == 0 and get_report(tmp_path / "latents")["encoded"] == 8
    words.remove("data.caption.weighted=true")
    assert run_job(settings, *words) == 0 and get_report(tmp_path / "latents")["encoded"] == 8
    assert hash_items(tmp_path / "latents") == latents
    assert b"weighted" not in (tmp_path / "latents" / "text.json").read_bytes()  # as releases without it wrote


def test_text_encoders_are_loaded_only_for_work(cache, monkeypatch):
    settings, words, folder = cache

    def refuse(*_):
        raise AssertionError("text encoders were loaded")

    monkeypatch.setattr(text_caching, "load_text_encoders", refuse)
    before = list_files(folder)
    assert run_job(settings, *words) == 0 and get_report(folder)["encoded"] == 0
    assert run_job(settings, *words[:-1]) == 0 and get_report(folder)["encoded"] == 0  # cache.text off
    assert run_job(settings, *words, "--verify") == 0
    after = list_files(folder)
    assert all(after[name] == changed for name, changed in before.items() if name.endswith(DATA_SUFFIXES))


def test_an_edited_caption_is_encoded_again_and_no_other(cache, tmp_path, model):
    settings, words, folder = cache
    latents, texts = hash_items(folder), hash_texts(folder)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    edited, other, *_ = metadata
    metadata[edited]["caption"] = "a purple hexagon"
    metadata[other]["aesthetic_score"] = 5  # not a caption
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    assert run_job(settings, *words) == 0 and get_report(folder)["encoded"] == 1
    now = hash_texts(folder)
    assert {key for key in texts if now[key] != texts[key]} == {edited} and hash_items(folder) == latents
    assert_near(read_texts(folder)[edited][0], encode(model, "a purple hexagon"))
    assert run_job(settings, *words, "--verify") == 0
    assert run_job(settings, *words) == 0 and get_report(folder)["encoded"] == 0


def test_text_is_encoded_again_only_if_a_setting_changes_it(cache, model):
    settings, words, folder = cache
    latents, texts = hash_items(folder), hash_texts(folder)
    for word in ("cache.batch_size=3", "data.caption.dropout_rate=0.5", "cache.text_variants=4"):
        assert run_job(settings, *words, word) == 0 and get_report(folder)["encoded"] == 0, word
    assert run_job(settings, *words, "data.max_tokens=150") == 0 and get_report(folder)["encoded"] == 8
    assert hash_items(folder) == latents and all(
        each[0].hidden_1.shape[0] == 152 for each in read_texts(folder).values()
    )
    assert run_job(settings, *words, "data.max_tokens=150", "--verify") == 0
    assert run_job(settings, *words) == 0 and hash_texts(folder) == texts  # back to the first settings


def test_text_is_added_to_existing_latents(filled, tmp_path):
    for form in ("npz", "shards"):
        folder = tmp_path / form
        words = (filled / "settings.yaml", f"cache.dir={folder}", f"cache.format={form}")
        assert run_job(*words) == 0 and hash_texts(folder) == {}
        latents, before = hash_items(folder), list_files(folder)
        assert run_job(*words, TEXT) == 0
        assert hash_texts(folder) == hash_texts(filled / form) and hash_items(folder) == latents
        assert run_job(*words, TEXT, "--verify") == 0
        after = list_files(folder)
        if form == "npz":
            assert all(after[name] == changed for name, changed in before.items() if name.endswith(".npz"))


def test_random_captions_are_cached_as_variants(cache):
    settings, words, folder = cache
    assert run_job(settings, *words, *SHUFFLED) == 0
    entries = read_latest(folder)
    assert {entry.text.variants for entry in entries.values() if entry.text} == {3}
    for variants in read_texts(folder).values():
        assert len(variants) == 3 and not np.allclose(variants[0].hidden_1, variants[1].hidden_1)
    assert run_job(settings, *words, *SHUFFLED, "--verify") == 0
    texts = hash_texts(folder)
    assert run_job(settings, *words, *SHUFFLED, "run.seed=5") == 0 and hash_texts(folder) == texts


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.caption.shuffle=true", "cache.text_variants = 1"),
        ("data.caption.wildcards=true", "data.caption.wildcards makes a new one"),
        ("data.caption.token_warmup_steps=9", "data.caption.token_warmup_steps = 9"),
    ],
)
def test_contradictory_settings_are_refused(filled, tmp_path, capsys, setting, message):
    assert run_job(filled / "settings.yaml", f"cache.dir={tmp_path}", TEXT, setting) == 2
    assert message in capsys.readouterr().err and read_latest(tmp_path) == {}


def test_records_with_tags_and_a_description_need_variants(filled, tmp_path, capsys):
    """By default one of the two is picked at random."""
    metadata = json.loads((filled / "data" / "metadata.json").read_text())
    for record in metadata.values():
        record["image_path"] = str(filled / "data" / record["image_path"])
    metadata[max(metadata)]["description"] = "A circle on white."
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    words = (f"cache.dir={tmp_path}", f"data.metadata=[{tmp_path / 'metadata.json'}]", TEXT, "--dry-run")
    assert run_job(filled / "settings.yaml", *words) == 2
    assert "although data.caption.source makes a new one each time" in capsys.readouterr().err
    assert run_job(filled / "settings.yaml", *words, "data.caption.source=join") == 0


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def list_text_regions(folder: Path, entry: ManifestEntry) -> list[tuple[Path, int]]:
    """List one byte of each region of an item's text: tar header, zip header, values, directory, padding."""
    assert entry.text is not None
    path, start, end = folder / entry.text.file, entry.text.offset or 0, (entry.text.offset or 0) + entry.text.bytes
    places = [start + 3, start + 40, start + 900, end - entry.text.bytes // 2, end - 30, end - 1]
    return [(path, place) for place in places + ([start - 500, end + 1] if entry.text.offset is not None else [])]


def test_damaged_text_is_found_and_repaired(cache, capsys):
    settings, words, folder = cache
    latents, texts = hash_items(folder), hash_texts(folder)
    entries = sorted(read_latest(folder).values(), key=lambda entry: entry.key)
    for path, place in list_text_regions(folder, entries[0]):
        flip(path, place)
        assert run_job(settings, *words, "--verify") == 1, place
        assert path.name in capsys.readouterr().err
        flip(path, place)
    flip(*list_text_regions(folder, entries[0])[2])
    flip(folder / "text.json", 30)
    (folder / "manifest" / "empty_te_outputs.npz").unlink()
    assert run_job(settings, *words, "--verify") == 1 and "text.json: damaged" in capsys.readouterr().err
    assert run_job(settings, *words, "--repair") == 0
    assert run_job(settings, *words, "--verify") == 0
    assert hash_items(folder) == latents and hash_texts(folder) == texts
    assert get_report(folder)["encoded"] == 1
    # Without cache.text, bad outputs are only removed from the manifest.
    flip(*list_text_regions(folder, read_latest(folder)[entries[0].key])[2])
    assert run_job(settings, *words[:-1], "--repair") == 0
    assert run_job(settings, *words[:-1], "--verify") == 0
    assert hash_items(folder) == latents and entries[0].key not in hash_texts(folder)
    assert run_job(settings, *words) == 0 and hash_texts(folder) == texts


def test_pack_and_unpack_keep_every_byte(cache):
    settings, words, folder = cache
    latents, texts = hash_items(folder), hash_texts(folder)
    for mode in ["--pack", "--unpack", "--pack"] if "format=npz" in words[1] else ["--unpack", "--pack", "--unpack"]:
        assert run_job(settings, *words, mode) == 0
        assert (hash_items(folder), hash_texts(folder)) == (latents, texts)
        assert run_job(settings, *words, "--verify") == 0
        files = {name for name in list_files(folder) if name.endswith(".npz") and not name.startswith("manifest")}
        expected = {f"{key}{end}" for key in latents for end in (".npz", "_te_outputs.npz")}
        assert files == (set() if mode == "--pack" else expected)
        assert run_job(settings, *words) == 0 and get_report(folder)["encoded"] == 0


def test_stale_latents_keep_their_text(cache):
    settings, words, folder = cache
    texts, before = hash_texts(folder), list_files(folder)
    assert run_job(settings, *words, "cache.posterior=mean") == 0 and get_report(folder)["encoded"] == 8
    assert hash_texts(folder) == texts and run_job(settings, *words, "--verify") == 0
    after = list_files(folder)
    kept = [name for name in before if name.endswith("_te_outputs.npz")]
    assert all(after[name] == before[name] for name in kept) and ("npz" in words[1]) == (len(kept) > 1)
    if "shards" in words[1]:
        assert {entry.text.file for entry in read_latest(folder).values() if entry.text} == set(list_shards(folder))


def test_text_of_an_adopted_cache_has_kohyas_file_names(filled, tmp_path):
    folder = tmp_path / "latents"
    shutil.copytree(filled / "npz", folder)
    for entry in read_latest(folder).values():
        (folder / entry.file).rename(folder / f"{entry.key}_0128x0128_sdxl.npz")
    for path in (*folder.glob("*_te_outputs.npz"), *folder.glob("manifest/*"), folder / "text.json"):
        path.unlink()
    words = (filled / "settings.yaml", f"cache.dir={folder}")
    assert run_job(*words, "--adopt") == 0 and len(read_latest(folder)) == 8
    assert run_job(*words, TEXT) == 0 and get_report(folder)["encoded"] == 8
    assert {entry.text.file for entry in read_latest(folder).values() if entry.text} == {
        f"{key}_te_outputs.npz" for key in read_latest(folder)
    }
    assert all(entry.adopted for entry in read_latest(folder).values())
    assert run_job(*words, TEXT, "--verify") == 0


def test_text_of_other_programs_is_adopted_if_it_fits(filled, tmp_path, capsys):
    folder = tmp_path / "latents"
    shutil.copytree(filled / "npz", folder)
    texts = hash_texts(folder)
    for path in (*folder.glob("manifest/*"), folder / "text.json"):
        path.unlink()
    before = list_files(folder)
    misshapen, missing, truncated, *_ = sorted(texts)
    with np.load(folder / f"{misshapen}_te_outputs.npz") as arrays:
        np.savez(folder / f"{misshapen}_te_outputs.npz", **{key: array[:-1] for key, array in arrays.items()})
    (folder / f"{missing}_te_outputs.npz").unlink()
    (folder / f"{truncated}_te_outputs.npz").write_bytes((folder / f"{truncated}_te_outputs.npz").read_bytes()[:-9])
    words = (filled / "settings.yaml", f"cache.dir={folder}")
    assert run_job(*words, "--adopt") == 0 and hash_texts(folder) == {}  # cache.text is off
    assert run_job(*words, TEXT, *SHUFFLED, "--adopt") == 1
    assert "hidden_state1_v1" in capsys.readouterr().err and hash_texts(folder) == {}  # three variants are needed
    assert run_job(*words, TEXT, "--adopt") == 1
    printed = capsys.readouterr().err
    assert f"{misshapen} is not adopted" in printed and f"{truncated} is not adopted" in printed
    assert missing not in printed
    assert "the settings give [77, " in printed
    left = {key: digest for key, digest in texts.items() if key not in (misshapen, missing, truncated)}
    assert len(left) == 5 and hash_texts(folder) == left
    assert run_job(*words, TEXT, "--verify") == 0
    assert run_job(*words, TEXT) == 0 and get_report(folder)["encoded"] == 3 and hash_texts(folder) == texts
    kept = [f"{key}{end}" for key in left for end in (".npz", "_te_outputs.npz")]
    assert all(list_files(folder)[name] == before[name] for name in kept)


def test_text_in_shards_that_are_metadata_is_not_read(filled: Path, tmp_path: Path) -> None:
    """A cache job would encode nothing for them, so that is no cure."""
    words = [f"data.metadata=[{filled}/shards/shards/*.tar]", f"cache.dir={tmp_path / 'own'}", TEXT]
    config, _ = load_config(filled / "settings.yaml", words)
    (problem,) = text_caching.check_cached_text(config, open_training_set(config).index)
    assert "holds no cached text" in problem.rule and "launch/cache.sh" not in problem.cure
    config, _ = load_config(filled / "settings.yaml", [f"cache.dir={filled / 'shards'}", TEXT])
    assert list(text_caching.check_cached_text(config, open_training_set(config).index)) == []
