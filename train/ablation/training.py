"""Training of an ablation's runs: one after the other, or one on each GPU. What is finished is not trained again."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sdxl_trainer.configs.problems import FailedError, describe_seconds
from sdxl_trainer.data.files import read_regular, write_atomic
from sdxl_trainer.launch.program import announce
from sdxl_trainer.launch.signals import StopRequest
from sdxl_trainer.launch.status import STATUS_DONE, STATUS_WRONG_INPUT
from sdxl_trainer.train.ablation.hopeless import Hopeless, describe_hopeless, find_hopeless
from sdxl_trainer.train.ablation.plan import Plan, PlannedRun
from sdxl_trainer.train.report.run_status import STATUS_FILE, read_status

ROOT = Path(__file__).resolve().parents[2]  # the checkout, or the installed package
STATE_FILE, CONSOLE_FOLDER = "ablation.json", "console"  # in the ablation's folder
MAX_STATE_BYTES = 1 << 24
POLL_SECONDS, PROGRESS_SECONDS = 0.5, 60.0
TAIL_LINES = 15  # of a failed run's console that are shown
ONE_RANK = {"NPROC": "1", "NNODES": "1", "RDZV_ENDPOINT": ""}  # for launch/torchrun.sh


class State(msgspec.Struct):
    """The file of an ablation: its hopeless arms, by their names."""

    hopeless: dict[str, Hopeless] = {}


@dataclass(kw_only=True)
class Job:
    """A run that is being trained."""

    run: PlannedRun
    number: int  # of the run in the plan, from 1
    process: subprocess.Popen
    console: Path
    shown: float  # time of the last progress line
    first_share: float  # of its steps that were done when it was started
    num_judged: int = 0  # validations at the last judgement


class Training:
    """Trains the runs of a plan.

    Args:
        devices: GPU of each place where a run can be trained; None for all GPUs at once, or the CPU.
        keep_hopeless: stop no arm early.
        stop: the user's request to stop.
    """

    def __init__(self, plan: Plan, devices: Sequence[str | None], keep_hopeless: bool, stop: StopRequest):
        self._plan, self._keep_hopeless, self._stop = plan, keep_hopeless, stop
        self._jobs: dict[str | None, Job] = {}
        self._waiting: list[tuple[int, PlannedRun]] = []
        self._started, self._trained = time.monotonic(), 0.0  # runs' worth of steps of jobs that have ended
        self._devices = devices
        self._file = plan.folder / STATE_FILE
        if keep_hopeless:
            self._file.unlink(missing_ok=True)
        self.hopeless = read_state(self._file).hopeless
        self.failed: dict[Path, int] = {}  # exit status of each run that has failed, by its folder

    def train_all(self) -> None:
        """Train all runs that are not finished.

        Raises:
            Interrupted: the user asked to stop; the runs at work are saved.
            FailedError: a run refused its settings or data, which the other runs share.
        """
        self._waiting = [
            (number, run) for number, run in enumerate(self._plan.runs, 1) if not run.is_finished(self._plan.num_steps)
        ]
        try:
            while self._waiting or self._jobs:
                self._waiting = [(number, run) for number, run in self._waiting if run.arm.name not in self.hopeless]
                for device in self._devices:
                    if self._waiting and device not in self._jobs:
                        self._start(*self._waiting.pop(0), device)
                self._stop.raise_if_received()
                time.sleep(POLL_SECONDS)
                for device, job in list(self._jobs.items()):
                    self._attend(device, job)
        finally:
            _end(list(self._jobs.values()))

    def _start(self, number: int, run: PlannedRun, device: str | None) -> None:
        console = self._plan.folder / CONSOLE_FOLDER / f"{run.folder.name}.txt"
        console.parent.mkdir(parents=True, exist_ok=True)
        command = ["bash", str(ROOT / "launch" / "train.sh"), "--cfg", str(self._plan.cfg), *run.words]
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device, **ONE_RANK})
        with open(console, "ab") as output:
            # In a session of its own, because Ctrl-C in the terminal would reach it besides the signal that it is sent.
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._jobs[device] = Job(
            run=run,
            number=number,
            process=process,
            console=console,
            shown=time.monotonic(),
            first_share=read_share(run, self._plan.num_steps),
        )
        announce(f"run {number} of {len(self._plan.runs)}: {run.label}; its output is in {console}")
        self._show_rest()

    def _attend(self, device: str | None, job: Job) -> None:
        """Take note of what a job has done."""
        status = job.process.poll()
        if not self._keep_hopeless and job.run.arm.name not in self.hopeless:
            self._judge(job)
        if status is None:
            if job.run.arm.name in self.hopeless:
                _end([job])
            elif time.monotonic() - job.shown > PROGRESS_SECONDS:
                self._show_progress(job)
            return
        del self._jobs[device]
        self._trained += read_share(job.run, self._plan.num_steps) - job.first_share
        if status == STATUS_DONE or job.run.arm.name in self.hopeless:
            return
        tail = "\n".join(job.console.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
        message = f"{job.run.label} ended with status {status}; the end of {job.console}:\n{tail}"
        if status == STATUS_WRONG_INPUT:
            raise FailedError(message)
        announce(message)
        self.failed[job.run.folder] = status

    def _judge(self, job: Job) -> None:
        """Stop an arm whose run is hopeless, after each validation of the run."""
        baseline = self._plan.find_baseline(job.run)
        found = read_status(job.run.folder / "logs" / STATUS_FILE)
        if baseline is None or found is None:
            return
        num_files = sum(1 for _ in (job.run.folder / "logs" / "validation").glob("*.parquet"))
        if num_files == job.num_judged:
            return
        job.num_judged = num_files
        verdict = find_hopeless(job.run.folder, baseline.folder, self._plan.num_steps or found.max_steps)
        if verdict is None:
            return
        self.hopeless[job.run.arm.name] = verdict
        write_atomic(self._file, msgspec.json.encode(State(self.hopeless)))
        reason = describe_hopeless(verdict)
        announce(f"{job.run.arm.label} is hopeless: {reason}")

    def _show_progress(self, job: Job) -> None:
        job.shown = time.monotonic()
        status = read_status(job.run.folder / "logs" / STATUS_FILE)
        if status is not None and status.max_steps:
            announce(f"run {job.number} of {len(self._plan.runs)}: step {status.step} of {status.max_steps}")
            self._show_rest()

    def _show_rest(self) -> None:
        """Print the time that the other steps of all runs take, at the pace since the start."""
        num_steps = self._plan.num_steps
        shares = [(read_share(job.run, num_steps), job.first_share) for job in self._jobs.values()]
        trained = self._trained + sum(share - first for share, first in shares)
        rest = [share for share, _ in shares] + [read_share(run, num_steps) for _, run in self._waiting]
        seconds = estimate_rest(time.monotonic() - self._started, trained, rest)
        if seconds is not None:
            announce(f"about {describe_seconds(seconds)} left for the runs that are not finished")


def read_share(run: PlannedRun, num_steps: int | None) -> float:
    """Return the share of a run's steps that it has made, 0 to 1.

    Args:
        num_steps: of the plan; None where epochs are counted. The run's status may be that of a smaller budget.
    """
    status = read_status(run.folder / "logs" / STATUS_FILE)
    steps = status and (num_steps or status.max_steps)
    return min(1.0, status.step / steps) if status is not None and steps else 0.0


def estimate_rest(elapsed_seconds: float, trained: float, shares: Sequence[float]) -> float | None:
    """Return the seconds that the other steps take at the pace so far; None before the first step.

    Args:
        trained: steps since the start, in whole runs.
        shares: of its steps that each run has made which is not finished.
    """
    rest = sum(1 - share for share in shares)
    return rest * elapsed_seconds / trained if trained > 0 and rest > 0 else None


def read_state(file: Path) -> State:
    """Read what an ablation has kept; a missing or damaged file is an empty one."""
    try:
        return msgspec.json.decode(read_regular(file, MAX_STATE_BYTES).content, type=State)
    except (OSError, ValueError):
        return State()


def _end(jobs: Sequence[Job]) -> None:
    """Ask jobs to save and stop, all at once, and wait for them."""
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGTERM)
    for job in jobs:
        job.process.wait()
