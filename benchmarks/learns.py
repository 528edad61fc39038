"""Does training teach? The tiny SDXL learns from random U-Net weights to paint the colour that the prompt names.

Runs the real programs (cache on two ranks, training on two ranks under ZeRO-2) on the demo set with the settings of
configs/tiny.yaml and more steps, draws 4 images for each of 6 colours, and counts in how many the named colour is the
nearest of the six. The untrained model's share is measured the same way. About 8 minutes on two cores.
`--prediction v` or `flow` teaches it to predict that instead of the noise.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, Figure, finish, parse_arguments, start
from PIL import Image

from sdxl_trainer.data.images.demo_set import COLOURS, demo_caption, draw_demo_set, nearest_colour
from sdxl_trainer.train.tiny.build import build_tiny_sdxl

STEPS, QUICK_STEPS = 900, 40
SCENES = (("circle", "white"), ("square", "black"), ("triangle", "grey"), ("star", "white"))
TARGET = 0.8
# What to change in configs/tiny.yaml, whose weighting is for the noise.
OBJECTIVES = {
    "epsilon": [],
    "v": ["objective.prediction=v", "objective.weighting=none"],
    "flow": ["objective.prediction=flow", "objective.weighting=none"],
}


def main() -> int:
    """Run and report."""
    options = parse_arguments(__doc__ or "", prediction=list(OBJECTIVES))
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        started = time.monotonic()
        metadata = draw_demo_set(work / "data")
        model = build_tiny_sdxl(work / "model")
        prompts = [(colour, demo_caption(colour, *scene)) for colour in COLOURS for scene in SCENES]
        words = [
            *("--cfg", ROOT / "configs" / "tiny.yaml", f"model.path={model}", f"data.metadata=[{metadata}]"),
            *(
                f"cache.dir={work / 'latents'}",
                f"run.dir={work / 'runs'}",
                "checkpoint.every_steps=0",
            ),
            *(f"train.max_steps={QUICK_STEPS if options.quick else STEPS}", "log.every_steps=50"),
            f"sample.prompts={[prompt for _, prompt in prompts]}",
            *OBJECTIVES[options.prediction],
        ]
        start("cache.sh", *words, ranks=2)
        start("train.sh", *words, ranks=2)
        folder = next(path for path in (work / "runs" / "tiny" / "samples").iterdir() if path.is_dir())
        trained = [np.asarray(Image.open(image)) for image in sorted(folder.glob("*.png"))]
        figures = {
            "share_of_named_colour_nearest": Figure(compute_share(trained, prompts), ">=", TARGET),
            "minutes": Figure((time.monotonic() - started) / 60, "<=", 10),
            "untrained_share": Figure(compute_share(draw_untrained(model, prompts), prompts)),
        }
    return finish("learns" if options.prediction == "epsilon" else f"learns-{options.prediction}", figures)


def draw_untrained(model: Path, prompts: list[tuple[str, str]]) -> list[np.ndarray]:
    """What the model paints before training, with diffusers' pipeline and the settings of the trained samples."""
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
    """Share of images whose colour is nearest to the one named."""
    assert len(images) == len(prompts), f"{len(images)} images for {len(prompts)} prompts"
    right = [nearest_colour(image) == colour for image, (colour, _) in zip(images, prompts, strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    sys.exit(main())
