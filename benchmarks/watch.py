"""The page that shows runs: its answers with 300 runs, one of them of a million steps, and its CPU time.

    python benchmarks/watch.py [--quick]

The server is a process of its own. Its CPU time is that of all its threads, from /proc.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import orjson
from harness import Figure, parse_arguments, print_result

NUM_RUNS, NUM_LINES = 300, 1_000_000
QUICK_LINES = 100_000
NUM_POLLS, IDLE_SECONDS = 30, 10.0
PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def make_runs(folder: Path, num_lines: int) -> None:
    """Write run folders: all with 1000 steps, and one with `num_lines`."""
    from sdxl_trainer.train.report.run_status import RunStatus, write_status

    for number in range(NUM_RUNS):
        logs, num_steps = folder / f"run-{number:03d}" / "logs", 1000 if number else num_lines
        logs.mkdir(parents=True)
        with open(logs / "metrics.jsonl", "wb") as file:
            file.writelines(map(make_line, range(1, num_steps + 1)))
        status = RunStatus(state="finished", step=num_steps, max_steps=num_steps)
        write_status(logs / "status.json", status)


def make_line(step: int) -> bytes:
    """Return a line of metrics with the fields of a real step."""
    noise = (step * 2654435761 % 1000) / 1000
    values = {"step": step, "loss": 0.1 + noise / 7, "lr": 1e-5 + noise * 1e-9, "grad_norm": 0.3 + noise / 3}
    values |= {"epoch": step // 1000, "samples_per_second": 40 + noise / 3, "step_seconds": 0.4 + noise / 30}
    return orjson.dumps({**values, "data_wait_share": noise / 300, "num_bad": 0, "num_non_finite": 0}) + b"\n"


class Server:
    """The server of the page, as a process."""

    def __init__(self, runs: Path):
        command = [sys.executable, "-m", "sdxl_trainer.train.watch", str(runs), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.address = self.process.stdout.readline().split()[1]

    def ask(self, path: str) -> Any:
        """Return an answer's content, parsed if it is JSON."""
        with urllib.request.urlopen(self.address + path) as answer:
            content = answer.read()
        return json.loads(content) if path.startswith("api") else content

    def read_cpu_seconds(self) -> float:
        """Return the CPU time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def read_peak_mb(self) -> float:
        """Return the most memory so far, in MB."""
        found = PEAK.search(Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) * 1024 / 1e6 if found else float("nan")


def measure(runs: Path) -> dict[str, Figure]:
    """Measure the server over the run folders."""
    started = time.monotonic()
    server = Server(runs)
    try:
        server.ask("")
        num_runs = len(server.ask("api/runs")["runs"])
        assert num_runs == NUM_RUNS, num_runs
        figures = {"seconds_to_the_first_page": Figure(time.monotonic() - started, "<=", 3.0)}
        started, longest, answer = time.monotonic(), 0.0, {"share": 0.0, "version": ""}
        while answer["share"] < 1:
            asked = time.monotonic()
            answer = server.ask("api/curves?run=run-000")
            longest = max(longest, time.monotonic() - asked)
        figures["seconds_to_the_whole_curves"] = Figure(time.monotonic() - started, "<=", 10.0)
        figures["longest_answer_seconds"] = Figure(longest, "<=", 0.5)
        figures |= measure_polls(server, runs / "run-000" / "logs" / "metrics.jsonl", answer)
        before = server.read_cpu_seconds()
        time.sleep(IDLE_SECONDS)
        figures["cpu_share_while_no_page_is_open"] = Figure(
            (server.read_cpu_seconds() - before) / IDLE_SECONDS, "<=", 0.01
        )
        figures["memory_mb"] = Figure(server.read_peak_mb(), "<=", 200)
        return figures
    finally:
        server.process.terminate()
        server.process.wait()


def measure_polls(server: Server, metrics: Path, answer: dict[str, Any]) -> dict[str, Figure]:
    """Measure the CPU time of an open page's polls while the run of many lines goes on."""
    step, seconds = answer["last_step"], {"runs": 0.0, "curves": 0.0}
    for _ in range(NUM_POLLS):
        step += 1
        with open(metrics, "ab") as file:
            file.write(make_line(step))
        for name, path in (
            ("runs", "api/runs"),
            (
                "curves",
                f"api/curves?run=run-000&version={answer['version']}&first={answer['last_step'] // answer['width']}",
            ),
        ):
            started = time.monotonic()
            result = server.ask(path)
            seconds[name] += time.monotonic() - started
            answer = result if name == "curves" else answer
    assert answer["last_step"] == step, "the polls have read the new lines"
    return {
        "poll_of_all_runs_seconds": Figure(seconds["runs"] / NUM_POLLS, "<=", 0.05),
        "poll_of_curves_seconds": Figure(seconds["curves"] / NUM_POLLS, "<=", 0.02),
    }


def main() -> int:
    """Measure, and print the result."""
    options = parse_arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as temporary:
        runs = (options.work or Path(temporary)) / "runs"
        make_runs(runs, QUICK_LINES if options.quick else NUM_LINES)
        return print_result("watch", measure(runs))


if __name__ == "__main__":
    sys.exit(main())
