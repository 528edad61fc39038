"""Faults of training: ends, power cuts, full disks, clock jumps, damaged latents, damaged and deleted files."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from campaigns.fault_cache import DAMAGES
from campaigns.fault_jobs import (
    HANG,
    LOST,
    MESSAGE,
    ROOT,
    TORN,
    WRONG,
    Case,
    Job,
    Outcome,
    SkippedError,
    describe_end,
    fill_disk,
    kill_group,
    kill_self,
    open_disk,
    open_small_disk,
    plant_at,
)

from sdxl_trainer.data.formats.manifest import read_latest
from sdxl_trainer.train.checkpoint.folder import list_checkpoints, verify_manifest

STEPS = 8
SAVE_EVERY = 2
PHASES = ("loading", "forward", "backward", "step", "saving", "sampling")


def read_losses(run: Path) -> dict[int, float]:
    """Return step → loss of every step that the run has written down; damaged lines do not count."""
    losses = {}
    file = run / "logs" / "metrics.jsonl"
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
            if "loss" in values and isinstance(values["step"], int):
                losses[values["step"]] = values["loss"]
        except (ValueError, TypeError, KeyError):
            continue
    return losses


def finish_run(case: Case, words: list[str], run: Path, outcome: Outcome) -> None:
    """Start the run with the same command, let it reach its end, and compare all losses with an unbroken run's."""
    job = Job("train", words, case.folder / "end.log")
    if describe_end(outcome, job, job.wait(), {0}):
        compare_losses(case, run, outcome)


def compare_losses(case: Case, run: Path, outcome: Outcome) -> None:
    """Compare a finished run's losses with those of an unbroken run."""
    losses = read_losses(run)
    outcome.check(LOST, len(losses) == STEPS, f"{len(losses)} of {STEPS} losses are in metrics.jsonl")
    difference = max_difference(case, losses)
    outcome.check(WRONG, difference <= 2e-5, f"losses differ by {difference:g}")


def max_difference(case: Case, losses: dict[int, float]) -> float:
    """Return the largest difference between losses and those of the unbroken run at the same steps."""
    return max((abs(loss - case.base.losses.get(step, float("inf"))) for step, loss in losses.items()), default=0.0)


def check_checkpoints(run: Path, outcome: Outcome, printed: str = "") -> None:
    """Check that every checkpoint under its final name is whole, and the newest one that was announced is there."""
    for folder in list_checkpoints(run / "checkpoints"):
        problem = verify_manifest(folder)
        outcome.check(TORN, problem is None, f"{folder.name}: {problem}")
    announced = [line.split("step-")[-1][:8] for line in printed.splitlines() if line.rstrip().endswith("is saved")]
    if announced:
        kept = [path.name for path in list_checkpoints(run / "checkpoints")]
        outcome.check(LOST, f"step-{announced[-1]}" in kept, f"step {announced[-1]} was announced; there are {kept}")


def plant_in_phase(phase: str, turn: int, action: Callable[[], None]) -> Callable[[int], None]:
    """Return a plant that calls `action` in a rank when a phase of training is entered for the n-th time."""

    def plant(rank: int) -> None:
        from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
        from sdxl_trainer.train.engine.engine import Engine
        from sdxl_trainer.train.run import loop, networks

        places: dict[str, tuple[Any, str]] = {
            "loading": (networks, "build_networks"),
            "forward": (Engine, "__call__"),
            "backward": (Engine, "backward"),
            "step": (Engine, "step"),
            "saving": (CheckpointWriter, "write_shard"),
            "sampling": (loop, "write_generated_images"),
        }
        owner, name = places[phase]
        original, calls = getattr(owner, name), [0]

        def planted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == turn:
                action()
            return original(*args, **kwargs)

        setattr(owner, name, planted)

    return plant


class PlantedError(BaseException):
    """Stands for a fault of the program; no handler for user errors takes it."""


def raise_planted() -> None:
    """Raise an error that no part of the program expects."""
    raise PlantedError("planted")


