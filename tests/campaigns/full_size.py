"""Trains an SDXL of full size on the CPU, from a single file to a result that diffusers loads.

    python tests/campaigns/full_size.py [--whole] [--tiny] [--work DIR]

The model is random and written to disk as a stream (6.9 GB in fp16). Six images of 256 px are cached with the full VAE.
LoRA trains in fp32 with gradient checkpointing for 2 steps, saves, resumes for one more, and exports. Then
`train/convert.py` makes the same file of the checkpoint, and diffusers computes with it. `--whole` trains all weights
of the U-Net instead, in bf16 with gradient release and Adafactor. Prints a table of seconds and peak memory of each
phase, then a line of JSON; exits with status 1 if something is wrong. It needs 24 GB of memory and 10 GB of disk, 35 GB
with `--whole`. `--tiny` takes a model of a few million weights.

Memory is that of this process and all its descendants. `peak` is their resident set, which includes the mapped pages of
the model file; `own` leaves out pages of files, which the system may drop at any time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 24 * 1024**3
# Training all weights: their own 5.1 GB, as much for the copy that is saved, and the process.
WHOLE_LIMIT_BYTES = 12e9
WHOLE = {
    "cache": {"text": True},
    "lora": {"rank": 0},
    "optim": {"name": "adafactor", "lr": 1.0e-4, "clipping": "parameter", "kwargs": {"factor_convolutions": True}},
    "engine": {"precision": "bf16_stochastic", "gradient_release": True},
    "checkpoint": {"export_dtype": "bf16"},
}
POOL = (1 << 24) - 3  # random values that all weights are cut from; no multiple of their widths
PROMPT = "a red circle on a white background"
Launch = Callable[[str, list[str]], object]


class Memory(NamedTuple):
    """Bytes of memory of a process and its descendants."""

    resident: int
    own: int  # without pages of files


class Phase(NamedTuple):
    """Cost of one phase."""

    name: str
    seconds: float
    peak: Memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="train all weights of the U-Net with gradient release")
    parser.add_argument("--tiny", action="store_true", help="a model of a few million weights")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep input and output here, and use a model that is there"
    )
    parser.add_argument("--compute", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compute:
        compute_with_diffusers(options.work, options.compute)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        report = run_campaign(options.work or Path(temporary), options.tiny, launch, options.whole)
    print_table(report)
    print(json.dumps(report))
    return int(bool(report["wrong"]))


def launch(program: str, words: list[str]) -> None:
    """Run a program of the checkout with two threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, str(ROOT / program), *words], check=True, env=environment, stdout=sys.stderr)


def run_campaign(folder: Path, tiny: bool, launch: Launch, whole: bool = False) -> dict[str, Any]:
    """Run every phase in turn, and return their cost and what is wrong.

    Args:
        launch: runs a program, given by its path in the checkout, with command line words.
        whole: train all weights of the U-Net.
    """
    phases: list[Phase] = []
    configs = copy_configs(folder / "configs", tiny)
    model, run = folder / "model.safetensors", folder / "runs" / "full-size"
    if not model.exists():
        with measure("model", phases):
            write_random_model(model, configs)
    settings = ["--cfg", str(write_settings(folder, model, configs, whole))]
    with measure("cache", phases):
        launch("cache/main.py", settings)
    with measure("train", phases):
        launch("train/main.py", [*settings, "train.max_steps=2"])
    with measure("resume", phases):
        launch("train/main.py", [*settings, "train.max_steps=3"])
    converted = folder / "converted.safetensors"
    with measure("convert", phases):
        launch("train/convert.py", [str(run), str(converted), "--dtype", "bf16" if whole else "fp32"])
    with measure("diffusers", phases):
        launch("tests/campaigns/full_size.py", ["--work", str(folder), "--compute", str(converted)])
    report: dict[str, Any] = {
        "phases": {
            phase.name: {
                "seconds": round(phase.seconds, 1),
                "peak_gb": round(phase.peak.resident / 1e9, 2),
                "own_gb": round(phase.peak.own / 1e9, 2),
            }
            for phase in phases
        },
        "model_bytes": model.stat().st_size,
        "checkpoint_bytes": sum(path.stat().st_size for path in (run / "checkpoints" / "step-00000003").rglob("*.*")),
        "trained_bytes": converted.stat().st_size,
        "losses": [json.loads(line)["loss"] for line in open(run / "logs" / "metrics.jsonl") if '"loss"' in line],
    }
    find = find_wrong_in_whole if whole else find_wrong
    return {**report, "wrong": [*find_wrong_losses(report), *find(report, run, converted)]}


