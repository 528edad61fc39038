"""The model of a command line: what a model declares, and settings of checkpoints from other versions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_trainer.configs.problems import FailedError, UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.checkpoint.folder import MANIFEST
from sdxl_trainer.train.checkpoint.model_argument import (
    DeclaredPrediction,
    explain_removal,
    find_model_checkpoint,
    load_model_config,
    read_declared_prediction,
    read_declared_size,
)
from sdxl_trainer.train.checkpoint.state import TrainState


@pytest.mark.parametrize(
    ("config", "declared"),
    [
        ({"prediction_type": "epsilon"}, DeclaredPrediction("epsilon", False)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, DeclaredPrediction("v", True)),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, DeclaredPrediction("flow", False)),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 2.5}, DeclaredPrediction("flow", False, 2.5)),
        ({"prediction_type": "flow_prediction", "flow_shift": 3.0}, DeclaredPrediction("flow", False, 3.0)),
        ({"prediction_type": "epsilon", "flow_shift": 3.0}, DeclaredPrediction("epsilon", False)),
        ({"prediction_type": "flow_prediction", "flow_shift": "x"}, DeclaredPrediction("flow", False)),
        ({"prediction_type": "sample"}, None),
        ({}, None),
    ],
)
def test_a_folder_declares_its_prediction_in_the_scheduler(tmp_path: Path, config: dict, declared) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert read_declared_prediction(tmp_path) == declared


@pytest.mark.parametrize(
    ("marks", "metadata", "declared"),
    [
        ([], None, DeclaredPrediction("epsilon", False)),
        (["v_pred"], None, DeclaredPrediction("v", False)),
        (["v_pred", "ztsnr"], {"modelspec.prediction_type": "epsilon"}, DeclaredPrediction("v", True)),
        ([], {"modelspec.prediction_type": "flow"}, DeclaredPrediction("flow", False)),
        (
            [],
            {"modelspec.prediction_type": "flow", "ss_discrete_flow_shift": "2.5"},
            DeclaredPrediction("flow", False, 2.5),
        ),
        ([], {"modelspec.prediction_type": "flow", "ss_discrete_flow_shift": "nan"}, DeclaredPrediction("flow", False)),
        ([], {"modelspec.prediction_type": "x0"}, None),
    ],
)
def test_a_file_declares_its_prediction_by_marks_and_metadata(tmp_path: Path, marks, metadata, declared) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.zeros(1), **{mark: torch.zeros(0) for mark in marks}}, path, metadata)
    assert read_declared_prediction(path) == declared


def test_damaged_files_are_named_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no header")
    assert read_declared_prediction(tmp_path / "x.safetensors") is None  # check_model names the file
    assert read_declared_prediction(Path("owner/name")) is None
    (tmp_path / "scheduler").mkdir()
    for content in ("{", "[]", "[" * 100_000):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(content)
        with pytest.raises(UserInputError) as refused:
            read_declared_prediction(tmp_path)
        assert refused.value.problems[0].value == tmp_path / "scheduler" / "scheduler_config.json"


def test_a_run_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert find_model_checkpoint(tmp_path, "--model") is None
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserInputError, match="--model = .*\n.*without a complete checkpoint"):
        find_model_checkpoint(tmp_path, "--model")


def test_an_absent_model_is_named_and_a_hub_id_is_left_to_the_hub(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("nowhere", "runs/my", "runs/my/checkpoints/step-00000005", str(tmp_path / "x"), "none/x.safetensors"):
        with pytest.raises(UserInputError, match=f"--model = '{name}'\n      does not exist\n"):
            find_model_checkpoint(Path(name), "--model")
    assert find_model_checkpoint(Path("stabilityai/sdxl"), "--model") is None
    assert find_model_checkpoint(Path("https://huggingface.co/a/b"), "--model") is None  # the model's check explains it


def test_a_checkpoint_that_its_run_removes_meanwhile_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).touch()
    with pytest.raises(KeyError), explain_removal(tmp_path):  # damaged, but there
        raise KeyError("layout")
    with pytest.raises(FileNotFoundError), explain_removal(None):  # a model without a run
        raise FileNotFoundError("x")
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(FailedError, match="was removed while it was read.*run the same command again"):
        with explain_removal(tmp_path):
            raise KeyError("layout")


def test_the_settings_of_a_checkpoint_are_used_and_unknown_ones_dropped(tmp_path: Path) -> None:
    saved = Config().model_dump(mode="json")
    saved["objective"] |= {"prediction": "v", "removed_setting": 3}
    TrainState(config=saved).save(tmp_path)
    config, problems = load_model_config(tmp_path, None, ["objective.zero_terminal_snr=true"])
    assert problems == [] and config.objective.prediction == "v" and config.objective.zero_terminal_snr
    (tmp_path / "own.yaml").write_text("objective: {prediction: flow}")
    config, problems = load_model_config(tmp_path, tmp_path / "own.yaml", [])
    assert problems == [] and config.objective.prediction == "flow"


@pytest.mark.parametrize(("resolution", "size"), [("128x96", (128, 96)), ("1024", None), (None, None)])
def test_a_file_declares_the_size_it_was_trained_at(tmp_path: Path, resolution: str | None, size) -> None:
    metadata = {} if resolution is None else {"modelspec.resolution": resolution}
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", metadata)
    assert read_declared_size(tmp_path / "m.safetensors") == size
    assert read_declared_size(tmp_path) is None  # a folder
