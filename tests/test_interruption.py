"""Nothing done is lost: a rank that raises, a request to stop; the resumed losses equal the unbroken run's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, run_program

from sdxl_trainer.train.checkpoint import list_checkpoints
from sdxl_trainer.train.metrics import read_metrics

# No Exception, so that it passes for a fault of the program and not of the user's caption.
PLANTED = """
import os

class Fault(BaseException):
    pass

class Captions:
    calls = 0

    def caption(self, record, rng):
        Captions.calls += 1
        if os.environ.get("PLANT") and os.environ["RANK"] == "1" and Captions.calls > 2 * 6:
            raise Fault("planted")
        return record["caption"]
"""


def read_losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "logs" / "metrics.jsonl")]


def test_a_rank_that_raises_loses_no_step(cached_folder: Path, two_ranks: Path, monkeypatch) -> None:
    """Rank 1 raises in step 7: both ranks write their shard of step 6 alone, and the next start goes on from there."""
    (cached_folder / "planted.py").write_text(PLANTED)
    words = ("--cfg", cached_folder / "tiny.yaml", "run.name=raised", "sample.prompts=[]", "train.max_steps=9",
             f"data.strategy={cached_folder / 'planted.py'}:Captions", "checkpoint.every_steps=100")  # fmt: skip
    run = cached_folder / "runs" / "raised"
    with monkeypatch.context() as patch:
        patch.setenv("PLANT", "1")
        printed = run_program("train/main.py", *words, ranks=2, expect=1)
    assert "Fault: planted" in printed and printed.count("shard of step 6 written") == 2, printed
    assert [path.name for path in (run / "models").iterdir()] == ["emergency-step-00000006.safetensors"]
    assert list_checkpoints(run / "checkpoints") == []
    printed = run_program("train/main.py", *words, ranks=2)
    assert "step-00000006 was complete though its job was ended" in printed
    assert read_losses(run) == read_losses(two_ranks)[:9]


def test_a_request_to_stop_saves_and_says_so_in_the_status(cached_folder: Path, one_rank: Path) -> None:
    """SIGTERM in the middle: status 143, the step in hand is finished and saved, and the same command goes on."""
    run = cached_folder / "runs" / "stopped"
    words = ["--cfg", cached_folder / "tiny.yaml", "run.name=stopped", "sample.prompts=[]", "checkpoint.every_steps=0"]
    command = [sys.executable, ROOT / "train/main.py", *words]
    job = subprocess.Popen(
        [str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    metrics = run / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
        assert job.poll() is None and time.monotonic() < deadline, "the job did not begin to train"
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    _, printed = job.communicate(timeout=120)
    assert job.returncode == 143, printed
    done = len(read_losses(run))
    assert 3 <= done < 20 and [path.name for path in list_checkpoints(run / "checkpoints")] == [f"step-{done:08d}"]
    (run / "save").touch()
    run_program("train/main.py", *words)
    assert read_losses(run) == read_losses(one_rank)
    assert [path.name for path in list_checkpoints(run / "checkpoints")][1] == f"step-{done + 1:08d}", "the save file"
