"""Part `tiny`: the real programs on the tiny SDXL, on the GPU and on the CPU, and a resumed run.

Programs that do not need each other run at the same time. With `--device cpu` both sides of a comparison run on the
CPU, which shows that the part works.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import ROOT, make_tiny_set

from gpu_parts.devices import Place
from gpu_parts.report import Case, Cases

NUM_IMAGES = 24
END_OF_OUTPUT = 1500  # characters


class Program(NamedTuple):
    """A program of the checkout and the settings that it is started with."""

    name: str
    script: str
    words: Sequence[str]
    on_cpu: bool


def list_cases(place: Place) -> Cases:
    """List the cases of this part."""
    tiny = TinyRuns(place)
    return {
        "cache": tiny.compare_caches,
        "training": tiny.compare_trainings,
        "resume": tiny.compare_resume,
        "export": tiny.compare_exports,
    }


class TinyRuns:
    """The folder of the tiny runs, and the comparisons of what they have written."""

    def __init__(self, place: Place):
        self._place = place
        self._folder = place.work / "tiny"
        self._num_steps = 8 if place.tiny else 20
        self._saved_step = self._num_steps // 2

    def compare_caches(self, case: Case) -> None:
        """Cache on the CPU and on the GPU in strict fp32, and compare the latents."""
        settings = write_tiny_set(self._folder)
        programs = [
            Program(f"cache-{side}", "cache/main.py", [*settings, f"cache.dir={self._folder / side}"], side == "cpu")
            for side in ("cpu", "device")
        ]
        case.note(device=self._place.device, **run_programs(programs, self._folder))
        names = sorted(path.name for path in (self._folder / "cpu").glob("*.npz"))
        errors = [compare_latents(self._folder / "cpu" / name, self._folder / "device" / name) for name in names]
        case.note(images=len(names))
        case.check("largest_error", max(errors), "<=", 1e-3)

    def compare_trainings(self, case: Case) -> None:
        """Train on the CPU and on the GPU from the same noise, and compare the losses."""
        runs = [("cpu", "fp32", True), ("fp32", "fp32", False), ("bf16", "bf16", False)]
        programs = [self._build_training(name, precision, on_cpu) for name, precision, on_cpu in runs]
        case.note(device=self._place.device, **run_programs(programs, self._folder))
        losses = {name: self._read_losses(name) for name, _, _ in runs}
        case.note(losses={name: list(found.values()) for name, found in losses.items()})
        exact = losses["cpu"]
        assert len(exact) == self._num_steps, f"{len(exact)} losses of {self._num_steps} steps"
        fp32 = [abs(losses["fp32"][step] - loss) for step, loss in exact.items()]
        bf16 = [abs(losses["bf16"][step] / loss - 1) for step, loss in exact.items()]
        case.check("largest_error_of_fp32_losses", max(fp32), "<=", 1e-4)
        case.check("mean_relative_error_of_bf16_losses", sum(bf16) / len(bf16), "<=", 0.02)
        case.note(largest_relative_error_of_bf16_losses=max(bf16))

    def compare_resume(self, case: Case) -> None:
        """Resume the fp32 run from its checkpoint, and compare the losses with those of the run straight through."""
        checkpoint = Path("checkpoints", f"step-{self._saved_step:08d}")
        runs = self._folder / "runs"
        shutil.copytree(runs / "fp32" / checkpoint, runs / "resumed" / checkpoint, dirs_exist_ok=True)
        case.note(**run_programs([self._build_training("resumed", "fp32", False)], self._folder))
        straight, resumed = self._read_losses("fp32"), self._read_losses("resumed")
        assert [*resumed] == [step for step in straight if step > self._saved_step], f"resumed steps {[*resumed]}"
        errors = [abs(straight[step] - loss) for step, loss in resumed.items()]
        case.check("largest_error_of_losses", max(errors), "<=", 1e-6)

    def compare_exports(self, case: Case) -> None:
        """Compare the frozen networks of the exported models with the base model's."""
        for name in ("fp32", "bf16"):
            path = self._folder / "runs" / name / "models" / f"step-{self._num_steps:08d}.safetensors"
            different = list(find_different_weights(self._folder / "model", path))
            case.note(**{f"{name}_different": different[:5]})
            case.check(f"{name}_different_frozen_weights", len(different), "<=", 0)

    def _build_training(self, name: str, precision: str, on_cpu: bool) -> Program:
        words = [*list_settings(self._folder), f"cache.dir={self._folder / 'cpu'}", f"run.name={name}"]
        words += [f"engine.precision={precision}", f"train.max_steps={self._num_steps}"]
        words += [f"checkpoint.every_steps={self._saved_step}", "run.noise_device=cpu"]
        words += ["checkpoint.keep_last=9", "optim.warmup_steps=4", "data.num_workers=0"]
        words += ["train.global_batch_size=8", "train.micro_batch_size=4", "sample.num_inference_steps=4"]
        return Program(f"train-{name}", "train/main.py", words, on_cpu)

    def _read_losses(self, name: str) -> dict[int, float]:
        """Return step → loss of a run."""
        lines = (self._folder / "runs" / name / "logs" / "metrics.jsonl").read_text().splitlines()
        return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def write_tiny_set(folder: Path) -> list[str]:
    """Write the tiny SDXL and the demo set unless they are there, and return the settings that refer to them."""
    file = folder / "settings.json"
    if not file.exists():
        words = make_tiny_set(folder, NUM_IMAGES)
        file.write_text(json.dumps(["--cfg", str(ROOT / "configs" / "tiny.yaml"), *words]))
    return list_settings(folder)


def list_settings(folder: Path) -> list[str]:
    """Return the settings that `write_tiny_set` has written."""
    return json.loads((folder / "settings.json").read_text())


def run_programs(programs: Sequence[Program], folder: Path) -> dict[str, str]:
    """Run programs at the same time and return {"programs": their exit statuses}.

    Raises:
        RuntimeError: a program failed. The message ends with its output.
    """
    threads = max(1, (os.cpu_count() or 1) // len(programs))
    running = [start_program(program, folder / f"{program.name}.log", threads) for program in programs]
    for program, process in zip(programs, running, strict=True):
        if process.wait():
            output = (folder / f"{program.name}.log").read_text()[-END_OF_OUTPUT:]
            raise RuntimeError(f"{program.name} ended with status {process.returncode}: {output}")
    return {"programs": ", ".join(program.name for program in programs)}


def start_program(program: Program, log: Path, threads: int) -> "subprocess.Popen[bytes]":
    """Start a program without a launcher; a single process is a group of its own.

    Args:
        threads: of PyTorch on the CPU. More threads than cores wait for each other.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if program.on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(ROOT / program.script), *program.words]
    with open(log, "wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def compare_latents(first: Path, second: Path) -> float:
    """Return the largest difference of two files' latents."""
    with np.load(first) as one, np.load(second) as other:
        return float(np.abs(one["latents"].astype(np.float64) - other["latents"]).max())


def find_different_weights(base: Path, exported: Path) -> Iterator[str]:
    """Yield the name of each frozen weight of an exported file that differs from the base model's."""
    from sdxl_trainer.cache.models.components import read_component
    from sdxl_trainer.cache.models.source import ModelSource

    for component in ("vae", "text_encoder", "text_encoder_2"):
        expected = dict(read_component(ModelSource(base), component))
        found = dict(read_component(ModelSource(base, exported), component))
        for name, weight in expected.items():
            if name not in found or not torch.equal(found[name], weight):
                yield f"{component}.{name}"
