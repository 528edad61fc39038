"""Training as a whole: the tiny SDXL starts from random U-Net weights and learns the colour that a prompt names.

The benchmark runs the real programs (cache on two ranks, training on two ranks under ZeRO-2) on the demo set, with the
settings of configs/tiny.yaml and more steps. It generates 4 images for each of 6 colours and counts the images whose
nearest colour of the six is the named one. The same share is measured for the untrained model. It takes about 8 minutes
on two cores. `--prediction v` and `--prediction flow` train the other prediction types. `--engine release` trains with
gradient release and weights in bf16 that are rounded at random, `--engine adafactor` so with Adafactor. `--channels 16`
adapts the U-Net of 4 channels to the tiny VAE of 16 (train/tiny/wide_vae.py).
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, Figure, parse_arguments, print_result, run_script
from PIL import Image

from sdxl_trainer.data.images.demo_set import COLOURS, demo_caption, draw_demo_set, nearest_colour
from sdxl_trainer.train.tiny.build import TRAINED_CHANNELS, build_tiny_sdxl, load_wide_vae

STEPS, QUICK_STEPS = 900, 40
SCENES = (("circle", "white"), ("square", "black"), ("triangle", "grey"), ("star", "white"))
TARGET = 0.8
DEFAULTS = ("epsilon", "zero", str(TRAINED_CHANNELS))
# Changes to configs/tiny.yaml, whose weighting is for epsilon prediction.
OBJECTIVES = {
    "epsilon": [],
    "v": ["objective.prediction=v", "objective.weighting=none"],
    "flow": ["objective.prediction=flow", "objective.weighting=none"],
}
RELEASE = ["engine.gradient_release=true", "engine.precision=bf16_stochastic", "optim.clipping=parameter"]
ENGINES = {
    "zero": [],
    "release": RELEASE,
    "adafactor": [*RELEASE, "optim.name=adafactor", "optim.betas=null"],
}


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = parse_arguments(
        __doc__ or "", prediction=list(OBJECTIVES), engine=list(ENGINES), channels=["4", "16", "32"]
    )
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        started = time.monotonic()
        metadata = draw_demo_set(work / "data")
        model = build_tiny_sdxl(work / "model")
        prompts = [(colour, demo_caption(colour, *scene)) for colour in COLOURS for scene in SCENES]
        words = [
            *("--cfg", ROOT / "configs" / "tiny.yaml", f"model.path={model}", f"data.metadata=[{metadata}]"),
            *(f"cache.dir={work / 'latents'}", f"run.dir={work / 'runs'}", "checkpoint.every_steps=0"),
            *(f"train.max_steps={QUICK_STEPS if options.quick else STEPS}", "log.every_steps=50"),
            f"sample.prompts={[prompt for _, prompt in prompts]}",
            *OBJECTIVES[options.prediction],
            *ENGINES[options.engine],
            *adapt_channels(work, int(options.channels)),
        ]
        run_script("cache.sh", *words, ranks=2)
        run_script("train.sh", *words, ranks=2)
        folder = next(path for path in (work / "runs" / "tiny" / "samples").iterdir() if path.is_dir())
        trained = [np.asarray(Image.open(image)) for image in sorted(folder.glob("*.png"))]
        figures = {
            "share_of_named_colour_nearest": Figure(compute_share(trained, prompts), ">=", TARGET),
            "minutes": Figure((time.monotonic() - started) / 60, "<=", 10),
            "untrained_share": Figure(compute_share(generate_untrained(model, prompts), prompts)),
        }
    changed = [name for name in (options.prediction, options.engine, options.channels) if name not in DEFAULTS]
    return print_result("-".join(["learns", *changed]), figures)


def adapt_channels(work: Path, channels: int) -> list[str]:
    """Write the tiny VAE of so many channels, and return the settings with which the U-Net is adapted to it."""
    if channels == TRAINED_CHANNELS:
        return []
    load_wide_vae(channels).save_pretrained(work / "vae")
    return [f"model.vae={work / 'vae'}", "model.adapt_channels=true"]


def generate_untrained(model: Path, prompts: list[tuple[str, str]]) -> list[np.ndarray]:
    """Generate images with the untrained model, by diffusers' pipeline and the settings of the trained samples."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return [
        np.asarray(
            pipeline(
                prompt,
                width=128,
                height=128,
                num_inference_steps=25,
                guidance_scale=4.0,
                generator=torch.Generator().manual_seed(number),
            ).images[0]
        )
        for number, (_, prompt) in enumerate(prompts)
    ]


def compute_share(images: list[np.ndarray], prompts: list[tuple[str, str]]) -> float:
    """Return the share of images whose nearest colour is the one that the prompt names."""
    assert len(images) == len(prompts), f"{len(images)} images for {len(prompts)} prompts"
    right = [nearest_colour(image) == colour for image, (colour, _) in zip(images, prompts, strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    sys.exit(main())
