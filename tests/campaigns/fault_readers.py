"""Faults of what is read: fuzzed files, metadata values of every shape, and settings that mean something else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from campaigns.fault_jobs import HANG, MESSAGE, WRONG, Case, Outcome
from campaigns.fuzzed_readers import BORDERS
from campaigns.fuzzing import fuzz

from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.data.metadata.blocks import read_blocks
from sdxl_trainer.data.metadata.records import ImageFinder, build_record_rows, parse_record

FUZZ_SECONDS = 1.5
REFUSED = "refused"


def fuzz_readers(case: Case) -> Iterator[Outcome]:
    """Fuzz two of the readers for some seconds each. One reader in one case counts as one fault."""
    for border in case.rng.sample(BORDERS, 2):
        findings = fuzz(border, str(case.rng.random()), FUZZ_SECONDS)
        outcome = Outcome(f"fuzzed: {border.name}, {findings.num_inputs} inputs")
        for number, (failure, content) in enumerate(findings.failures.items()):
            kept = case.base.folder / "crashers" / f"{border.name}-{case.folder.name}-{number}{border.suffix}"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(content)
            outcome.check(HANG if "hangs" in failure else MESSAGE, False, f"{failure}: {kept}")
        yield outcome


# Values of `tags`, and what is trained: a text, None for a missing caption, or REFUSED.
VALUES: list[tuple[Any, Any]] = [
    ("1girl, solo", "1girl, solo"),
    (["1girl", "solo"], "1girl, solo"),
    ({"1girl": 0.99, "solo": 0.5}, "1girl, solo"),
    ({"1girl": 1}, "1girl"),
    (["a", None, "b"], "a, b"),
    (["a", "", "b"], "a, b"),
    ([None], None),
    ([], None),
    ("", None),
    ("   ", None),
    (["  "], None),
    (None, None),
    (17, "17"),
    ([1, "b"], "1, b"),
    (True, REFUSED),
    ([True, "a"], REFUSED),
    ({"a": "b"}, REFUSED),
    ({"a": None}, None),
    ({"a": {"b": 1}}, REFUSED),
    ([["a", "b"]], REFUSED),
    ([{"a": 0.5}], REFUSED),
]
PATHS: list[Any] = [["a.png"], {"a": 1}, True, 17.5, ["a.png", "b.png"]]
FORMATS = ("json", "jsonl", "parquet")


def read_odd_values(case: Case) -> Iterator[Outcome]:
    """Read records whose caption, tags or path have another shape than usual, in every format."""
    for form in FORMATS:
        field = case.rng.choice(("tags", "caption"))
        for value, expected in case.rng.sample(VALUES, 5):
            outcome = Outcome(f"{form}: {field} = {json.dumps(value)}")
            found = _read_caption(case.folder / f"records.{form}", form, field, value, outcome)
            outcome.check(WRONG, found == expected, f"is read as {found!r}, not {expected!r}")
            yield outcome
        value = case.rng.choice(PATHS)
        outcome = Outcome(f"{form}: image_path = {json.dumps(value)}")
        found = _read_caption(case.folder / f"records.{form}", form, "image_path", value, outcome)
        outcome.check(WRONG, found == REFUSED, f"is read as a path, with the caption {found!r}")
        yield outcome


def _read_caption(file: Path, form: str, field: str, value: Any, outcome: Outcome) -> Any:
    """Return the caption of a record, or REFUSED."""
    record = {"image_path": "a.png", field: value}
    if form == "json":
        file.write_text(json.dumps({"key-of-record": {**record, "image_path": record["image_path"]}}))
    elif form == "jsonl":
        file.write_text(json.dumps(record) + "\n")
    else:
        try:
            pq.write_table(pa.Table.from_pylist([record]), file)
        except pa.ArrowException:  # mixed types: no Parquet file can hold them
            file = file.with_suffix(".jsonl")
            file.write_text(json.dumps(record) + "\n")
    try:
        finder = ImageFinder([])
        rows = [row for block in read_blocks(file) for row in build_record_rows(block, finder, ",").to_pylist()]
        return parse_record(rows[0])["caption"]
    except ValueError as error:
        outcome.check(MESSAGE, file.name in str(error), f"file not named: {error}")
        outcome.check(MESSAGE, field in str(error) or "path" in str(error), f"field not named: {error}")
        return REFUSED


NULL_WORDS = ("none", "null", "~", "")
TEXT_SETTINGS = ("model.vae", "data.masks", "data.strategy", "cache.dir", "sample.prompt_file", "log.wandb")
# A setting, the word of the command line, and what it must mean.
WORDS: list[tuple[str, str, Any]] = [
    *((name, word, None) for name in TEXT_SETTINGS for word in NULL_WORDS),
    ("optim.lr", "1e-5", 1e-5),
    ("optim.kwargs", "{fused: 5e8}", {"fused": 5e8}),
    ("optim.kwargs", "{a: 1e0}", {"a": 1.0}),
    (
        "engine.deepspeed",
        "{zero_optimization: {reduce_bucket_size: 5e8}}",
        {"zero_optimization": {"reduce_bucket_size": 5e8}},
    ),
    ("train.max_steps", "010", REFUSED),
    ("train.max_steps", "1_000", REFUSED),
    ("run.name", "2026-11-28", REFUSED),
    ("run.name", "1:30", REFUSED),
    ("run.seed", "0o17", 15),
    ("cache.text", "yes", True),
    ("cache.text", "off", False),
    ("cache.dir", "~/x", str(Path("~/x").expanduser())),
    ("cache.dir", "$HOME/x", str(Path.home() / "x")),
    ("cache.dir", "${HOME}/x", str(Path.home() / "x")),
    ("run.dir", "~/x", str(Path("~/x").expanduser())),
    ("data.metadata", "~/a.json", [str(Path("~/a.json").expanduser())]),
]


def read_odd_settings(case: Case) -> Iterator[Outcome]:
    """Give settings in words that YAML or a shell may read in another way."""
    for key, word, expected in case.rng.sample(WORDS, 10):
        outcome = Outcome(f"setting: {key}={word}")
        try:
            config, problems = build_config({}, [f"{key}={word}"])
            found = config.model_dump(mode="json")
            for part in key.split("."):
                found = found[part]
        except UserInputError as error:
            problems, found = error.problems, None
        refused = [problem for problem in problems if problem.key == key]
        if refused:
            found = REFUSED
            outcome.check(MESSAGE, bool(refused[0].cure), f"no cure: {refused[0]}")
        outcome.check(WRONG, found == expected, f"means {found!r}, not {expected!r}")
        yield outcome
