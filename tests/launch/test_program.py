"""Command lines of the programs: a mistake is wrong input, reported once."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import ROOT

from sdxl_trainer.cache.main import main as cache_main
from sdxl_trainer.cache.models.source import check_model
from sdxl_trainer.configs.paths import CHECK_PATH
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.launch import program
from sdxl_trainer.launch.status import STATUS_FILE_VARIABLE
from sdxl_trainer.train.main import main as train_main


@pytest.mark.parametrize("words", [[], ["--cfg", "x.yaml", "--bogus"]])
def test_a_wrong_command_line_is_status_2_and_told_by_rank_0_alone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(program, "RANK_ZERO_SECONDS", 0)
    monkeypatch.setenv(STATUS_FILE_VARIABLE, str(tmp_path / "status"))
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        (tmp_path / "status").write_text("")
        with pytest.raises(SystemExit) as ended:
            program.build_parser("x").parse_args(words)
        assert ended.value.code == 2 and (tmp_path / "status").read_text() == "2"
        assert capsys.readouterr().err.count("usage: ") == (rank == "0")


def test_a_program_outside_its_environment_names_the_one_that_there_is(tmp_path: Path) -> None:
    for name in ("train/main.py", "cache/main.py", "train/sample_main.py"):
        copy, activate = tmp_path / name, tmp_path / ".venv" / "bin" / "activate"
        copy.parent.mkdir(exist_ok=True)
        copy.write_text((ROOT / name).read_text())
        command = [sys.executable, "-I", "-S", str(copy)]  # without site-packages
        said = [subprocess.run(command, capture_output=True, text=True, check=False).stderr]
        activate.parent.mkdir(parents=True, exist_ok=True)
        activate.touch()
        said.append(subprocess.run(command, capture_output=True, text=True, check=False).stderr)
        activate.unlink()
        assert "run: pip install -e ." in said[0] and f"run: source {activate}\n" in said[1]


def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(check_model(ModelConfig(path="runs/none", vae="runs/none"))) == []  # might be a hub id
    (tmp_path / "runs").mkdir()
    found = {problem.key: problem for problem in check_model(ModelConfig(path="runs/none", vae="runs/none"))}
    assert set(found) == {"model.path", "model.vae"} and found["model.path"].cure == CHECK_PATH
    for path in ("./runs/none", "../none", "/none/at/all"):
        assert [problem.key for problem in check_model(ModelConfig(path=path))] == ["model.path"]


@pytest.mark.parametrize("main", [cache_main, train_main])
def test_settings_may_stand_before_and_after_options(main: Callable[[list[str]], int], capsys) -> None:
    assert main(["run.name=x", "--cfg", "absent.yaml", "--dry-run", "log.level=INFO"]) == 2
    assert "absent.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["--verify", "--pack", "--unpack", "--adopt"])
def test_modes_that_cannot_be_tried_refuse_a_dry_run(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cache_main(["--cfg", "absent.yaml", mode, "--dry-run"])
    assert ended.value.code == 2 and "--dry-run" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("chosen", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_gpu_memory_can_grow_unless_the_user_says_otherwise(chosen: str | None) -> None:
    """PyTorch reads the variable when it is loaded, so the programs set it before."""
    code = "import os, sys; from sdxl_trainer.launch.program import prepare_process; prepare_process()"
    code += "; print('torch' in sys.modules, *(os.environ.get(name) for name in sys.argv[1:]))"
    names = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"]
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {chosen: "backend:native"} if chosen else {}
    command = [sys.executable, "-c", code, *names]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    expected = ["backend:native" if name == chosen else "None" for name in names]
    assert said == ["False", *(expected if chosen else ["expandable_segments:True", "None"])]
