"""Interruptions lose nothing: ranks that are killed, raise or hang, and requests to stop.

The losses of a resumed run equal those of an uninterrupted run.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from descendants import get_variable, list_descendants
from forked_ranks import start_forked
from programs import PLACE, ROOT, lay_out_scripts, run_program

from sdxl_trainer.train.checkpoint.folder import find_newest_checkpoint, list_checkpoints, recover_partial_checkpoints
from sdxl_trainer.train.engine.saved_state import SavedState, map_state_file
from sdxl_trainer.train.report.metrics import read_metrics
from sdxl_trainer.train.report.run_status import read_status

# What happens to rank 1 while it reads samples, two a step, by the number of times torchrun has started the job.
# `Fault` is no Exception, so it counts as a fault of the program and not of the user's strategy.
PLANTED = """
import os, signal, time

class Fault(BaseException):
    pass

def fail():
    raise Fault("planted")

def hang():
    os.kill(os.getpid(), signal.SIGSTOP)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Captions:
    calls = 0

    def caption(self, record, rng):
        plan = os.environ.get("PLAN", "").split()
        start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if os.environ.get("RANK") == "1" and start < len(plan):
            what, calls = plan[start].split(":")
            if Captions.calls == int(calls):
                {"die": die, "fail": fail, "hang": hang}[what]()
        Captions.calls += 1
        if os.path.exists(os.environ.get("HANG", "")):
            os.remove(os.environ["HANG"])
            time.sleep(600)
        return record["caption"]
