"""One run on each GPU. Processes and their environments are real; instead of training, they note what they see."""

import os
import signal
from pathlib import Path

import pytest
import torch

from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.launch.signals import Interrupted, StopRequest
from sdxl_trainer.train.ablation import training
from sdxl_trainer.train.ablation.grid import GridArm
from sdxl_trainer.train.ablation.plan import Plan, PlannedRun
from sdxl_trainer.train.ablation.study import list_devices

SCRIPT = r"""
notes="$(dirname "$0")/../notes.txt"
wait_for() {  # number of lines that begin with a word; fails after 20 s
    for _ in $(seq 400); do [ "$(grep -c "^$1 " "$notes")" -ge "$2" ] && return 0; sleep 0.05; done
    exit 1
}
for word in "$@"; do case "$word" in folder=*) folder="${word#folder=}" ;; esac; done
trap 'echo "stop $CUDA_VISIBLE_DEVICES" >> "$notes"; wait_for stop 2; exit 143' TERM
echo "start $CUDA_VISIBLE_DEVICES $NPROC $NNODES $(basename "$folder")" >> "$notes"
wait_for start 2
[ "$*" = "${*#*endless}" ] || while true; do sleep 0.05; done
mkdir -p "$folder/logs"
echo '{"state": "finished", "step": 3}' > "$folder/logs/status.json"
echo "end $CUDA_VISIBLE_DEVICES" >> "$notes"
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose launch/train.sh is SCRIPT."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.sh").write_text(SCRIPT)
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(training, "ROOT", tmp_path)
    monkeypatch.setattr(training, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("NNODES", "2")  # of a job of several machines
    return tmp_path


class StopAt(StopRequest):
    """A request to stop once so many runs have begun. It handles no signals of the tests' process."""

    def __init__(self, notes: Path, num_started: int = 1000):
        self._notes, self._num_started = notes, num_started

    def raise_if_received(self) -> None:
        if self._notes.read_text().count("start") >= self._num_started:
            raise Interrupted(signal.SIGTERM)


def train(checkout: Path, names: list[str], devices: list[str | None], num_started: int = 1000) -> training.Training:
    runs = [
        PlannedRun(arm=GridArm((name,), name), seed=0, folder=checkout / name, words=[f"folder={checkout / name}"])
        for name in names
    ]
    plan = Plan(cfg=Path("x.yaml"), folder=checkout, arms=[run.arm for run in runs], runs=runs, num_steps=3)
    trained = training.Training(plan, devices, keep_hopeless=False, stop=StopAt(checkout / "notes.txt", num_started))
    trained.train_all()
    return trained


def test_each_gpu_trains_one_run_at_a_time(checkout: Path) -> None:
    names = [f"run-{number}" for number in range(5)]
    assert train(checkout, names, ["GPU-1f", "5"]).failed == {}
    lines = [line.split() for line in (checkout / "notes.txt").read_text().splitlines()]
    assert sorted(line[:2] for line in lines[:2]) == [
        ["start", "5"],
        ["start", "GPU-1f"],
    ]  # none ends before both began
    starts = [line for line in lines if line[0] == "start"]
    assert sorted(name for *_, name in starts) == names and {line[2] for line in starts} == {"1"}
    assert {line[3] for line in starts} == {"1"}  # each run is a job of this machine alone
    for device in ("GPU-1f", "5"):
        assert {word for word, *_ in [line for line in lines if line[1] == device][::2]} == {"start"}
        assert {word for word, *_ in [line for line in lines if line[1] == device][1::2]} == {"end"}
    train(checkout, names, ["5"])  # finished runs are not trained again
    assert len((checkout / "notes.txt").read_text().splitlines()) == len(lines)


def test_all_runs_are_asked_to_stop_before_one_is_waited_for(checkout: Path) -> None:
    """Saving takes as long on 8 GPUs as on one. Each process ends only when the other was asked to stop, too."""

    with pytest.raises(Interrupted):
        train(checkout, ["endless-1", "endless-2", "never"], ["0", "1"], num_started=2)
    lines = (checkout / "notes.txt").read_text().splitlines()
    assert sorted(lines[2:]) == ["stop 0", "stop 1"] and "never" not in " ".join(lines)


def test_gpus_are_those_that_the_user_left_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f, 5,99")  # CUDA ends the list at an entry that it does not know
    assert list_devices(per_gpu=True) == ["GPU-1f", "5"] and list_devices(per_gpu=False) == [None]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert list_devices(per_gpu=True) == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserInputError, match="finds no GPU"):
        list_devices(per_gpu=True)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None
