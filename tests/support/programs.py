"""Paths of the checkout, and starting its programs the way users do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
TINY = ROOT / "configs" / "tiny"
MIXED_PROMPTS = """a red circle on a white background
a blue star on a grey background --w 64 --h 128 --s 3 --d 77
a green square on a black background --ss euler_a --n a circle
"""


def run_program(program: str, *words: object, ranks: int = 1, expect: int = 0, restarts: int = 0) -> str:
    """Start train/main.py or cache/main.py the way users do and return all it printed.

    One rank runs without a launcher, more run under torchrun, so that both ways are tried.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    start = [sys.executable] if ranks == 1 else [sys.executable, *launcher, f"--max-restarts={restarts}"]
    command = [*start, str(ROOT / program), *(str(word) for word in words)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run(
        command,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == expect, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def read_losses(run: Path) -> list[float]:
    """Return the loss of every step in a run folder."""
    from sdxl_trainer.train.report.metrics import read_metrics

    return [line["loss"] for line in read_metrics(run / "logs" / "metrics.jsonl")]
