"""benchmarks/gpu_day.py: a part that fails or outlasts its time leaves the results of the others, and is named."""

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT

BENCHMARKS = str(ROOT / "benchmarks")
# Runs cases of a stand-in part: `ok`, `skip`, `raise`, `miss` (a target), `die` (the process) and `hang`.
STAND_IN = f"""
import os, sys, time
sys.path.insert(0, {BENCHMARKS!r})
from pathlib import Path
from gpu_parts.report import Report, SkippedCase

def measure(kind, case):
    case.note(begun=1.0, nested={{"ms": 2.5, "text": "x"}})
    if kind == "skip":
        raise SkippedCase("there is no GPU")
    if kind == "raise":
        raise ValueError("a wrong value")
    if kind == "die":
        os._exit(11)
    if kind == "hang":
        time.sleep(600)
    case.check("error", 2.0 if kind == "miss" else 0.5, "<=", 1.0)

names = sys.argv[2].split(",")
Report(Path(sys.argv[1])).run_cases({{name: lambda case, kind=name: measure(kind, case) for name in names}})
"""


@pytest.fixture
def gpu_day(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_day")


def build_part(gpu_day: Any, out: Path, name: str, cases: str, limit_seconds: float = 60.0) -> Any:
    return gpu_day.Part(name, [sys.executable, "-c", STAND_IN, str(out / f"{name}.json"), cases], limit_seconds)


def read_cases(out: Path, part: str) -> dict[str, Any]:
    return json.loads((out / f"{part}.json").read_text())["cases"]


def test_parts_that_fail_leave_the_results_of_the_others(gpu_day: Any, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    parts = [
        build_part(gpu_day, out, "good", "ok,skip"),
        build_part(gpu_day, out, "bad", "raise,ok"),
        build_part(gpu_day, out, "dead", "die,ok"),
        build_part(gpu_day, out, "slow", "ok,hang,miss", limit_seconds=4.0),
        gpu_day.Part("broken", [sys.executable, "-c", "raise SystemExit(3)"], 60.0),
        build_part(gpu_day, out, "last", "miss"),
    ]
    assert gpu_day.run_day(parts, out, 120.0) == 1
    assert {name: case["status"] for name, case in read_cases(out, "good").items()} == {"ok": "done", "skip": "skipped"}
    assert read_cases(out, "good")["skip"]["reason"] == "there is no GPU"
    assert read_cases(out, "good")["ok"]["figures"] == {"error": {"value": 0.5, "target": "<= 1", "met": True}}
    assert {name: case["status"] for name, case in read_cases(out, "bad").items()} == {"raise": "failed", "ok": "done"}
    # The process that died is started again for the case that it had not begun.
    assert {name: case["status"] for name, case in read_cases(out, "dead").items()} == {"die": "failed", "ok": "done"}
    assert read_cases(out, "dead")["die"]["values"]["begun"] == 1.0
    assert {name: case["status"] for name, case in read_cases(out, "slow").items()} == {"ok": "done", "hang": "started"}
    assert json.loads((out / "broken.json").read_text())["end"] == "failed with status 3"
    assert sorted(path.name for path in out.iterdir()) == sorted([*(f"{part.name}.json" for part in parts), "log.txt"])
    printed = capfd.readouterr().out
    summary = printed[printed.index("SUMMARY") :].splitlines()
    rows = {line.split()[0]: line for line in summary if line and line.split()[0] in {part.name for part in parts}}
    assert [*rows] == ["good", "bad", "dead", "slow", "broken", "last"]
    assert rows["good"].endswith("  done") and "1 of 1" in rows["good"]
    assert rows["slow"].endswith("its time is up") and rows["broken"].endswith("failed with status 3")
    assert rows["last"].endswith("  done") and "0 of 1" in rows["last"]
    assert "  skip skipped: there is no GPU" in printed and "  raise failed: ValueError: a wrong value" in printed
    assert "      error 2, target <= 1: NOT MET" in summary and "begun 1, nested.ms 2.5" in printed


def test_parts_without_time_left_are_named(gpu_day: Any, tmp_path: Path, capfd: Any) -> None:
    parts = [build_part(gpu_day, tmp_path, name, "ok") for name in ("first", "second")]
    assert gpu_day.run_day(parts, tmp_path, 5.0) == 1
    assert capfd.readouterr().out.count("not started: the budget is spent") == 4
    assert json.loads((tmp_path / "second.json").read_text())["cases"] == {}


def test_a_stop_prints_the_summary_and_ends_all_programs(tmp_path: Path) -> None:
    """As when a lent machine is taken back."""
    code = f"""
import sys
sys.path.insert(0, {BENCHMARKS!r})
from pathlib import Path
import gpu_day
part = gpu_day.Part("hanging", [sys.executable, "-c", {STAND_IN!r}, sys.argv[1] + "/hanging.json", "ok,hang"], 300.0)
later = gpu_day.Part("later", part.command, 300.0)
sys.exit(gpu_day.run_day([part, later], Path(sys.argv[1]), 300.0))
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "hanging.json").exists() or "hang" not in read_cases(tmp_path, "hanging"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert printed.count("stopped from outside") == 2 and "  ok done" in printed
    assert read_cases(tmp_path, "hanging")["ok"]["status"] == "done"


@pytest.mark.long
def test_the_day_on_a_cpu(tmp_path: Path) -> None:
    """Every part runs on a CPU with small networks, and what needs CUDA names that as its reason."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_day.py"), "--out", str(tmp_path), "--device", "cpu"]
    done = subprocess.run([*command, "--tiny", "--budget", "3600"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-6000:]
    parts = ("machine", "tiny", "step", "emergency", "vae", "compile", "more")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(f"{part}.json" for part in parts), "log.txt"])
    cases = {part: read_cases(tmp_path, part) for part in parts}
    assert cases["tiny"]["cache"]["figures"]["largest_error"]["value"] <= 1e-5
    assert cases["tiny"]["resume"]["figures"]["largest_error_of_losses"]["value"] <= 1e-6
    reasons = [case["reason"] for found in cases.values() for case in found.values() if case["status"] == "skipped"]
    assert sum("CUDA" in reason for reason in reasons) >= 3
    step = cases["step"]["ours_micro_batch_4"]["values"]
    assert step["ms"] > 0 and set(step["phases_ms"]) == {"forward", "backward", "update"}
    assert all(case["status"] in ("done", "skipped") for found in cases.values() for case in found.values())
