"""Launch scripts: each starts its program, and chooses the number of ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT
from rank_port import find_rank_port

STARTED_BY_CI = {"quickstart.sh", "test.sh"}
STARTED_BY_SCRIPTS = {"demo.sh": "quickstart.sh"}
STARTED_BY_OTHER_TESTS = {"watch.sh": "train/watch/test_server.py"}
# Status of each script's program for settings that do not exist. The doctor reports them as a finding.
STATUS_OF_WRONG_SETTINGS = {
    "cache.sh": 2,
    "ablate.sh": 2,
    "train.sh": 2,
    "deepspeed.sh": 2,
    "preview.sh": 2,
    "quality.sh": 2,
    "sample.sh": 2,
    "slurm.sbatch": 2,
    "doctor.sh": 1,
}
NEEDED_WORDS = {
    "ablate.sh": ("--vary", "optim.lr=1e-5,2e-5"),
    "quality.sh": ("--model", "no/model", "--features", "no/features"),
    "sample.sh": ("--model", "no/model", "--prompts", "no/prompts.txt", "--out", "no/folder"),
}
# Slurm's programs for a job on one node: this machine.
SRUN = 'while [ "${1#--}" != "$1" ]; do echo "srun option $1"; shift; done; SLURM_NODEID=0 exec "$@"'
SLURM_PROGRAMS = {"srun": SRUN, "scontrol": "echo 127.0.0.1", "scancel": "exit 1"}


def write_programs(folder: Path, programs: dict[str, str]) -> Path:
    """Write shell programs into a folder, for use as a part of PATH."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def test_every_script_is_started_by_a_test_or_by_ci() -> None:
    sourced = "# shellcheck shell="
    files = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")]
    scripts = {file.name for file in files if not file.read_text().startswith(sourced)}
    assert scripts == {*STATUS_OF_WRONG_SETTINGS, *STARTED_BY_CI, *STARTED_BY_OTHER_TESTS, *STARTED_BY_SCRIPTS}
    assert all(f"launch/{name}" in (ROOT / "tests" / file).read_text() for name, file in STARTED_BY_OTHER_TESTS.items())
    assert all(
        f"bash launch/{name}" in (ROOT / "launch" / file).read_text() for name, file in STARTED_BY_SCRIPTS.items()
    )
    ci = (ROOT / ".ci/run").read_text()
    assert all(f"bash launch/{name}" in ci for name in STARTED_BY_CI)


@pytest.mark.parametrize(("script", "status"), STATUS_OF_WRONG_SETTINGS.items())
def test_a_script_passes_its_words_and_returns_the_status_of_its_program(
    tmp_path: Path, script: str, status: int
) -> None:
    words = ("--cfg", "no/such settings.yaml", *NEEDED_WORDS.get(script, ()))
    path = write_programs(tmp_path, SLURM_PROGRAMS)
    job = {"SUBMIT_DIR": str(ROOT), "JOB_NUM_NODES": "1", "JOB_NODELIST": "here", "JOB_ID": "7", "CPUS_ON_NODE": "2"}
    job = {f"SLURM_{name}": value for name, value in job.items()}
    environment = {**os.environ, "NPROC": "1", "PATH": f"{path}:{os.environ['PATH']}", **job}
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    assert "no/such settings.yaml" in output and "Traceback" not in output
    assert ("srun option --cpus-per-task=2" in output) == (script == "slurm.sbatch")