def end_training(case: Case) -> Iterator[Outcome]:
    """End a run three times, on one rank and on two, go on each time, and let it end."""
    rng, run = case.rng, case.folder / "runs" / "run"
    stage = rng.choice((1, 2, 3))
    words, outcomes = [*case.words(run_dir=run.parent, run_name="run"), f"engine.zero_stage={stage}"], []
    for _ in range(3):
        what = rng.choice(("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "error"))
        number = 0 if what == "error" else getattr(signal, what)
        action = raise_planted if what == "error" else partial(kill_group, number)
        phase, moment = rng.choice((*PHASES, "operation", "operation")), rng.randint(1, case.base.operations["train"])
        phase = rng.choice(PHASES) if what == "error" else phase
        turn = moment if phase == "operation" else 1 if phase == "loading" else rng.randint(1, 3)
        outcome = Outcome(f"{what} in {phase} {turn}, ZeRO {stage}")
        plant = plant_at(turn, action) if phase == "operation" else plant_in_phase(phase, turn, action)
        before = len(read_losses(run))
        job = Job("train", words, case.folder / "log", plant=plant)
        status = job.wait()
        if what != "error" or status == 0:
            describe_end(outcome, job, status, {0, -number, 128 + number})
        outcome.check(HANG, status is not None, "no end")
        check_checkpoints(run, outcome, job.read_log())
        kept = max([0, *(int(path.name[5:]) for path in list_checkpoints(run / "checkpoints"))])
        completed = len(read_losses(run))
        is_kept = what in ("SIGKILL", "error") or completed <= max(before, kept)
        outcome.check(LOST, is_kept, f"{completed} steps were completed, the newest checkpoint is of step {kept}")
        outcomes.append(outcome)
    finish_run(case, words, run, outcomes[-1])
    yield from outcomes


def cut_power_of_training(case: Case) -> Iterator[Outcome]:
    """Cut the power under a run twice, then let it end."""
    with open_disk(case.folder) as disk:
        run, outcomes = disk.place / "runs" / "run", []
        words = case.words(run_dir=run.parent, run_name="run")
        for _ in range(2):
            moment = case.rng.randint(1, case.base.operations["train"])
            outcome = Outcome(f"power cut at operation {moment}")
            job = Job("train", words, case.folder / "log", plant=plant_at(moment, disk.cut_power))
            job.wait()
            disk.restart()
            check_checkpoints(run, outcome, job.read_log())
            for model in run.glob("models/*.safetensors"):
                outcome.check(TORN, model.stat().st_size > 0, f"{model.name} is empty")
            outcomes.append(outcome)
        finish_run(case, words, run, outcomes[-1])
    yield from outcomes


def fill_disk_of_training(case: Case) -> Iterator[Outcome]:
    """Fill the disk under a run, for good or until a checkpoint has waited for a moment."""
    stays = case.rng.random() < 0.4
    with open_small_disk(case.folder, 320 << 10) as disk:
        run, moment = disk / "runs" / "run", case.rng.randint(1, case.base.operations["train"])
        outcome = Outcome(f"disk full from operation {moment} on{'' if stays else ', for two seconds'}")
        words = [*case.words(run_dir=run.parent, run_name="run"), "checkpoint.wait_for_space_minutes=0.1"]
        job = Job("train", words, case.folder / "log", plant=plant_at(moment, partial(fill_disk, disk)))
        filled_at = None
        while not job.poll() and not stays:
            if filled_at is None and (disk / "filler").exists():
                filled_at = time.monotonic()
            if filled_at is not None and time.monotonic() > filled_at + 2:
                (disk / "filler").unlink(missing_ok=True)
                break
            time.sleep(0.02)
        status = job.wait()
        describe_end(outcome, job, status, {0, 1} if stays else {0})
        if status:
            outcome.check(MESSAGE, str(disk) in job.read_log(), f"folder not named: {job.read_log()[-200:]}")
        check_checkpoints(run, outcome, job.read_log())
        (disk / "filler").unlink(missing_ok=True)
        if status:
            finish_run(case, words, run, outcome)
        else:
            difference = max_difference(case, read_losses(run))
            outcome.check(WRONG, difference <= 2e-5, f"losses differ by {difference:g}")
    yield outcome


def move_clock_of_training(case: Case) -> Iterator[Outcome]:
    """Let the clock jump by days, back and forth, while a run goes on: its numbers must not change."""
    run, rng = case.folder / "runs" / "run", case.rng
    seed = rng.random()

    def shift(_: int) -> None:
        jumps, offset = random.Random(seed), [0.0]

        def jump(original: Callable[[], Any], scale: float) -> Any:
            if jumps.random() < 0.05:
                offset[0] = jumps.choice((-86_400.0, 0.0, 3600.0, 30 * 86_400.0))
            return original() + type(original())(offset[0] * scale)

        for name, scale in (("time", 1.0), ("time_ns", 1e9)):
            setattr(time, name, partial(jump, getattr(time, name), scale))

    outcome = Outcome("clock jumps by days")
    words = case.words(run_dir=run.parent, run_name="run")
    job = Job("train", words, case.folder / "log", plant=shift)
    if describe_end(outcome, job, job.wait(), {0}):
        compare_losses(case, run, outcome)
        check_checkpoints(run, outcome, job.read_log())
    yield outcome


def damage_latents(case: Case) -> Iterator[Outcome]:
    """Train on a cache of which a third is damaged: the samples are named and left out."""
    rng, cache, run = case.rng, case.folder / "cache", case.folder / "runs" / "run"
    shutil.copytree(case.base.folder / "npz", cache)
    entries = read_latest(cache)
    chosen = {key: rng.choice(sorted(DAMAGES)) for key in rng.sample(sorted(entries), 8)}
    level = rng.choice(("none", "stat", "full"))
    live = rng.random() < 0.5

    def damage() -> None:
        for key, name in chosen.items():
            DAMAGES[name](cache / entries[key].file, random.Random(key))

    if not live:
        damage()
    words = [
        *case.words(run_dir=run.parent, run_name="run", cache_dir=cache),
        *("data.max_bad_fraction=1", f"data.verify_latents={level}", "sample.prompts=[]", "sample.every_steps=0"),
    ]
    job = Job("train", words, case.folder / "log", plant=plant_at(12, damage) if live else None)
    status = job.wait()
    file = run / "logs" / "bad_samples.jsonl"
    told = job.read_log() + (file.read_text(errors="replace") if file.is_file() else "")
    for key, name in chosen.items():
        outcome = Outcome(f"latents: {name}, {'while training' if live else 'before the start'}, verified: {level}")
        describe_end(outcome, job, status, {0})
        # Whoever asks for no check at the start reads latents behind which something follows, which are right.
        if not live and (level, name) != ("none", "one byte more"):
            outcome.check(MESSAGE, key in told, f"{key} is not named")
        yield outcome


def damage_run(case: Case) -> Iterator[Outcome]:
    """Damage a file of a stopped run; the next start resumes exactly, or names the file and the cure."""
    rng, run = case.rng, case.folder / "runs" / "run"
    shutil.copytree(stop_run(case), run)
    cache = case.folder / "cache"
    shutil.copytree(case.base.folder / "npz", cache)
    words = case.words(run_dir=run.parent, run_name="run", cache_dir=cache)
    name = rng.choice(sorted(RUN_DAMAGES))
    outcome = Outcome(f"run: {name}")
    file = RUN_DAMAGES[name](run, cache, rng)
    job = Job("train", words, case.folder / "log")
    status = job.wait()
    describe_end(outcome, job, status, {0, 1, 2})
    if status:
        is_named = file.name in job.read_log() or "launch/cache.sh" in job.read_log()
        outcome.check(MESSAGE, is_named, f"{file.name} is not named: {job.read_log()[-200:]}")
    elif status == 0:
        losses = read_losses(run)
        difference = max_difference(case, losses)
        outcome.check(WRONG, difference <= 2e-5, f"losses differ by {difference:g}")
        outcome.check(WRONG, STEPS in losses, "the last step is missing")
        outcome.check(LOST, "checkpoints" in name or len(losses) >= STEPS // 2, f"{len(losses)} losses are left")
    if "all checkpoints" in name:
        outcome.check(LOST, status != 0, "started at step 0, with status 0")
    yield outcome


def stop_run(case: Case) -> Path:
    """Return a run that ended after half of the steps; the first case that needs it makes it."""
    folder, making = case.base.folder / "stopped", case.folder / "stopped"
    if not folder.is_dir():
        words = [*case.words(run_dir=making, run_name="run"), f"train.max_steps={STEPS // 2}"]
        job = Job("train", words, case.folder / "stopped.log")
        assert job.wait() == 0, job.read_log()[-2000:]
        making.rename(folder)
    return folder / "run"


def _garbage(*names: str) -> Callable[[Path, Path, random.Random], Path]:
    def damage(run: Path, cache: Path, rng: random.Random) -> Path:
        found = [path for name in names for path in sorted([*run.glob(name), *cache.glob(name)])]
        path = rng.choice(found)
        path.write_bytes(
            rng.choice((b"", rng.randbytes(500), b"{}", b"[1", path.read_bytes()[: path.stat().st_size // 2]))
        )
        return path

    return damage


def _turn_into_folder(name: str) -> Callable[[Path, Path, random.Random], Path]:
    def damage(run: Path, cache: Path, rng: random.Random) -> Path:
        (run / name).unlink(missing_ok=True)
        (run / name / "x").mkdir(parents=True)
        return run / name

    return damage


def _turn_into_file(name: str) -> Callable[[Path, Path, random.Random], Path]:
    def damage(run: Path, cache: Path, rng: random.Random) -> Path:
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).write_bytes(b"x")
        return run / name

    return damage


def _garble_metrics(run: Path, cache: Path, rng: random.Random) -> Path:
    file = run / "logs" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines) - 1)
    lines[at] = rng.choice(
        (b"\0" * 80 + b"\n", b'{"step": \n', b"[]\n", b'{"loss": 1}\n', b"\n", b'{"step": "a", "loss": 1}\n')
    )
    file.write_bytes(b"".join(lines))
    return file


def _flip_checkpoint(which: slice) -> Callable[[Path, Path, random.Random], Path]:
    def damage(run: Path, cache: Path, rng: random.Random) -> Path:
        for folder in list_checkpoints(run / "checkpoints")[which]:
            path = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        return run / "checkpoints"

    return damage


def _delete(name: str) -> Callable[[Path, Path, random.Random], Path]:
    def damage(run: Path, cache: Path, rng: random.Random) -> Path:
        for path in [*run.glob(name), *cache.glob(name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return run / name

    return damage


RUN_DAMAGES: dict[str, Callable[[Path, Path, random.Random], Path]] = {
    "metrics line garbled": _garble_metrics,
    "metrics garbage": _garbage("logs/metrics.jsonl"),
    "metrics deleted": _delete("logs/metrics.jsonl"),
    "metrics a folder": _turn_into_folder("logs/metrics.jsonl"),
    "train.log a folder": _turn_into_folder("logs/train.log"),
    "TensorBoard's folder a file": _turn_into_file("logs/tensorboard"),
    "logs deleted": _delete("logs"),
    "config.yaml garbage": _garbage("config.yaml"),
    "config.yaml a folder": _turn_into_folder("config.yaml"),
    "report garbage": _garbage("report/*"),
    "report a file": _turn_into_file("report"),
    "samples a file": _turn_into_file("samples"),
    "models a file": _turn_into_file("models"),
    "index garbage": _garbage("**/*.arrow"),
    "manifest part garbage": _garbage("manifest/*.jsonl"),
    "cache.json garbage": _garbage("cache.json"),
    "text.json garbage": _garbage("text.json"),
    "newest of the checkpoints flipped": _flip_checkpoint(slice(-1, None)),
    "all checkpoints flipped": _flip_checkpoint(slice(None)),
    "manifests of the checkpoints deleted": _delete("checkpoints/*/manifest.json"),
    "a state file of the checkpoints deleted": _delete(f"checkpoints/step-{STEPS // 2:08d}/state/*optim*"),
}


def delete_while_training(case: Case) -> Iterator[Outcome]:
    """Delete files of a run while it goes on: numbers are not lost, and no torn checkpoint is announced."""
    run, name = case.folder / "runs" / "run", case.rng.choice(sorted(DELETED))
    moment = case.rng.randint(case.base.operations["train"] // 3, case.base.operations["train"])
    outcome = Outcome(f"deleted while training: {name}, at operation {moment}")

    def delete() -> None:
        for path in sorted(run.glob(DELETED[name]))[:1] if DELETED[name] != "." else [run]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    words = case.words(run_dir=run.parent, run_name="run")
    job = Job("train", words, case.folder / "log", plant=plant_at(moment, delete))
    status = job.wait()
    describe_end(outcome, job, status, {0, 1})
    if status == 0 and name != "the run folder":
        check_checkpoints(run, outcome, job.read_log())
        compare_losses(case, run, outcome)
    yield outcome


DELETED = {
    "metrics": "logs/metrics.jsonl",
    "the logs": "logs",
    "TensorBoard's files": "logs/tensorboard",
    "the run folder": ".",
    "a file of a checkpoint": "checkpoints/step-*/state/*optim*",
    "a file of an unfinished checkpoint": "checkpoints/.step-*/state/*optim*",
    "the samples": "samples",
    "a model file": "models/*",
}


def start_twice(case: Case) -> Iterator[Outcome]:
    """Start a second training in a run folder in which one goes on: it is refused, and the first is not disturbed."""
    run = case.folder / "runs" / "run"
    words = case.words(run_dir=run.parent, run_name="run")
    first = Job("train", words, case.folder / "first.log")
    deadline = time.monotonic() + 60
    while not first.poll() and not read_losses(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send(signal.SIGSTOP)
    outcome = Outcome("second training in the same run folder")
    second = Job("train", words, case.folder / "second.log")
    time.sleep(case.rng.uniform(2, 4))
    first.send(signal.SIGCONT)
    if describe_end(outcome, second, second.wait(), {1, 2}):
        outcome.check(MESSAGE, str(run) in second.read_log() or "run" in second.read_log(), "the folder is not named")
    if describe_end(outcome, first, first.wait(), {0}):
        compare_losses(case, run, outcome)
        check_checkpoints(run, outcome, first.read_log())
    yield outcome


def kill_launcher(case: Case) -> Iterator[Outcome]:
    """Kill the launch script outright: its ranks end by themselves, with the state saved."""
    run = case.folder / "runs" / "run"
    words = [*case.words(run_dir=run.parent, run_name="run"), "train.max_steps=100000", "checkpoint.every_steps=0"]
    outcome = Outcome("launch script killed outright")
    with open(case.folder / "log", "wb") as log:
        launcher = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "train.sh"), *words],
            env={**os.environ, "NPROC": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + 60
    while len(read_losses(run)) < 2 and time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.1)
    if len(read_losses(run)) < 2:
        launcher.kill()
        raise SkippedError("the launch script did not start training within 60 s")
    ranks = [pid for pid in find_processes(str(run.parent)) if pid != launcher.pid]
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 40
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    living = [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    outcome.check(HANG, not living, f"{len(living)} processes train on 40 s after their launcher was killed")
    for pid in living:
        os.kill(pid, signal.SIGKILL)
    outcome.check(LOST, bool(list_checkpoints(run / "checkpoints")) or bool(living), "no state was saved")
    yield outcome


def find_processes(word: str) -> list[int]:
    """Return the processes whose command line contains a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def kill_one_rank(case: Case) -> Iterator[Outcome]:
    """Kill one rank of two; the other ends, and the next start resumes."""
    run = case.folder / "runs" / "run"
    words = case.words(run_dir=run.parent, run_name="run")
    moment, victim = case.rng.randint(1, case.base.operations["train"]), case.rng.randrange(2)
    outcome = Outcome(f"SIGKILL of rank {victim} of 2 at operation {moment}")
    job = Job("train", words, case.folder / "log", 2, plant_at(moment, kill_self, victim=victim))
    status = job.wait(120)
    outcome.check(HANG, status is not None, "the other rank does not end within 120 s")
    check_checkpoints(run, outcome, job.read_log())
    job = Job("train", words, case.folder / "end.log", 2)
    if describe_end(outcome, job, job.wait(120), {0}):
        compare_losses(case, run, outcome)
    yield outcome
