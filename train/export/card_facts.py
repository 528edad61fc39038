"""The facts of a model card, read from the model file and from the folder of its run."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sdxl_trainer.cache.models.single_file_check import NotSafetensorsError, read_safetensors_header
from sdxl_trainer.cache.models.source import HUB_ID
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.checkpoint.model_argument import DeclaredPrediction, read_declared_prediction
from sdxl_trainer.train.export.about import PREFIX, describe_about, read_about, read_file_metadata
from sdxl_trainer.train.export.model_run import METRICS, ModelRun
from sdxl_trainer.train.held_out.history import read_histories
from sdxl_trainer.train.held_out.sample_errors import list_files
from sdxl_trainer.train.report.charts import DOTS_PER_INCH, RunNumbers, draw_charts, read_series
from sdxl_trainer.train.report.page import list_facts, read_counts
from sdxl_trainer.train.report.validation_charts import draw_validation_charts
from sdxl_trainer.train.sampling.image_grid import read_prompt, select_step_folders

MAX_IMAGES = 8
CHARTS = ("loss", "loss_by_timestep", "x0_error", "best_step", "lr")
FACTS = ("loss, moving average", "validation loss", "speed, median")  # of the report


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a card is made of."""

    name: str  # of the model's file or folder
    is_adapter: bool
    is_folder: bool  # in diffusers layout
    about: Mapping[str, str]  # by modelspec's keys
    prediction: DeclaredPrediction | None
    resolution: str
    base_model: str | None = None
    config: Config | None = None  # of the run
    run: ModelRun | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)  # of the training set
    facts: Mapping[str, str] = field(default_factory=dict)  # of the run's report
    images: Mapping[str, str] = field(default_factory=dict)  # file within the card's folder → prompt
    charts: Mapping[str, str] = field(default_factory=dict)  # file within the card's folder → title


def collect_facts(model: Path, run: ModelRun | None, config: Config | None, folder: Path) -> CardFacts:
    """Read what a card says about a model; copy generated images and draw charts into `folder`."""
    metadata = read_file_metadata(model)
    about = describe_about(config.about) if config and not metadata else read_about(model)
    shared: dict[str, Any] = {}
    if run is not None:
        numbers = read_run_numbers(run.folder)
        shown = list_facts(numbers)
        shared = {
            "images": copy_images(run, folder),
            "charts": write_charts(run, numbers, folder),
            "counts": numbers.counts,
            "facts": {name: shown[name] for name in FACTS if name in shown},
        }
    size = "x".join(map(str, config.data.largest_size)) if config else ""
    return CardFacts(
        name=model.name,
        is_adapter=is_adapter_file(model),
        is_folder=model.is_dir(),
        about={"title": config.run.name if config else model.stem, **about},
        prediction=read_declared_prediction(model),
        resolution=metadata.get(f"{PREFIX}resolution", size),
        base_model=find_base_model(config) if config else None,
        config=config if run else None,
        run=run,
        **shared,
    )


def is_adapter_file(model: Path) -> bool:
    """Return whether a model file holds adapters, by its metadata or by the names of its tensors."""
    if model.is_dir():
        return False
    try:
        header = read_safetensors_header(model)
    except (NotSafetensorsError, OSError, ValueError):
        return False
    declared = header.metadata.get(f"{PREFIX}architecture", "")
    return "/lora" in declared or any(name.startswith("lora_") for name in header.shapes)


def find_base_model(config: Config) -> str | None:
    """Return the hub id of the model that training started from, if it is known and not a path here."""
    if config.about.base_model:
        return config.about.base_model
    path = config.model.path
    return path if HUB_ID.fullmatch(path) and not Path(path).exists() and "." not in Path(path).suffix else None


def read_run_numbers(folder: Path) -> RunNumbers:
    """Read the numbers of a run that its charts show."""
    return RunNumbers(
        series=read_series(folder / METRICS),
        counts=read_counts(folder / "report" / "data.json"),
        changes={},
        noise_levels=None,
    )


def copy_images(run: ModelRun, folder: Path) -> dict[str, str]:
    """Copy the images that the run generated at the model's step, or last before it; return them with their prompts."""
    steps = [
        path
        for path in select_step_folders(run.folder / "samples", 1 << 30)
        if run.step is None or int(path.name.removeprefix("step-")) <= run.step
    ]
    images: dict[str, str] = {}
    for file in sorted(steps[-1].glob("*.png"))[:MAX_IMAGES] if steps else ():
        try:
            with Image.open(file) as image:
                prompt = read_prompt(image)
        except OSError:
            continue
        name = f"images/{file.name}"
        shutil.copyfile(file, folder / name)
        images[name] = prompt
    return images


def write_charts(run: ModelRun, numbers: RunNumbers, folder: Path) -> dict[str, str]:
    """Draw the charts of a run that concern those who use its model; return them with their titles."""
    histories = read_histories(list_files(run.folder)).by_average
    drawn = [*draw_charts(numbers), *draw_validation_charts(histories, numbers.get("validation/over_fitting"), {})]
    charts: dict[str, str] = {}
    for chart in drawn:
        if chart.name in CHARTS:
            name = f"images/{chart.name}.png"
            # White, because dark text on a transparent chart is lost on the hub's dark pages.
            chart.figure.savefig(folder / name, dpi=DOTS_PER_INCH, facecolor="white")
            charts[name] = chart.title
    return charts
