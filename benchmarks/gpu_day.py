"""The first day on a GPU, as one command: correctness, speed and memory, in parts with time limits of their own.

    python benchmarks/gpu_day.py --out DIR [--budget SECONDS] [--parts machine,tiny,...] [--device cpu --tiny]

Parts run as subprocesses, in order of worth. Each writes `DIR/<part>.json` after every measurement, so that a stop
loses nothing, and all write to `DIR/log.txt`. A part that fails is started again for the cases that it has not begun.
At the end a summary of all parts is printed. The exit status is 0 if every part finished and every target is met, else
1.

`--device cpu --tiny` tries the same code on a CPU with the tiny SDXL. What needs CUDA is skipped, with the reason.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_parts.report import read_report, write_report
from harness import ROOT

# Part → seconds after which it is stopped, if the budget lasts so long; in order of worth.
LIMITS = {
    **{"machine": 40.0, "tiny": 120.0, "step": 130.0, "emergency": 80.0, "vae": 70.0, "compile": 240.0},
    "more": 400.0,
}
MODULES = {"tiny": "tiny_model", "step": "steps", "compile": "compiled"}  # where not called like the part
SLOWNESS_OF_CPU = 4  # factor of the limits
LEAST_SECONDS = 12.0  # with less left, a part is not started: imports alone take most of it
STOPPED = "its time is up"
SHOWN_IN_GROUPS = ("ms", "mfu", "extra_bytes_a_weight", "sum_ms")


class Part(NamedTuple):
    """A part of the day: its command, which takes `--out`'s folder from its own arguments, and its limit."""

    name: str
    command: Sequence[str]
    limit_seconds: float


