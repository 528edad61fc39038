"""The user's class: its results reach the batches, also through worker processes, and its failures are reported."""

import json
import pickle
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from loguru import logger
from programs import ROOT, run_program
from tiny_tokenizers import load_tiny_tokenizers

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.data.formats.latents import LatentSample, write_latents
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter
from sdxl_trainer.data.index.index import Index, open_record_index, open_sample_index
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings
from sdxl_trainer.data.loading.loader import build_plan, iterate_batches, iterate_specs
from sdxl_trainer.data.loading.micro_batch import MicroSpec
from sdxl_trainer.data.order.plan import Position
from sdxl_trainer.data.text.captions import CaptionSettings
from sdxl_trainer.data.text.strategy import (
    Strategy,
    StrategyError,
    check_strategy,
    compute_repeats,
    count_attributes,
    hash_repeats,
    load_repeats,
    load_strategy,
    save_repeats,
)
from sdxl_trainer.data.text.tag_rules import load_tag_rules

EXAMPLE = ROOT / "docs" / "examples" / "strategy.py"
BUCKET = (64, 96)
RECORDS = {
    "s0": {"caption": "1girl, best quality, solo", "artist": "alice", "aesthetic_score": 7, "safe_rating": "sensitive"},
    "s1": {"tags": ["1girl", "smile"], "artist": ["alice"], "characters": "miku, rin", "aesthetic_score": 3.9},
    "s2": {"caption": "scenery", "artist": "bob, carol", "characters": ["miku", "miku"], "aesthetic_score": 10},
    "s3": {"styles": ["flat"], "quality": "best", "safe_rating": "explicit", "extra": {"deep": [1]}},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Build a cache of four latents of one bucket, with a record for each."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "metadata.json").write_text(json.dumps(RECORDS))
    writer, latents = ManifestWriter(folder, 0), np.ones((4, 12, 8), np.float32)
    for key in RECORDS:
        content = write_latents(
            folder / f"{key}.npz", LatentSample(latents=latents, original_size=BUCKET, crop_ltrb=(0, 0, *BUCKET))
        )
        sizes = dict(bucket=BUCKET, original_size=BUCKET, resized=BUCKET, crop=(0, 0, *BUCKET), bytes=len(content))
        source = dict(source_path="", source_bytes=1, source_mtime_ns=1, source_sha256="")
        writer.append(ManifestEntry(key=key, file=f"{key}.npz", sha256="", identity="", **sizes, **source))
    writer.close()
    return folder


@pytest.fixture
def index(cache) -> Index:
    return open_sample_index(cache, open_record_index(cache, [cache / "metadata.json"], []))


def write_class(folder: Path, body: str, name: str = "user.py") -> str:
    """Write a file with a class of this body; return its spec."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / name).write_text(f"import numpy as np\n\n\nclass Mine:\n{indented}\n")
    return f"{folder / name}:Mine"


def build_dataset(cache: Path, index: Index, strategy: Strategy | None, **caption) -> LatentDataset:
    tokenizers = load_tiny_tokenizers()
    settings = CaptionSettings(**caption)
    return LatentDataset(index, cache, tokenizers, SampleSettings(seed=5, max_tokens=75, caption=settings), strategy)


def read_captions(dataset: LatentDataset, rows: list[int], epoch: int = 0, step: int = 0) -> list[str]:
    """Return the captions that text encoder 1 gets."""
    spec = MicroSpec(
        bucket=BUCKET, rows=np.array(rows), epochs=np.full(len(rows), epoch), positions=np.arange(len(rows)), step=step
    )
    tokenizer = dataset.tokenizers[0].tokenizer
    return [tokenizer.decode(ids[0].tolist()).replace("</w>", " ") for ids in dataset[spec].input_ids]


def encode(dataset: LatentDataset, *captions: str) -> np.ndarray:
    return np.stack([dataset.tokenizers[0].encode(caption) for caption in captions])


def read_all(dataset: LatentDataset) -> torch.Tensor:
    rows = np.arange(len(RECORDS))
    return dataset[MicroSpec(bucket=BUCKET, rows=rows, epochs=rows * 0, positions=rows)].input_ids


def test_attributes_are_counted_once_per_record(index):
    counts = count_attributes(index)
    assert dict(counts) == {
        "artist": Counter(alice=2, bob=1, carol=1),
        "characters": Counter(miku=2, rin=1),
        "styles": Counter(flat=1),
        "quality": Counter(best=1),
    }
    assert counts["tags"] == Counter({"1girl": 2, "best quality": 1, "solo": 1, "smile": 1, "scenery": 1})
    assert counts["artist"]["nobody"] == 0
    with pytest.raises(KeyError, match="known: artist, characters"):
        counts["artists"]


def test_repeats_reach_the_plan(index, tmp_path):
    spec = write_class(
        tmp_path,
        """
def repeats(self, record, counts):
    assert set(counts) == {"artist", "characters", "styles", "quality"}
    return {"s0": 3, "s1": 0, "s2": np.float32(0.5), "s3": counts["artist"]["alice"]}[record["key"]]
""",
    )
    repeats = compute_repeats(load_strategy(spec), index)
    assert repeats.tolist() == [3, 0, 0.5, 2]
    save_repeats(tmp_path / "repeats.npy", repeats)
    loaded = load_repeats(tmp_path / "repeats.npy")
    assert np.array_equal(loaded, repeats) and hash_repeats(loaded) == hash_repeats(repeats)
    assert hash_repeats(repeats + 1) != hash_repeats(repeats)
    plan = build_plan(index, 1, 0, loaded)
    drawn = Counter(
        int(plan.batch(Position(epoch, number)).rows[0])
        for epoch in range(4)
        for number in range(plan.num_batches(epoch))
    )
    assert drawn == {0: 12, 2: 2, 3: 8}


def test_captions_and_weights_reach_the_batch(cache, index, tmp_path):
    spec = write_class(
        tmp_path,
        """
def caption(self, record, rng):
    return f"{record['key']} {rng.integers(1000)}"
def loss_weight(self, record):
    weight = 0.25 if record.get("extra") == {"deep": [1]} else np.float64(2)
    return 0 if record["key"] == "s1" else weight
""",
    )
    dataset = build_dataset(cache, index, load_strategy(spec))
    rows = np.arange(4)
    first, second = (
        dataset[MicroSpec(bucket=BUCKET, rows=rows, epochs=rows * 0 + epoch, positions=rows)] for epoch in (0, 1)
    )
    assert first.weights.tolist() == [2, 0, 2, 0.25] and first.weights.dtype == torch.float32 and first.bad == []
    assert first.input_ids.equal(read_all(dataset)) and not first.input_ids.equal(second.input_ids)
    keys = [int(re.sub(r"\D", "", text)[0]) for text in read_captions(dataset, [0, 1, 2, 3])]
    assert keys == [0, 1, 2, 3]


def test_the_pipeline_applies_to_the_users_caption(cache, index, tmp_path):
    strategy = load_strategy(write_class(tmp_path, 'def caption(self, record, rng):\n    return "a ||| b, c ||| d"\n'))
    for caption, expected in (
        ({}, "a ||| b, c ||| d"),
        ({"keep_tokens_separator": "|||", "tag_dropout_rate": 1.0, "prefix": "p,"}, "p, a, d"),
        ({"dropout_rate": 1.0}, ""),
        ({"source": "description"}, "a ||| b, c ||| d"),  # the source applies only to records
    ):
        dataset = build_dataset(cache, index, strategy, **caption)
        assert np.array_equal(read_all(dataset).numpy(), encode(dataset, *[expected] * 4)), caption


def test_without_a_strategy_captions_come_from_the_record(cache, index):
    dataset = build_dataset(cache, index, None, keep_tokens=1, tag_dropout_rate=1.0)
    assert np.array_equal(read_all(dataset).numpy(), encode(dataset, "1girl", "1girl", "scenery", ""))


def test_token_warm_up_follows_the_step_on_any_rank_and_after_a_resume(cache, index):
    dataset = build_dataset(cache, index, None, token_warmup_steps=2, token_warmup_min=1)
    plan = build_plan(index, 4, 0)
    for rank in (0, 1):
        specs = list(islice(iterate_specs(plan, Position(0, 0), rank, 2, 1), 6))
        assert [spec.step for spec in specs] == [0, 0, 1, 1, 2, 2]
        resumed = next(iterate_specs(plan, Position(1, 0), rank, 2, 1, step=1))
        assert resumed.step == 1 and np.array_equal(resumed.rows, specs[2].rows)
    text = {0: "1girl", 1: "1girl, best quality", 2: "1girl, best quality, solo"}
    for step, expected in text.items():
        spec = MicroSpec(bucket=BUCKET, rows=np.array([0]), epochs=np.array([0]), positions=np.array([0]), step=step)
        assert np.array_equal(dataset[spec].input_ids.numpy(), encode(dataset, expected))


def test_a_worker_process_loads_its_own_class(cache, index, tmp_path):
    spec = write_class(
        tmp_path,
        """
def __init__(self):
    import os
    self.process = os.getpid()
def caption(self, record, rng):
    if record["key"] == "s1":
        raise IndexError("no tags here")
    return f"({record['key']} {rng.integers(1000)}, kitty:1.5), solo"
def loss_weight(self, record):
    import os
    assert self.process == os.getpid()
    return 1 + int(record["key"][1])
""",
    )
    (tmp_path / "aliases.csv").write_text("kitty,cat\n")
    rules = load_tag_rules(CaptionConfig(aliases=str(tmp_path / "aliases.csv"), protected_tags=["solo"]))
    dataset = build_dataset(
        cache, index, load_strategy(spec), shuffle=True, dropout_rate=0.2, weighted=True, rules=rules
    )
    plan = build_plan(index, 4, 0)
    in_process, in_worker = (
        list(islice(iterate_batches(dataset, iterate_specs(plan, Position(0, 0), 0, 1, 2), workers), 6))
        for workers in (0, 1)
    )
    for expected, found in zip(in_process, in_worker, strict=True):
        assert found.input_ids.equal(expected.input_ids) and found.token_weights.equal(expected.token_weights)
        assert found.weights.equal(expected.weights) and found.bad == expected.bad
        assert found.weights.tolist() == [0 if row == 1 else 1 + row for row in found.rows.tolist()]
    assert sum(len(batch.bad) for batch in in_worker) == 3  # once in each of 3 epochs
    # `solo` keeps its place at the end; the group's weight is that of each of its tags, also of the alias.
    ends = encode(dataset, ", cat, solo"), encode(dataset, ", solo")
    cats = [ids for batch in in_worker for ids in batch.input_ids.tolist() if ends[0][0, 0, 2] in ids[0]]
    ending = [token for token in ends[1][0, 0].tolist() if token not in (ends[1][0, 0, 0], ends[1][0, 0, -1])]
    for ids in cats:
        text = [token for token in ids[0] if token not in (ids[0][0], ids[0][-1])]
        assert text[-len(ending) :] == ending
    assert len(cats) >= 5
    weights = {value for batch in in_worker for value in batch.token_weights.unique().tolist()}
    assert weights == {1.0, 1.5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def caption(self, record, rng): return {}['x']", "caption of data.strategy = SPEC raised KeyError: 'x'\n  T"),
        ("def loss_weight(self, record): return 1 / 0", "s2: Mine.loss_weight of data.strategy = SPEC raised ZeroDiv"),
        (
            "def caption(self, record, rng): return None",
            "s2: Mine.caption of data.strategy = SPEC returned None, which",
        ),
        ("def loss_weight(self, record): return '2'", "Mine.loss_weight of data.strategy = SPEC returned '2', which"),
        (
            "def loss_weight(self, record): return float('nan')",
            "returned nan, which is not a finite number of 0 or more",
        ),
        ("def loss_weight(self, record): return -1", "returned -1, which is not a finite number of 0 or more"),
        ("def caption(self, record, rng):\n    class Own(Exception): pass\n    raise Own('mine')", "raised Own: mine"),
        ("def caption(self, record, rng): return self.caption(record, rng)", "raised RecursionError"),
    ],
)
def test_a_failing_strategy_makes_a_bad_sample(cache, index, tmp_path, body, message):
    strategy = load_strategy(write_class(tmp_path, body))
    dataset = build_dataset(cache, index, strategy, prefix="p")
    rows = np.array([2, 0])
    batch = dataset[MicroSpec(bucket=BUCKET, rows=rows, epochs=rows * 0, positions=rows)]
    assert batch.weights.tolist() == [0, 0] and batch.latents.eq(1).all()
    assert [key for key, _ in batch.bad] == ["s2", "s0"]
    reason = batch.bad[0][1]
    assert reason.startswith("s2: ") and message.replace("SPEC", strategy.spec) in reason
    if "raised" in message:  # the traceback begins in the user's file
        assert "Traceback" in reason and str(tmp_path / "user.py") in reason and "data/text/strategy.py" not in reason
    # The check before a run finds failures on all samples.
    [problem] = check_strategy(strategy, index)
    assert problem.key == "data.strategy" and "failed on all samples tried: s0: " in str(problem)


def test_a_sample_that_is_bad_twice_is_counted_once(cache, index, tmp_path):
    strategy = load_strategy(write_class(tmp_path, "def loss_weight(self, record): raise ValueError"))
    content = (cache / "s2.npz").read_bytes()
    try:
        (cache / "s2.npz").unlink()
        batch = build_dataset(cache, index, strategy)[
            MicroSpec(bucket=BUCKET, rows=np.array([2]), epochs=np.array([0]), positions=np.array([0]))
        ]
    finally:
        (cache / "s2.npz").write_bytes(content)
    [(key, reason)] = batch.bad
    assert key == "s2" and "No such file" in reason


def test_a_strategy_that_fails_on_some_samples_passes_the_check(index, tmp_path):
    body = "def caption(self, record, rng):\n    assert record['key'] != 's0'\n    return ''"
    warnings: list[str] = []
    sink = logger.add(lambda message: warnings.append(message.record["message"]), level="WARNING")
    assert list(check_strategy(load_strategy(write_class(tmp_path, body)), index)) == []
    logger.remove(sink)
    [warning] = warnings
    assert warning.startswith("caption of data.strategy failed on 1 of 4 samples tried; training skips such samples; ")
    assert "first error: s0: Mine.caption of data.strategy = " in warning and "AssertionError" in warning


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return {'s2': 0}.get(record['key']) or counts['x']",
            "s0: Mine.repeats of data.strategy = SPEC raised KeyError",
        ),
        (
            "return 1 if record['key'] < 's2' else -1",
            "s2: Mine.repeats of data.strategy = SPEC returned -1, which is not",
        ),
        ("return 1 if record['key'] < 's3' else '1'", "s3: Mine.repeats of data.strategy = SPEC returned '1', which"),
        ("return float('inf')", "s0: Mine.repeats of data.strategy = SPEC returned inf"),
        ("return 0", "repeats() is 0 for all 4 samples"),
    ],
)
def test_failing_repeats_stop_the_start(index, tmp_path, body, message):
    spec = write_class(tmp_path, f"def repeats(self, record, counts):\n    {body}")
    with pytest.raises(UserInputError) as caught:
        compute_repeats(load_strategy(spec), index)
    assert message.replace("SPEC", spec) in str(caught.value)
    assert ("Traceback" in str(caught.value)) == ("raised" in message)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_colon.py", "is not path/to/file.py:ClassName"),
        ("x.py:", "is not path/to/file.py:ClassName"),
        ("absent.py:Mine", "absent.py is not a file"),
        ("FOLDER/broken.py:Mine", "cannot be loaded: SyntaxError"),
        ("FOLDER/raises.py:Mine", "cannot be loaded: RuntimeError: at import\n  Traceback"),
        ("FOLDER/user.py:Yours", "has no class Yours\n      cure: name one that it has: Mine"),
        ("FOLDER/user.py:np", "needs a class, but np is of type module\n      cure: name one that it has: Mine"),
        (
            "FOLDER/functions.py:caption",
            "needs a class, but caption is of type function\n      cure: write a class with the methods that "
            "docs/STRATEGY.md shows",
        ),
        ("FOLDER/functions.py:Mine", "has no class Mine\n      cure: write a class with the methods that docs/STRAT"),
        (
            "FOLDER/user.py:Mine",
            "none of the methods repeats(record, counts), caption(record, rng), loss_weight(record)\n"
            "      cure: rename repeat to repeats, rename captions to caption",
        ),
        ("FOLDER/init.py:Mine", "Mine() raised TypeError"),
        ("no.such.module:Mine", "names a module that does not exist: no.such.module"),
        ("collections:OrderedDict", "has none of the methods"),
    ],
)
def test_strategies_that_cannot_be_loaded_are_explained(tmp_path, spec, message):
    write_class(tmp_path, "def repeat(self): pass\ndef captions(self): pass\nother = 3")
    write_class(tmp_path, "def __init__(self, needed): pass\ndef repeats(self, r, c): return 1", "init.py")
    (tmp_path / "functions.py").write_text("from pathlib import Path\ndef caption(record, rng): return ''")
    (tmp_path / "broken.py").write_text("class Mine:\n  def (")
    (tmp_path / "raises.py").write_text("raise RuntimeError('at import')")
    with pytest.raises(UserInputError) as caught:
        load_strategy(spec.replace("FOLDER", str(tmp_path)))
    [problem] = caught.value.problems
    assert problem.key == "data.strategy" and message in str(problem), str(problem)


def test_files_of_one_name_are_separate_and_modules_can_be_loaded(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_class(tmp_path / name, f"def caption(self, record, rng): return {name!r}", "json.py")
    monkeypatch.chdir(tmp_path)
    one, two = load_strategy("one/json.py:Mine"), load_strategy(f"{tmp_path}/two/json.py:Mine")
    monkeypatch.chdir("/")  # a pickled strategy does not depend on the working directory
    rng = np.random.default_rng(0)
    assert [pickle.loads(pickle.dumps(strategy)).caption({}, rng) for strategy in (one, two)] == ["one", "two"]
    monkeypatch.syspath_prepend(str(tmp_path))
    write_class(tmp_path, "def loss_weight(self, record): return 3", "my_strategy_module.py")
    module = pickle.loads(pickle.dumps(load_strategy("my_strategy_module:Mine")))
    assert module.loss_weight({}) == 3 and [module.has(method) for method in ("repeats", "caption", "loss_weight")] == [
        False,
        False,
        True,
    ]
    assert one.loss_weight({}) == 1
    with pytest.raises(StrategyError, match="k: Mine.caption .* not a string"):
        load_strategy(write_class(tmp_path, "def caption(self, *a): return 3")).caption({"key": "k"}, rng)


def test_the_documented_example_behaves_as_documented(cache, index):
    page = (ROOT / "docs" / "STRATEGY.md").read_text()
    assert EXAMPLE.read_text() in page, "docs/STRATEGY.md shows another example than docs/examples/strategy.py"
    strategy = load_strategy(f"{EXAMPLE}:Strategy")
    assert list(check_strategy(strategy, index)) == []
    assert compute_repeats(strategy, index).tolist() == [2, 0, 3, 1]
    dataset = build_dataset(cache, index, strategy, keep_tokens_separator="|||", shuffle=True)
    rows = np.arange(4)
    seen = set()
    for epoch in range(40):
        batch = dataset[MicroSpec(bucket=BUCKET, rows=rows, epochs=rows * 0 + epoch, positions=rows)]
        np.testing.assert_allclose(batch.weights.numpy(), [1, 1, 1, 0.4])
        seen.add(batch.input_ids[0].numpy().tobytes())
    fronts, rests = ("by alice, best quality, ", "by alice, "), ("1girl, solo", "solo, 1girl")
    texts = [front + rest for front in fronts for rest in rests]
    assert seen == {encode(dataset, text).tobytes() for text in texts}


def test_the_example_uses_artists_with_many_images_less_often():
    spec = load_strategy(f"{EXAMPLE}:Strategy")
    counts = {"artist": Counter(many=400, few=3)}
    records = [{"key": name, "artist": name, "aesthetic_score": 7} for name in ("many", "few")]
    assert spec.repeats(records, counts, 2).tolist() == [1, 2]


def test_a_run_uses_the_strategy_and_refuses_to_resume_with_other_repeats(cached_folder, tmp_path):
    """Train twice: repeats are stored in the run folder, bad samples are reported, changed repeats are refused."""
    body = """
def repeats(self, record, counts):
    return 2 if "red" in record["caption"] else 1
def caption(self, record, rng):
    assert record["key"][:4] != "0003"
    return record["caption"]
"""
    spec = write_class(tmp_path, body)
    words = ["train/main.py", "--cfg", cached_folder / "tiny.yaml", "sample.prompts=[]", "run.name=strategy"]
    words += [f"data.strategy={spec}", "data.max_bad_fraction=1", "checkpoint.every_steps=0"]
    run_program(*words, "train.max_steps=8")
    folder = cached_folder / "runs" / "strategy"
    keys = list(json.loads((cached_folder / "data" / "metadata.json").read_text()))
    assert load_repeats(folder / "repeats.npy").tolist() == [2 if "red" in key else 1 for key in keys]
    bad = [json.loads(line) for line in (folder / "logs" / "bad_samples.jsonl").read_text().splitlines()]
    assert bad and {line["key"][:4] for line in bad} == {"0003"} and "Mine.caption" in bad[0]["reason"]
    write_class(tmp_path, body.replace("return 2", "return 3"))
    printed = run_program(*words, "train.max_steps=9", expect=2)
    warning, _, problems = printed.partition(" in the settings:")
    assert "caption of data.strategy failed on 1 of " in warning and "Traceback" not in problems
    assert "run.on_data_change: continue" in problems
    printed = run_program(*words, "data.strategy=absent.py:Mine", "model.path=/no/model", "--dry-run", expect=2)
    assert "absent.py is not a file" in printed and "model.path" in printed and "Traceback" not in printed