"""


def read_losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "logs" / "metrics.jsonl")]


def plant(folder: Path, name: str, **settings: object) -> list[str]:
    """Write the class that causes the faults, and return the command line of a run with it."""
    (folder / "planted.py").write_text(PLANTED)
    given = {"run.name": name, "sample.prompts": "[]", "data.strategy": f"{folder / 'planted.py'}:Captions", **settings}
    return ["--cfg", str(folder / "tiny.yaml"), *(f"{key}={value}" for key, value in given.items())]


def build_environment(**variables: str) -> dict[str, str]:
    """The environment of a job that no launcher has started."""
    return {
        **{key: value for key, value in os.environ.items() if key not in PLACE},
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def start_ranks(words: list[str], printed: Path, ranks: int = 1, **variables: str) -> list[BaseProcess]:
    """Start ranks without a launcher, which would end one rank when the other has ended."""
    printed.touch()
    return start_forked(ROOT / "train/main.py", words, build_environment(**variables), printed, ranks)


def wait_for(condition: Callable[[], bool], is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert is_running() and time.monotonic() < deadline, "the job did not get this far"
        time.sleep(0.02)


def count_steps(run: Path) -> int:
    metrics = run / "logs" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def test_restarts_resume_after_a_killed_and_after_a_failed_rank(cached_folder: Path, two_ranks: Path, monkeypatch):
    """torchrun starts the job three times. First rank 1 is killed in step 7, then it raises in step 7, then in step 10.

    The killed rank left no shard: the checkpoint of step 4 remains, and the weights of step 6 as a file. The failed
    rank lost no step: each rank wrote its shard of step 6, and the third start resumes from them.
    """
    words = plant(cached_folder, "restarted", **{"train.max_steps": 10})
    monkeypatch.setenv("PLAN", "die:12 fail:4 fail:6")
    printed = run_program("train/main.py", *words, ranks=2, restarts=2, expect=1)
    run = cached_folder / "runs" / "restarted"
    resumed = [line.split("checkpoints/")[1] for line in printed.splitlines() if "resuming from" in line]
    assert resumed == ["step-00000004", "step-00000006"], printed
    assert printed.count("shard of step 6 written") == 3 and printed.count("shard of step 9 written") == 2, printed
    assert printed.count("Fault: planted") >= 2
    assert (run / "models" / "emergency-step-00000006.safetensors").is_file()
    assert read_losses(run) == read_losses(two_ranks)[:9]


def test_requests_to_save_and_to_stop_through_the_launch_script(
    cached_folder: Path, two_ranks: Path, tmp_path: Path
) -> None:
    """SIGUSR1 to one rank saves and continues; SIGTERM to train.sh finishes the step, saves, and exits with 143."""
    run = cached_folder / "runs" / "stopped"
    words = ["--cfg", cached_folder / "tiny.yaml", "run.name=stopped", "sample.prompts=[]", "checkpoint.every_steps=0"]
    scripts = lay_out_scripts(tmp_path, "train/main.py")
    command = [str(word) for word in ("bash", scripts / "train.sh", *words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    job = subprocess.Popen(command, env=build_environment(NPROC="2"), text=True, **pipes)
    wait_for(lambda: count_steps(run) >= 3, lambda: job.poll() is None)
    ranks = [pid for pid in list_descendants(job.pid) if get_variable(pid, "RANK") == "1"]
    os.kill(ranks[0], signal.SIGUSR1)
    wait_for(lambda: len(list_checkpoints(run / "checkpoints")) == 1, lambda: job.poll() is None)
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 143 and "Traceback" not in printed and "leaked" not in printed, printed
    assert "SIGTERM: the step is being finished and saved; a second signal ends the job at once" in printed, printed
    assert "ERROR" not in printed and "Training stopped was stopped" in printed and "stopped by SIGTERM; " in printed, (
        printed
    )
    done, status = count_steps(run), read_status(run / "logs" / "status.json")
    assert status is not None and (status.state, status.reason) == ("stopped", "stopped by SIGTERM")
    saved = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert len(saved) == 2 and saved[1] == f"step-{done:08d}" and done < 18, printed
    (run / "save").touch()
    run_program("train/main.py", *words, f"train.max_steps={done + 3}", ranks=2)
    assert read_losses(run) == read_losses(two_ranks)[: done + 3]
    assert f"step-{done + 1:08d}" in [path.name for path in list_checkpoints(run / "checkpoints")], "the save file"


def test_a_step_that_never_ends_is_saved_without_it(cached_folder: Path, tmp_path: Path) -> None:
    """SIGTERM while a step hangs: the emergency thread writes the state before the step and exits with 143."""
    run, hang = cached_folder / "runs" / "hung", cached_folder / "hang"
    words = plant(cached_folder, "hung", **{"checkpoint.every_steps": 0})
    [job] = start_ranks(words, tmp_path / "printed", HANG=str(hang))
    wait_for(lambda: count_steps(run) >= 3, job.is_alive)
    hang.touch()
    wait_for(lambda: not hang.exists(), job.is_alive)
    done = count_steps(run)
    job.terminate()
    job.join(120)
    printed = (tmp_path / "printed").read_text()
    assert job.exitcode == 143 and f"shard of step {done} written" in printed, printed
    assert list_checkpoints(run / "checkpoints") == [] and count_steps(run) == done
    recover_partial_checkpoints(run / "checkpoints")  # as the next start does
    assert find_newest_checkpoint(run / "checkpoints") == run / "checkpoints" / f"step-{done:08d}"
    trained = SavedState(run / "checkpoints" / f"step-{done:08d}" / "state", map_state_file)
    assert trained.shapes and all(trained.read_whole(name).isfinite().all() for name in trained.shapes)


def test_other_ranks_save_and_end_when_one_hangs(cached_folder: Path, two_ranks: Path, tmp_path: Path) -> None:
    """Rank 1 is stopped in step 4, as on a node that hangs. Rank 0 waits until its timeout, saves its shard and the
    weights, and ends. When rank 1 continues, it finds rank 0 gone and saves its own shard: no step is lost."""
    run = cached_folder / "runs" / "hanging"
    words = plant(cached_folder, "hanging", **{"checkpoint.every_steps": 0, "engine.timeout_minutes": 0.15})
    printed = tmp_path / "printed"
    ranks = start_ranks(words, printed, 2, PLAN="hang:6")
    ranks[0].join(120)
    assert ranks[0].exitcode == 1 and "shard of step 3 written" in printed.read_text(), printed.read_text()
    assert (run / "models" / "emergency-step-00000003.safetensors").is_file()
    assert ranks[1].is_alive()
    before = printed.stat().st_size
    os.kill(ranks[1].pid or 0, signal.SIGCONT)
    ranks[1].join(120)
    assert ranks[1].exitcode == 1 and "shard of step 3 written" in printed.read_text()[before:], printed.read_text()
    recover_partial_checkpoints(run / "checkpoints")  # as the next start does
    assert find_newest_checkpoint(run / "checkpoints") == run / "checkpoints" / "step-00000003"
    assert read_losses(run) == read_losses(two_ranks)[:3]
