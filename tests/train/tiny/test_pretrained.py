"""The pre-trained tiny SDXL, and the quick start that fine-tunes it on shapes it has never seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT, run_program
from safetensors import safe_open

from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.images.demo_set import (
    COLOURS,
    NEW_SHAPES,
    SHAPES,
    demo_caption,
    draw_demo_set,
    nearest_colour,
    nearest_shape,
)
from sdxl_trainer.train.checkpoint.model_argument import read_declared_prediction
from sdxl_trainer.train.sampling.job import load_image_generator
from sdxl_trainer.train.sampling.prompts import load_prompts
from sdxl_trainer.train.tiny.build import PRETRAINED_WEIGHTS, build_pretrained_sdxl

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
KNOWN_PROMPTS = ["a red circle on a white background", "a blue star on a white background"]
GROUNDS = ("white", "black")


class NamedShare(NamedTuple):
    """Share of images whose nearest shape, or colour, is the one that the prompt names."""

    shape: float
    colour: float


def compute_named_share(images: Sequence[np.ndarray], prompts: Sequence[str]) -> NamedShare:
    words = [prompt.split() for prompt in prompts]
    shapes = [nearest_shape(image) == word[2] for image, word in zip(images, words, strict=True)]
    colours = [nearest_colour(image) == word[1] for image, word in zip(images, words, strict=True)]
    return NamedShare(sum(shapes) / len(shapes), sum(colours) / len(colours))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pretrained_sdxl(tmp_path_factory.mktemp("pretrained"))


def test_the_weights_are_small_and_the_model_declares_the_prediction_of_the_quick_start(pretrained: Path) -> None:
    assert PRETRAINED_WEIGHTS.stat().st_size <= 7_500_000
    with safe_open(PRETRAINED_WEIGHTS, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    config, problems = load_config(QUICKSTART, [f"model.path={pretrained}"])
    assert problems == [] and resolve_model(config.model).folder == pretrained
    declared = read_declared_prediction(pretrained)
    assert (declared.prediction, declared.zero_terminal_snr) == ("v", True)
    assert (config.objective.prediction, config.objective.zero_terminal_snr) == ("v", True)
    named = {prompt.split()[2] for prompt in config.sample.prompts}
    assert {*NEW_SHAPES} < named <= {*SHAPES, *NEW_SHAPES}


def test_the_pretrained_model_draws_the_shape_and_colour_of_a_prompt(pretrained: Path) -> None:
    config, _ = load_config(QUICKSTART, [f"model.path={pretrained}", "sample.num_inference_steps=12"])
    config = config.model_copy(update={"sample": config.sample.model_copy(update={"prompts": KNOWN_PROMPTS})})
    generator = load_image_generator(config, None, torch.device("cpu"))
    prompts, _ = load_prompts(config.sample, config.objective)
    images = [np.asarray(generator.generate(prompt)) for prompt in prompts]
    assert compute_named_share(images, KNOWN_PROMPTS) == (1.0, 1.0)


@pytest.mark.long
def test_the_quick_start_teaches_the_new_shapes(pretrained: Path, tmp_path: Path) -> None:
    metadata = draw_demo_set(tmp_path / "data", num_images=144, shapes=(*NEW_SHAPES, *SHAPES))
    new = [demo_caption(colour, shape, ground) for shape in NEW_SHAPES for colour in COLOURS for ground in GROUNDS]
    prompts = [*new, *(demo_caption(colour, shape, "white") for shape in SHAPES for colour in ("red", "blue"))]
    words = [
        *("--cfg", QUICKSTART, f"model.path={pretrained}", f"data.metadata=[{metadata}]"),
        *(f"cache.dir={tmp_path / 'latents'}", f"run.dir={tmp_path / 'runs'}", f"sample.prompts={prompts}"),
        "sample.every_steps=0",
    ]
    run_program("cache/main.py", *words, ranks=2)
    run_program("train/main.py", *words, ranks=2)
    samples = tmp_path / "runs" / "quickstart" / "samples"
    assert (samples / "before-after.png").is_file()
    shares = []
    for step in sorted(path for path in samples.glob("step-*") if path.is_dir()):
        images = [np.asarray(Image.open(step / f"{number:03d}.png")) for number in range(len(prompts))]
        old_images = images[len(new) :]
        shares.append(
            (compute_named_share(images[: len(new)], new), compute_named_share(old_images, prompts[len(new) :]))
        )
    (before, old_before), (after, old_after) = shares
    assert before.shape <= 0.1 and old_before.shape >= 0.9
    assert after.shape >= 0.9 and after.colour >= 0.9 and old_after.shape >= 0.9
