"""Recorded runs, and the real server on a port of this machine."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from sdxl_trainer.train.report.run_status import RUNNING, RunStatus, describe_process, write_status
from sdxl_trainer.train.sampling.image_grid import write_image
from sdxl_trainer.train.watch.gate import Gate
from sdxl_trainer.train.watch.program import open_listener
from sdxl_trainer.train.watch.server import build_app

TOKEN = "a-token-of-the-test"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def write_recorded_run(folder: Path, num_steps: int = 30, state: str = RUNNING, **fields: Any) -> Path:
    """Write a run folder as a run leaves it, with markup in every text. A running one seems to be this process."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    append_steps(folder, 1, num_steps)
    bins = {"validation/loss_t000-499": 0.9, "validation/loss_t500-999": 0.1}
    for step in (num_steps // 2, num_steps):
        append_lines(folder, [{"step": step, "validation/loss": 0.5 + 1 / step, **bins}])
    status = {"state": state, "step": num_steps, "max_steps": 100, "has_prompts": True, "now": f"training {MARKUP}"}
    process = describe_process() if state == RUNNING else {}
    write_status(logs / "status.json", RunStatus(**{**status, "written": time.time(), **process, **fields}))  # pyright: ignore
    (folder / "config.yaml").write_text(f"run:\n  name: {folder.name}\noptim:\n  lr: 0.1\nmodel:\n  path: '{MARKUP}'\n")
    line = "2026-11-28 10:00:00.000 {} [rank 1] sdxl_trainer.train.run.loop: {}\n"
    (logs / "train-rank1.log").write_text(line.format("WARNING", MARKUP) + line.format("INFO   ", "step 1"))
    bad = {"step": 3, "key": MARKUP, "reason": "cannot be read"}
    (logs / "bad_samples.jsonl").write_text(json.dumps(bad) + "\n")
    for step in (10, 20):
        image = Image.new("RGB", (96, 64), (step, 120, 200))
        write_image(
            folder / "samples" / f"step-{step:08d}" / "000.png", image, f"{MARKUP}\nNegative prompt: \nSteps: 4"
        )
    return folder


def append_steps(folder: Path, first: int, last: int) -> None:
    """Append the metrics of some steps."""
    lines = [
        {"step": step, "loss": 1 / step, "lr": 1e-4, "grad_norm": 0.5, "samples_per_second": 3.0, "epoch": 0}
        for step in range(first, last + 1)
    ]
    append_lines(folder, lines)


def append_lines(folder: Path, lines: list[dict]) -> None:
    with open(folder / "logs" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


@contextmanager
def serve_runs(root: Path, is_local: bool = True) -> Iterator[str]:
    """Serve a folder of runs, and yield the page's address."""
    with open_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        gate = Gate(build_app(root, TOKEN), TOKEN, ["gpu.example"], is_local, "watch-test")
        server = uvicorn.Server(uvicorn.Config(gate, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """The function that writes a recorded run."""
    return write_recorded_run


@pytest.fixture
def serve() -> Callable[..., Any]:
    """The context that serves a folder of runs."""
    return serve_runs


@pytest.fixture
def append() -> Callable[[Path, int, int], None]:
    """The function that appends steps to a recorded run."""
    return append_steps
