"""Checks of `model.path` and `model.config`: each kind of wrong path has its own message."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from samples.single_file_samples import TINY, fake_tensors, write_fake

from sdxl_trainer.cache.models.single_file_check import SDXL_CONFIG_FOLDER
from sdxl_trainer.cache.models.source import PIPELINE_FILES, check_model, fetch_from_hub
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import ModelConfig


def list_problems(**settings: object) -> list[Problem]:
    return list(check_model(ModelConfig.model_validate(settings)))


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("", "must be set"),
        ("models/absent", "does not exist; it is not looked up on the hub, because the folder models exists here"),
        ("somebody/model.safetensors", "is neither a file nor a folder, relative to the working directory"),
        ("empty", "is not an SDXL model in diffusers layout: it lacks unet/config.json"),
    ],
)
def test_wrong_paths_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, rule: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "empty").mkdir()
    [problem] = list_problems(path=path)
    assert problem.key == "model.path" and problem.rule.startswith(rule)


def test_the_working_directory_is_named_for_relative_paths_alone() -> None:
    for name, rule in (("path", "is neither a file nor a folder"), ("vae", "is neither a file, a folder nor a hub id")):
        for path, ending in (("/no/such/model", ""), ("no/such/model", ", relative to the working directory")):
            rules = {problem.key: problem.rule for problem in list_problems(**{"path": "a/b", name: path})}
            assert rules == {f"model.{name}": rule + ending}


def test_a_hub_id_is_not_asked_for_before_it_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list_problems(path="somebody/model") == []


@pytest.mark.parametrize("name", ["vae/config.json", *PIPELINE_FILES])
@pytest.mark.parametrize(
    ("content", "rule"), [(None, "lacks {}"), ("{", "{}/{} is not valid JSON"), ("[]", "{}/{} is not a JSON object")]
)
def test_a_missing_or_damaged_config_is_a_problem(tmp_path: Path, name: str, content: str | None, rule: str) -> None:
    """Sampling and the export read some configs only at the end of a run."""
    folder = shutil.copytree(SDXL_CONFIG_FOLDER, tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    expected = rule.format(*[name] if content is None else [folder, name])
    *_, problem = list_problems(path=str(folder))
    assert problem.key == "model.path" and expected in problem.rule
    file = write_fake(tmp_path / "model.safetensors", fake_tensors(TINY))
    [problem] = list_problems(path=str(file), config=folder)
    assert problem.key == "model.config" and expected in problem.rule


def test_an_error_of_the_hub_without_a_message_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserInputError, match="cannot be downloaded from the hub: OSError"):
        fetch_from_hub("model.path", "somebody/model")
