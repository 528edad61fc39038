"""Pre-training of the tiny SDXL, which wrote configs/tiny/pretrained.safetensors.

    python -m sdxl_trainer.train.tiny.pretraining --work DIR --out configs/tiny

The programs that users start do the work: the cache job and training, with configs/tiny.yaml and the settings below.
The text encoders stay as a seed initialises them. Run the same command again to resume.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import sdxl_trainer.configs
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.data.files import usual_mode
from sdxl_trainer.data.images.demo_set import SIZES_PX, draw_demo_set
from sdxl_trainer.train.tiny.build import PRETRAINED_FILES, PRETRAINED_WEIGHTS, build_tiny_sdxl

ROOT = Path(sdxl_trainer.configs.__file__).resolve().parent.parent
NUM_IMAGES, SEED = 4096, 2_000_000  # the seed is far from any demo set's
# Two of three images are squares, which the quick start generates.
PRETRAINING_SIZES_PX = (*SIZES_PX[:3] * 3, *SIZES_PX[3:])
STEPS = 4000
AVERAGE = 0.999
SETTINGS = {
    "run.name": "pretraining",
    "data.num_workers": 1,
    "objective.prediction": "v",
    "objective.zero_terminal_snr": True,  # the backgrounds are white and black
    "objective.weighting": "none",
    "optim.lr": 1.5e-3,
    "optim.warmup_steps": 100,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 16,
    "ema.decays": [AVERAGE],
    "checkpoint.every_steps": 500,
    "checkpoint.export_dtype": "fp16",
    "checkpoint.export_format": "diffusers",
    "sample.every_steps": 500,
    "sample.guidance_scale": 2.0,
    "log.every_steps": 50,
}


def pretrain(work: Path, steps: int = STEPS) -> Path:
    """Draw the images, cache their latents and train the U-Net in `work`, and return the exported diffusers folder.

    Raises:
        subprocess.CalledProcessError: the cache job or the training failed.
    """
    metadata, model = work / "data" / "metadata.json", work / "model"
    if not metadata.exists():
        draw_demo_set(work / "data", NUM_IMAGES, SEED, sizes_px=PRETRAINING_SIZES_PX)
        build_tiny_sdxl(model)
    paths = {"model.path": str(model), "data.metadata": [str(metadata)], "cache.dir": str(work / "latents")}
    settings = {**SETTINGS, **paths, "run.dir": str(work / "runs"), "train.max_steps": steps}
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    for script in ("cache.sh", "train.sh"):
        command = ["bash", str(ROOT / "launch" / script), "--cfg", str(ROOT / "configs" / "tiny.yaml"), *words]
        subprocess.run(command, check=True, env={**os.environ, "NPROC": "1"})
    return work / "runs" / "pretraining" / "models" / f"step-{steps:08d}-ema-{AVERAGE:g}"


def collect_weights(folder: Path, target: Path) -> None:
    """Write the fp16 weights of the U-Net and the text encoders of a diffusers folder into one file."""
    tensors: dict[str, torch.Tensor] = {}
    for name, file in PRETRAINED_FILES.items():
        tensors |= {f"{name}.{key}": value.half() for key, value in load_file(folder / name / file).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with usual_mode(target):
        save_file(tensors, target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, pre-train the tiny SDXL and write its weights."""
    parser = argparse.ArgumentParser(
        prog="python -m sdxl_trainer.train.tiny.pretraining", description="Pre-train the tiny SDXL on four shapes."
    )
    parser.add_argument("--work", type=parse_path, required=True, metavar="DIR", help="folder for images and the run")
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder for the weights")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"steps of training ({STEPS})")
    options = parser.parse_args(arguments)
    target = options.out / PRETRAINED_WEIGHTS.name
    collect_weights(pretrain(options.work, options.steps), target)
    sys.stdout.write(f"{target.stat().st_size} bytes in {target}\n")


if __name__ == "__main__":
    main()
