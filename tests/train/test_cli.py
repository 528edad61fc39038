"""The command line `sdxl-trainer`: its help, its completion, and the programs that it starts, from a wheel too."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from programs import ROOT

import sdxl_trainer
from sdxl_trainer.configs.language.translate import choose_language
from sdxl_trainer.train.cli import PROGRAMS, build_completion, main, read_helps

CLI = [sys.executable, "-m", "sdxl_trainer.train.cli"]
COMPLETE = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _sdxl_trainer; echo "${COMPREPLY[*]}"'
ANSWER = """sdxl-trainer cache needs to know what to work on:
  sdxl-trainer cache --cfg my.yaml
All options: sdxl-trainer cache --help; all settings: sdxl-trainer settings
"""
SHORT = ("train.max_steps=2", "checkpoint.every_steps=2", "sample.every_steps=2", "sample.num_inference_steps=1")


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return read_helps()


def test_every_command_has_a_help_with_examples_of_its_own_name(helps: dict[str, str]) -> None:
    for name, text in helps.items():
        assert text.startswith(f"usage: sdxl-trainer {name} "), text
        assert f"examples:\n  sdxl-trainer {name}" in text, text
        assert "launch/" not in text and "python" not in text, text
        assert ("docs/CONFIG.md" in text) == ("key.sub=value" in text and name != "quickstart"), text


def test_every_help_is_wholly_chinese(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LANGUAGE", "zh_CN:en")
    choose_language()
    try:
        with pytest.raises(SystemExit):
            main(["--help"])
    finally:
        choose_language("en")
    overview = capsys.readouterr().out
    assert "命令：\n" in overview
    for name, text in {"": overview, **read_helps()}.items():
        assert text.startswith(f"用法：{f'sdxl-trainer {name}'.strip()} ") and "示例：\n" in text, text
        assert re.search("[\u3400-\u9fff]:", text) is None, f"a colon of English: {text}"
        shown = re.sub(r"^  sdxl-trainer .*|`[^`]*`", "", text.split("\n\n", 1)[1], flags=re.MULTILINE)
        assert re.findall(r"\b[A-Za-z]+ [a-z]+ [a-z]+\b|\b[a-z]+ [a-z]+\b(?! )", shown) == [], name


def test_completion_completes_commands_options_and_settings(helps: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "completion.sh"
    script.write_text(build_completion(helps))

    def complete(*words: str) -> list[str]:
        command = ["bash", "-euc", COMPLETE, str(script), "sdxl-trainer", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert complete("") == [*PROGRAMS, "completion"] and complete("ca") == ["cache"]
    commands = "--verify --repair --pack --unpack --compact --adopt --copy-to"
    options = [
        "--help",
        "--cfg",
        "--dry-run",
        *commands.split(),
        "--where",
        "--part",
        "--as",
        "--rekey",
        "--every-byte",
    ]
    assert complete("cache", "--") == options
    assert complete("train", "optim.w") == ["optim.weight_decay=", "optim.warmup_steps="]
    assert complete("report", "optim.w") == [] and complete("completion", "x") == []


def test_the_overview_lists_the_commands_and_corrects_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    listed = capsys.readouterr().err
    assert all(f"\n  {name:12}{program.text}\n" in listed for name, program in PROGRAMS.items())
    for word, cure in (("trian", "did you mean train?"), ("zzz", "sdxl-trainer --help lists the commands")):
        with pytest.raises(SystemExit) as ended:
            main([word])
        assert ended.value.code == 2 and f"{word!r} is not a command; {cure}" in capsys.readouterr().err


def test_the_version_needs_no_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -S` sees no metadata of packages, as in a checkout that is only on the path."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"{sdxl_trainer.__version__}\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".types")}
    command = [sys.executable, "-S", "-m", "sdxl_trainer.train.cli", "--version"]
    assert subprocess.check_output(command, env=environment, text=True) == f"{sdxl_trainer.__version__}\n"


def test_a_program_keeps_its_status_and_names_commands_as_they_were_given(tmp_path: Path) -> None:
    (tmp_path / "kohya.toml").write_text("learning_rate = 1e-5\n")

    def start(*words: str) -> tuple[int, str]:
        done = subprocess.run([*CLI, *words], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert start("cache") == (2, ANSWER)
    status, printed = start("convert")
    assert status == 2 and printed.endswith("the following arguments are required: source\n"), printed
    status, printed = start("train", "--cfg", "kohya.toml")
    assert status == 2 and "sdxl-trainer import kohya.toml --out my.yaml" in printed, printed
    status, printed = start("import", "kohya.toml", "--out", "my.yaml")
    assert status == 0 and "sdxl-trainer doctor --cfg my.yaml" in printed, printed


@pytest.mark.long
def test_a_wheel_runs_the_quick_start_in_another_environment(tmp_path: Path) -> None:
    """The libraries are those of this environment; the project is the wheel alone."""
    source, home = tmp_path / "source", tmp_path / "home"
    home.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("configs", "launch", "data", "cache", "train", ".package"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip"]
    wheel = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *wheel], check=True)
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", *map(str, tmp_path.glob("*.whl"))]
    subprocess.run([*pip, "--python", str(python), *install], check=True)
    [packages] = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (packages / "libraries.pth").write_text(str(Path(torch.__file__).parent.parent))

    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [tmp_path / "venv" / "bin" / "sdxl-trainer", "quickstart", *SHORT]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"cp {packages}/sdxl_trainer/configs/sdxl_full.yaml my.yaml" in done.stdout
    assert {"before-after.png", "strip.png"} <= {path.name for path in home.glob("runs/quickstart/samples/*")}
    assert [path.name for path in home.iterdir()] == ["runs"]
    assert not list(packages.glob("sdxl_trainer/**/runs")) and not list(packages.glob("sdxl_trainer/.venv"))