def find_wrong_losses(report: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the losses of a campaign."""
    losses = report["losses"]
    if len(losses) != 3 or not all(0 < loss < 100 for loss in losses):
        yield f"the losses of three steps are {losses}"


def find_wrong_in_whole(report: dict[str, Any], run: Path, converted: Path) -> Iterator[str]:
    """Yield what is wrong with the files of a campaign that trained all weights."""
    from safetensors import safe_open

    exported, model = run / "models" / "step-00000003.safetensors", run.parent.parent / "model.safetensors"
    with safe_open(exported, "pt") as ours, safe_open(converted, "pt") as again, safe_open(model, "pt") as base:
        names = sorted(ours.keys())
        if names != sorted(again.keys()):
            yield "the checkpoint does not give the names that training wrote"
            return
        changed = 0
        for name in names:
            tensor = ours.get_tensor(name)
            if not tensor.equal(again.get_tensor(name)):
                yield f"the checkpoint does not give the {name} that training wrote"
            if name.startswith("model.diffusion_model.") and name in base.keys():  # noqa: SIM118
                changed += not tensor.equal(base.get_tensor(name).bfloat16())
        if changed < 0.9 * sum(name.startswith("model.diffusion_model.") for name in names):
            yield f"only {changed} tensors have changed"
    if report["checkpoint_bytes"] > 1.1 * report["model_bytes"]:
        yield f"a checkpoint takes {report['checkpoint_bytes']:,} bytes"
    most = max(report["phases"][name]["own_gb"] for name in ("train", "resume"))
    if most * 1e9 > WHOLE_LIMIT_BYTES:
        yield f"the peak of memory in training is {most} GB"


def find_wrong(report: dict[str, Any], run: Path, converted: Path) -> Iterator[str]:
    """Yield what is wrong with the files of a campaign that trained adapters."""
    from safetensors.torch import load_file

    exported, again = load_file(run / "models" / "step-00000003-lora.safetensors"), load_file(converted)
    if exported.keys() != again.keys() or not all(tensor.equal(again[name]) for name, tensor in exported.items()):
        yield "the checkpoint does not give the file that training wrote"
    if not all(tensor.any() for name, tensor in exported.items() if name.endswith("lora_up.weight")):
        yield "some adapters have not changed"
    # Weights, masters if there are any, and two moments, each in fp32.
    if report["checkpoint_bytes"] > 4.5 * report["trained_bytes"]:
        yield f"a checkpoint of {report['trained_bytes']:,} bytes of adapters takes {report['checkpoint_bytes']:,}"
    most = max(phase["peak_gb"] for phase in report["phases"].values())
    if most * 1e9 > LIMIT_BYTES:
        yield f"the peak of memory is {most} GB"


def copy_configs(folder: Path, tiny: bool) -> Path:
    """Write a folder in diffusers layout without weights: the configs, and the tiny model's vocabulary."""
    shutil.copytree(ROOT / "configs" / ("tiny" if tiny else "sdxl"), folder, dirs_exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(ROOT / "configs" / "tiny" / name, folder / name, dirs_exist_ok=True)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def write_random_model(path: Path, configs: Path) -> None:
    """Write random weights in fp16 as a single file, one tensor at a time."""
    import torch

    from sdxl_trainer.cache.models.single_file import write_single_file
    from sdxl_trainer.cache.models.single_file_names import build_name_table
    from sdxl_trainer.cache.models.source import COMPONENTS

    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
        count = torch.Size(shape).numel()
        start = zlib.crc32(name.encode()) % max(1, POOL - count)
        values = (pool.repeat(-(-count // POOL)) if count > POOL else pool)[start : start + count]
        # Norms keep the states near 1; a gain below 1 keeps residual sums small.
        return (values * (0.5 / torch.Size(shape[1:]).numel() ** 0.5)).half().view(shape)

    settings = {name: json.loads((configs / name / "config.json").read_text()) for name in COMPONENTS}
    components = {
        component: {
            name: lambda name=name, shape=row.source_shape: draw(name, shape)
            for row in build_name_table(component, settings[component])
            for name in row.sources
            if not row.carried
        }
        for component in COMPONENTS
    }
    write_single_file(path, components, settings, dtype=torch.float16, metadata={})


def write_settings(folder: Path, model: Path, configs: Path, whole: bool) -> Path:
    """Draw six images, and write the settings of cache job and training."""
    from sdxl_trainer.data.images.demo_set import draw_demo_set

    settings = {
        "run": {"name": "full-size", "dir": str(folder / "runs")},
        "model": {"path": str(model), "config": str(configs), "tokenizer": str(configs / "tokenizer")},
        "data": {
            "metadata": [str(draw_demo_set(folder / "data", num_images=6))],
            "resolution_px": 256,
            "min_bucket_px": 128,
            "num_workers": 0,
        },
        "cache": {"dir": str(folder / "latents"), "batch_size": 2},
        "lora": {"rank": 16},
        "optim": {"lr": 1.0e-3},
        "engine": {"precision": "fp32", "gradient_checkpointing": True},
        "train": {"global_batch_size": 1, "micro_batch_size": 1},
        "checkpoint": {"export_dtype": "fp32"},
    }
    for section, changes in WHOLE.items() if whole else ():
        settings[section] |= changes
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def compute_with_diffusers(folder: Path, trained: Path) -> None:
    """Load the model, and what was trained, by diffusers, and compare the U-Net's predictions."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    configs = folder / "configs"

    def load(path: Path) -> Any:
        return StableDiffusionXLPipeline.from_single_file(
            str(path), config=str(configs), local_files_only=True, torch_dtype=torch.bfloat16
        )

    pipeline = load(folder / "model.safetensors")

    def predict() -> torch.Tensor:
        words = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent", "guidance_scale": 1.0}
        return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **words).images

    before = predict()
    if is_adapter_file(trained):
        pipeline.load_lora_weights(str(trained))
    else:
        del pipeline
        pipeline = load(trained)
    after = predict()
    assert after.isfinite().all() and not after.equal(before), "diffusers computes the same with what was trained"


def is_adapter_file(path: Path) -> bool:
    """Return whether a file holds adapters, and not a whole model."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return any("lora" in name for name in file.keys())  # noqa: SIM118


@contextmanager
def measure(name: str, phases: list[Phase]) -> Iterator[None]:
    """Measure seconds and peak memory of a phase, and append them to `phases`."""
    peaks, done = [read_memory(os.getpid())], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            found = read_memory(os.getpid())
            peaks[0] = Memory(max(peaks[0].resident, found.resident), max(peaks[0].own, found.own))

    sampler, started = threading.Thread(target=sample), time.monotonic()
    sampler.start()
    try:
        yield
    finally:
        done.set()
        sampler.join()
    phases.append(Phase(name, time.monotonic() - started, peaks[0]))


def read_memory(pid: int) -> Memory:
    """Add up the memory of a process and its descendants."""
    total = Memory(0, 0)
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except OSError:  # it has just ended
        return total
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    own = 1024 * (kilobytes.get("RssAnon", 0) + kilobytes.get("RssShmem", 0))
    total = Memory(1024 * sum(kilobytes.values()), own)
    for child in children:
        found = read_memory(int(child))
        total = Memory(total.resident + found.resident, total.own + found.own)
    return total


def print_table(report: dict[str, Any]) -> None:
    """Print the phases as a Markdown table, then what is wrong."""
    print("| phase | seconds | peak, GB | own, GB |\n|---|---|---|---|")
    for name, phase in report["phases"].items():
        print(f"| {name} | {phase['seconds']} | {phase['peak_gb']} | {phase['own_gb']} |")
    print(*report["wrong"], sep="\n")


if __name__ == "__main__":
    sys.exit(main())
