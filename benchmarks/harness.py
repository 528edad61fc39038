"""Shared parts of all benchmarks: arguments, starting the real programs, and the JSON line at the end."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS_VARIABLE = "BENCHMARK_SETTINGS"  # set for a benchmark that starts itself on ranks
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figure:
    """A measured number and its target.

    Args:
        sign: ">=" or "<=", how the value must compare with the target.
        target: None for a figure that is only reported.
    """

    value: float
    sign: str = ">="
    target: float | None = None

    @property
    def met(self) -> bool:
        """Return whether the figure meets its target; True without one."""
        if self.target is None:
            return True
        return self.value >= self.target if self.sign == ">=" else self.value <= self.target


@dataclass(frozen=True)
class Skipped:
    """A measurement that this machine cannot make."""

    reason: str


Results = Mapping[str, Figure | Skipped]  # by name


def parse_arguments(description: str, **choices: Sequence[str]) -> argparse.Namespace:
    """Parse `--quick` (ends within a minute, figures are rough), `--work DIR` (folder for input and output) and more.

    Args:
        choices: further options: name → allowed values, the default first.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="end within a minute; the figures are rough")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep input and output here (a temporary folder)")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    return parser.parse_args()


def run_script(script: str, *words: object, ranks: int) -> None:
    """Run launch/cache.sh or launch/train.sh on a number of ranks, with one thread each.

    Raises:
        subprocess.CalledProcessError: the program failed.
    """
    environment = {**os.environ, "NPROC": str(ranks), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "launch" / script), *(str(word) for word in words)]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def make_tiny_set(work: Path, num_images: int = 96) -> list[str]:
    """Write the tiny SDXL and the demo set, and return the settings that refer to them."""
    from sdxl_trainer.data.images.demo_set import draw_demo_set
    from sdxl_trainer.train.tiny.build import build_tiny_sdxl

    model, metadata = build_tiny_sdxl(work / "model"), draw_demo_set(work / "data", num_images)
    words = [f"model.path={model}", f"data.metadata=[{metadata}]", f"cache.dir={work / 'latents'}"]
    return [*words, f"run.dir={work / 'runs'}", "sample.prompts=[]", "log.level=WARNING"]


def limit_ranks(most: int) -> int:
    """Return the number of ranks that can be started here, at most `most`: with GPUs, each rank needs its own."""
    import torch

    return min(most, torch.cuda.device_count() or most)


def run_on_ranks(
    name: str,
    description: str,
    compare: Callable[[Path, bool], Results],
    measure: Callable[[dict[str, Any]], int],
) -> int:
    """Run a benchmark that starts itself on ranks, and return its exit status.

    Args:
        compare: function of a folder for input and output and of `--quick`. It collects figures by `measure_on_ranks`,
            and names what it skips.
        measure: function that runs on each rank, with the settings passed to `measure_on_ranks`. Rank 0 prints the
            measurements as a line of JSON.
    """
    if SETTINGS_VARIABLE in os.environ:
        return measure(json.loads(os.environ[SETTINGS_VARIABLE]))
    options = parse_arguments(description)
    with tempfile.TemporaryDirectory() as temporary:
        figures = compare(options.work or Path(temporary), options.quick)
    return print_result(name, figures)


def measure_on_ranks(script: str, settings: Mapping[str, Any], ranks: int) -> dict[str, float]:
    """Start a benchmark's program on a number of ranks, and return the JSON object in its last line.

    Raises:
        subprocess.CalledProcessError: the program failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
    environment = {**os.environ, SETTINGS_VARIABLE: json.dumps(settings)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_result(name: str, results: Results) -> int:
    """Print the result as one JSON line and return the exit status: 0 if every target is met, else 1."""
    figures = {key: result for key, result in results.items() if isinstance(result, Figure)}
    shown = {
        key: {
            "value": round(figure.value, 5),
            "target": None if figure.target is None else f"{figure.sign} {figure.target:g}",
            "met": figure.met,
        }
        for key, figure in figures.items()
    }
    document: dict[str, Any] = {"benchmark": name, "figures": shown, "machine": describe_machine()}
    if skipped := {key: result.reason for key, result in results.items() if isinstance(result, Skipped)}:
        document["skipped"] = skipped
    print(json.dumps(document))
    return 0 if all(figure.met for figure in figures.values()) else 1


def describe_machine() -> dict[str, str | int]:
    """Return processor, cores, GPU and versions."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": _read_cpu_name(),
        "cores": os.cpu_count() or 0,
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _read_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
