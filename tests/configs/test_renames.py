"""Old names of settings: accepted with a warning in files, overrides and checkpoints, and not reported as a change."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from loguru import logger

from sdxl_trainer.configs.load import build_config, iterate_keys, load_config, suggest_key
from sdxl_trainer.configs.renames import RENAMED
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.checkpoint.resume import list_changes
from sdxl_trainer.train.checkpoint.state import TrainState

# Old key → a value other than the default.
VALUES: dict[str, Any] = {
    "data.check": "full",
    "data.missing_caption": "skip",
    "data.stream": {"copies_gb": 5.0},
    "data.weights": [1.0, 0.5],
    "sample.scheduler": "ddim",
    "train.non_finite": "stop",
}


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{message}", level="WARNING")
    yield lines
    logger.remove(sink)


def nest(key: str, value: Any) -> dict[str, Any]:
    section, name = key.split(".")
    return {section: {name: value}}


def test_every_renamed_setting_is_in_the_table() -> None:
    known = set(iterate_keys())
    assert VALUES.keys() == RENAMED.keys() and not known & RENAMED.keys() and set(RENAMED.values()) <= known


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_accepted_with_one_warning(old: str, new: str, tmp_path: Path, warnings: list[str]) -> None:
    value = VALUES[old]
    expected = Config.model_validate(nest(new, value))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(nest(old, value)))
    (tmp_path / "empty.yaml").write_text("")
    section, name = old.split(".")
    for file, overrides in [
        ("x.yaml", []),
        ("empty.yaml", [f"{old}={value}"]),
        ("empty.yaml", [f"{section}={{{name}: {value}}}"]),
        ("x.yaml", [f"{new}={value}"]),  # an override takes precedence over the file, under either name
    ]:
        warnings.clear()
        assert load_config(tmp_path / file, overrides) == (expected, [])
        assert len(warnings) == 1 and f"{old} is now called {new}" in warnings[0]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_and_a_new_name_together_are_a_problem(old: str, new: str) -> None:
    value = VALUES[old]
    section, name = old.split(".")
    both = {section: {name: value, new.split(".")[1]: value}}
    for problems in (build_config(both)[1], build_config({}, [f"{old}={value}", f"{new}={value}"])[1]):
        assert [(problem.key, problem.cure) for problem in problems] == [(old, f"remove {old}")]
        assert f"the old name of {new}" in problems[0].rule


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_unknown_keys_close_to_old_names_get_suggestions(old: str, new: str) -> None:
    section, name = old.split(".")
    assert suggest_key(f"{section}.{name[:-2]}{name[-1]}") == new
    assert suggest_key(f"optim.{name}") == {"scheduler": "optim.schedule"}.get(name, new)


def test_keys_of_a_renamed_section_are_renamed_too(warnings: list[str]) -> None:
    config, problems = build_config({}, ["data.stream.copies_gb=5", "data.stream.shuffle_shards=3"])
    assert problems == [] and len(warnings) == 1
    assert (config.data.remote_shards.copies_gb, config.data.remote_shards.shuffle_shards) == (5.0, 3)
    problems = build_config({"data": {"stream": {"copy_gb": 5}}})[1]
    assert [(problem.key, problem.cure) for problem in problems] == [
        ("data.remote_shards.copy_gb", "did you mean data.remote_shards.copies_gb?")
    ]
    assert build_config({"data": {"stream": None}})[1] == []  # all its keys are commented out


def test_build_config_does_not_change_its_argument() -> None:
    given = {"data": {"check": "none", "stream": {}}}
    build_config(given, ["data.stream.copies_gb=5"])
    assert given == {"data": {"check": "none", "stream": {}}}


def test_only_the_first_rank_warns(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert build_config({}, ["data.check=none"])[0].data.verify_latents == "none" and warnings == []


@pytest.mark.parametrize("old", RENAMED)
def test_a_resume_does_not_report_renames(old: str, tmp_path: Path, warnings: list[str]) -> None:
    """Settings in a checkpoint of an earlier version: only values that differ are changes, under the current name."""
    config = Config.model_validate(nest(RENAMED[old], VALUES[old])).model_dump(mode="json")
    section, name = old.split(".")
    saved = {**config, section: dict(config[section])}
    saved[section][name] = saved[section].pop(RENAMED[old].split(".")[1])
    (tmp_path / "trainer_state.json").write_bytes(orjson.dumps({"step": 3, "config": saved}))
    state = TrainState.load(tmp_path)
    assert list_changes(state.config, config) == [] and warnings == []
    now = Config().model_dump(mode="json")
    changed = [key for key, _, _ in list_changes(state.config, now)]
    alters_training = old in ("data.weights", "train.non_finite")
    assert changed == ([RENAMED[old]] if alters_training else [])
