"""Images of the live model, drawn while it is trained."""

from pathlib import Path

from loguru import logger

from sdxl_trainer.cache.models.encoders import load_vae
from sdxl_trainer.train.run.run import Run
from sdxl_trainer.train.sampling.image_grid import build_image_grid, build_progress_strip, write_image
from sdxl_trainer.train.sampling.pipeline import ImageGenerator, generate_images
from sdxl_trainer.train.sampling.prompts import load_prompts


def draw_samples(run: Run) -> Path:
    """Draw all prompts with the live model, or its first moving average if the settings say so: each image, the grid
    of the step, and the strip over all steps.

    All ranks call it together. Returns the grid's path.
    """
    folder, engine = run.folder / "samples", run.engine
    prompts, _ = load_prompts(run.config.sample, run.config.objective)
    vae = load_vae(run.source, run.config.model).to(run.ranks.device)
    generator = ImageGenerator(
        engine.model.unet, vae, run.conditioner, run.tokenizers, run.source, run.config, engine.dtype
    )
    average = next(iter(engine.weights.average_names), None) if run.config.ema.sample else None
    engine.model.eval()
    with engine.weights.use_average(average):
        images = generate_images(generator, prompts, run.ranks, in_step=engine.zero_stage == 3)
    engine.model.train()
    run.conditioner.release()
    name = f"step-{run.state.step:08d}"
    if run.ranks.is_main:
        for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            write_image(folder / name / f"{number:03d}.png", image, prompt.describe())
        write_image(folder / f"{name}.png", build_image_grid(images))
        strip = build_progress_strip(folder)
        if strip is not None:
            write_image(folder / "strip.png", strip)
        logger.info("samples {}", folder / f"{name}.png")
    return folder / f"{name}.png"
