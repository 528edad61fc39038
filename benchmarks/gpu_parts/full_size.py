"""A training run of SDXL at full size without files of weights: random weights are made on the device.

`build_run` builds everything else as `train/main.py` does: index, data loader, text encoders, engine, metrics. With
`--tiny` the same code builds the tiny SDXL.
"""

import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import ROOT

from gpu_parts.devices import Place

NUM_IMAGES = 128
TINY_BUCKETS = {"resolution_px": 128, "min_bucket_px": 64, "max_bucket_px": 256, "bucket_step_px": 32}
WEIGHT_SEED = 1


def get_side_px(place: Place) -> int:
    """Return the side of the square images that are trained on."""
    return 128 if place.tiny else 1024


def get_model_folder(place: Place) -> Path:
    """Return the folder of the model's configs."""
    return ROOT / "configs" / ("tiny" if place.tiny else "sdxl")


def build_settings(place: Place, name: str, words: list[str]) -> Any:
    """Build the settings of a run.

    Args:
        words: settings as on the command line.
    """
    from sdxl_trainer.configs.load import build_config
    from sdxl_trainer.configs.problems import raise_if_any
    from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage

    metadata = write_random_latents(place.work / f"latents-{get_side_px(place)}", get_side_px(place))
    settings = {
        "model": {"path": str(get_model_folder(place)), "tokenizer": str(ROOT / "configs" / "tiny" / "tokenizer")},
        "data": {"metadata": [str(metadata)], "num_workers": 0, **(TINY_BUCKETS if place.tiny else {})},
        "run": {"name": name, "dir": str(place.work / "runs")},
        "engine": {"precision": "bf16"},
        "optim": {"lr": 1e-6},
        "train": {"max_steps": 1000},
        "checkpoint": {"every_steps": 0},
        "sample": {"prompts": []},
        "log": {"level": "WARNING"},
    }
    config, problems = build_config(settings, words)
    raise_if_any(problems)
    return resolve_zero_stage(config, 1)[0]


def build_random_run(place: Place, name: str, words: list[str]) -> tuple[Any, Iterator[Any]]:
    """Build a run and its micro batches, with random weights on the device.

    Args:
        words: settings as on the command line.
    """
    from sdxl_trainer.data.checks.training_set import open_training_set
    from sdxl_trainer.launch.distributed import init_ranks
    from sdxl_trainer.launch.logger import init_logger
    from sdxl_trainer.train.run.build import build_run

    init_logger(0, "WARNING")
    config = build_settings(place, name, words)
    index, _ = open_training_set(config)  # its problems are those of a missing model
    assert index is not None, "the random latents have no index"
    ranks = init_ranks()
    with random_weights():
        return build_run(config, index, ranks)


@contextmanager
def random_weights() -> Iterator[None]:
    """Context in which networks of a model folder without files of weights are filled with random values."""

    def leave_masters(*_: Any) -> tuple[()]:
        return ()  # masters then begin as the weights of the networks

    with (
        mock.patch("sdxl_trainer.cache.models.components.copy_weights", fill_randomly),
        mock.patch("sdxl_trainer.train.run.networks.read_trained_weights", leave_masters),
        mock.patch("sdxl_trainer.train.run.networks.hash_component", lambda *_: "random"),
    ):
        yield


@torch.no_grad()
def fill_randomly(module: torch.nn.Module, *_: Any) -> None:
    """Fill a network with normal values that keep the scale of activations; norms begin as the identity."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(WEIGHT_SEED)
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0.0, 1 / math.sqrt(weight[0].numel()), generator=generator)
        else:
            weight.fill_(float(name.endswith("weight")))


def write_random_latents(folder: Path, side_px: int) -> Path:
    """Write latents and their metadata unless they are there, and return the metadata's path."""
    metadata = folder / "metadata.json"
    if metadata.exists():
        return metadata
    folder.mkdir(parents=True, exist_ok=True)
    rng, records, size = np.random.default_rng(0), {}, np.array([side_px, side_px])
    for number in range(NUM_IMAGES):
        path = folder / f"image{number}.npz"
        latents = rng.standard_normal((4, side_px // 8, side_px // 8), np.float32)
        np.savez(path, latents=latents, original_size=size, crop_ltrb=np.array([0, 0, side_px, side_px]))
        records[path.stem] = {"image_path": str(path), "caption": f"a red circle on a white background {number}"}
    metadata.write_text(json.dumps(records))
    return metadata


def get_batch_file(place: Place, micro_batch_size: int) -> Path:
    """Return the file of the micro batch that the real step and the bare loop are both measured with."""
    return place.work / f"batch-{micro_batch_size}.pickle"


def keep_batch(batches: Iterator[Any], file: Path) -> Iterator[Any]:
    """Yield micro batches, and write the first to a file."""
    for number, batch in enumerate(batches):
        if number == 0:
            file.write_bytes(pickle.dumps(batch))
        yield batch


def load_batch(file: Path, device: torch.device) -> Any:
    """Load a micro batch with its tensors on the device."""
    batch = pickle.loads(file.read_bytes())  # written by this benchmark
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, name, value.to(device))
    return batch