@pytest.mark.parametrize(
    ("script", "words", "status", "text"),
    [
        ("cache.sh", (), 2, "  bash launch/cache.sh --cfg configs/tiny.yaml\n"),
        ("train.sh", (), 2, "  bash launch/train.sh --cfg configs/tiny.yaml\n"),
        ("deepspeed.sh", (), 2, "  bash launch/deepspeed.sh --cfg configs/tiny.yaml\n"),
        ("preview.sh", (), 2, "  bash launch/preview.sh --cfg configs/tiny.yaml\n"),
        ("sample.sh", (), 2, "  bash launch/sample.sh --model PATH --prompts FILE --out DIR\n"),
        ("train.sh", ("--cfg", "configs/tiny.yaml", "--help"), 0, "--dry-run"),
        ("train.sh", ("configs/tiny.yaml",), 2, "required: --cfg"),
        ("train.sh", ("--cfg", "configs/tiny.yaml", "train.max_stepz=4"), 2, "did you mean train.max_steps?"),
        ("cache.sh", ("--cfg=configs/tiny.yaml", "train.max_stepz=4"), 2, "did you mean train.max_steps?"),
        ("deepspeed.sh", ("train.max_stepz=4", "--cfg", "configs/tiny.yaml"), 2, "did you mean train.max_steps?"),
        ("train.sh", ("--cfg",), 2, "train.sh: error: argument --cfg: expected one argument"),
        ("train.sh", ("--cfg", "--dry-run"), 2, "train.sh: error: argument --cfg: expected one argument"),
        ("cache.sh", ("--cfg", ""), 2, "cache.sh: error: argument --cfg: '' is an empty path"),
        ("deepspeed.sh", ("--cfg=$FOO/x.yaml",), 2, "names the environment variable FOO, which is not set"),
        ("train.sh", ("--cfg", "~nouser/x.yaml"), 2, "names the home folder of ~nouser, which does not exist"),
    ],
)
def test_help_and_mistakes_are_answered_without_a_launcher(
    script: str, words: tuple[str, ...], status: int, text: str
) -> None:
    command = ["bash", f"launch/{script}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == status and text in output, output
    assert "+ torchrun" not in output and "+ deepspeed" not in output and "Traceback" not in output
    if not words:
        assert len(output.splitlines()) == 3


def test_an_installation_shows_its_progress() -> None:
    """Lines as pip 24 prints them."""
    lines = """Collecting torch==2.13.0
  Downloading https://example.org/cpu/torch-2.13.0%2Bcpu-cp311-linux_x86_64.whl (191.4 MB)
  Downloading networkx-3.6-py3-none-any.whl.metadata (6.8 kB)
Installing collected packages: mpmath, typing-extensions, torch
Successfully installed mpmath-1.3.0 torch-2.13.0 typing-extensions-4.16.0
"""
    command = "set -euo pipefail; source launch/environment.sh; show_progress"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, input=lines, capture_output=True, text=True, env={**os.environ, "LANG": "C"}
    )
    steps = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    assert steps == ["downloading torch-2.13.0%2Bcpu-cp311-linux_x86_64.whl (191.4 MB)", "installing 3 packages"]


def test_a_failed_installation_shows_the_reason(tmp_path: Path) -> None:
    """In an environment without pip, as `uv venv` creates them; Python's own pip is installed into it first."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command = "set -euo pipefail; source launch/environment.sh; install --no-index no-such-package || echo failed"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env={**environment, "LANG": "C"}
    )
    assert done.stdout == "failed\n"
    assert "No matching distribution found for no-such-package" in done.stderr
    assert f"all of pip's output is in {tmp_path}/.sdxl-trainer-installed.log" in done.stderr


@pytest.mark.parametrize("script", ["doctor.sh", "deepspeed.sh"])
def test_the_doctor_measures_communication_through_the_launcher_of_several_nodes(script: str) -> None:
    # One node that numbers itself by a rendezvous, as each of several would.
    where = {"RDZV_ENDPOINT": f"127.0.0.1:{find_rank_port()}"} if script == "doctor.sh" else {"PROGRAM": "doctor"}
    done = subprocess.run(
        ["bash", ROOT / "launch" / script],
        cwd=ROOT,
        env={**os.environ, "NPROC": "2", **where},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^ok     nodes: 1 \(.*torch", done.stdout, re.M)
    assert re.search(r"^ok     ranks: 2 by gloo, sums of 64 MB at [\d.]+ GB/s, of 400 MB at", done.stdout, re.M)


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder with a stand-in for nvidia-smi that lists four GPUs."""
    body = 'for i in 0 1 2 3; do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done'
    return write_programs(tmp_path, {"nvidia-smi": body})


@pytest.mark.parametrize(
    ("visible", "gpus", "ranks"),
    [
        (None, 4, 4),
        ("", 0, 1),
        ("2", 1, 1),
        ("0, 2", 2, 2),
        ("3,1,0", 3, 3),
        ("1,9,0", 1, 1),  # CUDA ignores the list from its first invalid entry on
        ("1,-1,2", 1, 1),
        ("-1", 0, 1),
        ("GPU-0a,GPU-1b", 2, 2),
        ("MIG-0a", 1, 1),
    ],
)
def test_one_rank_starts_per_visible_gpu(driver: Path, visible: str | None, gpus: int, ranks: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PATH"] = f"{driver}:{environment['PATH']}"
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = 'source launch/child.sh; echo "$(count_gpus) $(choose_num_ranks)"'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(gpus), str(ranks)]


@pytest.mark.parametrize(
    ("language", "text"), [("zh_CN.UTF-8", "需要 MASTER_ADDR"), ("de_DE.UTF-8", "needs MASTER_ADDR")]
)
def test_a_script_speaks_the_users_language(language: str, text: str) -> None:
    environment = {**os.environ, "LANGUAGE": "", "LC_ALL": "", "LC_MESSAGES": "", "LANG": language, "NNODES": "2"}
    command = ["bash", ROOT / "launch" / "train.sh", "--cfg", "x.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and text in done.stderr, done.stderr