class Outcome(NamedTuple):
    """The end of a part."""

    part: str
    state: str  # `done`, or why not
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="time for all parts")
    parser.add_argument("--parts", default=",".join(LIMITS), help="names of the parts to run, in their order")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the parts")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep what the parts write here (a temporary folder)")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return run_cases(options)
    names = options.parts.split(",")
    if unknown := set(names) - set(LIMITS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; the parts are {', '.join(LIMITS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        parts = [build_part(name, options, work) for name in names]
        return run_day(parts, options.out, options.budget)


def build_part(name: str, options: argparse.Namespace, work: Path) -> Part:
    """Build the command of a part: this program, with the name of the part."""
    command = [sys.executable, __file__, "--part", name, "--out", str(options.out), "--work", str(work)]
    command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    return Part(name, command, LIMITS[name] * (SLOWNESS_OF_CPU if options.device == "cpu" else 1))


def run_cases(options: argparse.Namespace) -> int:
    """Run the cases of one part in this process, which ends without the interpreter's shutdown."""
    import importlib
    import traceback

    from sdxl_trainer.launch.program import end_program, prepare_process

    prepare_process()  # chooses PyTorch's allocator as training does, before PyTorch is loaded

    from gpu_parts.devices import Place
    from gpu_parts.report import Report

    from sdxl_trainer.launch.kernels import use_attention

    place = Place(options.work, options.device, options.tiny)
    part = importlib.import_module(f"gpu_parts.{MODULES.get(options.part, options.part)}")
    status = 1
    try:
        with use_attention("auto"):  # the default of training
            Report(options.out / f"{options.part}.json").run_cases(part.list_cases(place), place.free_memory)
        status = 0
    finally:
        if sys.exc_info()[0] not in (None, SystemExit):
            traceback.print_exc()
        end_program(status)


def run_day(parts: Sequence[Part], out: Path, budget_seconds: float) -> int:
    """Run parts one after the other, print the summary, and return the exit status.

    The summary is also printed if this process is asked to stop.
    """
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    deadline, outcomes = time.monotonic() + budget_seconds, []
    try:
        with open(out / "log.txt", "ab") as log:
            for part in parts:
                outcomes.append(run_part(part, out, log, deadline))
                print(f"{part.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True)
    finally:
        begun = {outcome.part for outcome in outcomes}
        outcomes += [Outcome(part.name, "stopped from outside", 0.0) for part in parts if part.name not in begun]
        lines = list(describe_day(outcomes, out))
        print("\n".join(["", "SUMMARY", *lines]), flush=True)
    return 0 if all(is_fine(outcome, out) for outcome in outcomes) else 1


def run_part(part: Part, out: Path, log: IO[bytes], deadline: float) -> Outcome:
    """Run a part, again after a failure as long as it begins further cases; note the end in its JSON."""
    started, path = time.monotonic(), out / f"{part.name}.json"
    path.unlink(missing_ok=True)  # of an earlier day
    end = min(deadline, started + part.limit_seconds)
    state = "not started: the budget is spent"
    least = min(LEAST_SECONDS, part.limit_seconds / 2)
    while (left := end - time.monotonic()) >= least:
        num_begun = len(list_cases(path))
        status = run_command(part.command, log, left)
        state = STOPPED if status is None else "done" if status == 0 else f"failed with status {status}"
        if not status or len(list_cases(path)) == num_begun:
            break
    document = read_report(path) or {"part": part.name, "cases": {}}
    write_report(path, {**document, "end": state, "seconds": round(time.monotonic() - started, 1)})
    return Outcome(part.name, state, time.monotonic() - started)


def run_command(command: Sequence[str], log: IO[bytes], limit_seconds: float) -> int | None:
    """Run a command with everything that it starts, and return its exit status; None if it had to be stopped."""
    package = str(Path(ROOT) / ".types")  # makes the checkout importable without an installation
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        return process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Ends programs that the part has started, too.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def list_cases(path: Path) -> dict[str, Any]:
    """Return the cases in a part's JSON by name."""
    return (read_report(path) or {}).get("cases", {})


def is_fine(outcome: Outcome, out: Path) -> bool:
    """Return whether a part finished without a failed case, and all its targets are met."""
    cases = list_cases(out / f"{outcome.part}.json").values()
    figures = [figure for case in cases for figure in case["figures"].values()]
    has_failed = any(case["status"] in ("failed", "started") for case in cases)
    return outcome.state == "done" and not has_failed and all(figure["met"] for figure in figures)


def describe_day(outcomes: Sequence[Outcome], out: Path) -> Iterator[str]:
    """Yield the lines of the summary: a table of the parts, then their cases."""
    yield f"{'part':<12}{'seconds':>8}  {'done':>5}{'failed':>8}{'skipped':>9}{'targets met':>13}  end"
    for outcome in outcomes:
        cases = list_cases(out / f"{outcome.part}.json").values()
        counts = [sum(case["status"] == status for case in cases) for status in ("done", "failed", "skipped")]
        figures = [figure["met"] for case in cases for figure in case["figures"].values()]
        numbers = f"{counts[0]:>5}{counts[1]:>8}{counts[2]:>9}{f'{sum(figures)} of {len(figures)}':>13}"
        yield f"{outcome.part:<12}{outcome.seconds:>8.0f}  {numbers}  {outcome.state}"
    for outcome in outcomes:
        yield ""
        yield f"[{outcome.part}]"
        for name, case in list_cases(out / f"{outcome.part}.json").items():
            yield from describe_case(name, case)


def describe_case(name: str, case: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one case: its figures, and the values that are numbers or short texts."""
    reason = f": {case['reason'].splitlines()[0][:160]}" if case["reason"] else ""
    yield f"  {name} {case['status']}{reason} ({case['seconds']} s)"
    for figure, found in case["figures"].items():
        met = "met" if found["met"] else "NOT MET"
        yield f"      {figure} {found['value']:g}, target {found['target']}: {met}"
    numbers = {key: value for key, value in flatten(case["values"]) if is_shown(key, value)}
    if numbers:
        yield "      " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())


def is_shown(key: str, value: Any) -> bool:
    """Return whether the summary shows a value: a number that is not in a group, or one of the most telling in it."""
    group, _, name = key.rpartition(".")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and (not group or name in SHOWN_IN_GROUPS or group.startswith(("phases", "estimated")))


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    sys.exit(main())
