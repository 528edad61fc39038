"""The report of a run as one page: `python -m sdxl_trainer.train.report RUN_FOLDER`.

`report/report.html` embeds all its images and loads nothing else. It shows the metrics in `logs/metrics.jsonl`, the
errors in `logs/validation`, the counts in `report/data.json`, the noise levels in `report/noise_levels.json`, the state
in `logs/status.json`, the settings in `config.yaml` and the generated images in `samples/`. A run starts this program
as a separate process (train/report/report_process.py), so training neither waits for it nor fails with it. Imports no
torch.
"""

import base64
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import numpy as np
import orjson
from PIL import Image

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.language.pages import fill_text
from sdxl_trainer.configs.language.translate import (
    CATALOGUES,
    choose_language,
    get_language,
    join_label,
    translate,
    translate_label,
)
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.configs.problems import format_rate
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.train.held_out.history import read_histories
from sdxl_trainer.train.held_out.sample_errors import list_files
from sdxl_trainer.train.report.charts import (
    DOTS_PER_INCH,
    SIZE_INCHES,
    Chart,
    RunNumbers,
    draw_charts,
    read_series,
    set_fonts,
    smooth,
    translate_chart,
    translate_figure,
)
from sdxl_trainer.train.report.metrics import CHANGES_FILE, read_changes
from sdxl_trainer.train.report.noise_levels import read_noise_levels
from sdxl_trainer.train.report.run_state import read_holder, resolve_state
from sdxl_trainer.train.report.run_status import FINISHED, RUNNING, STATUS_FILE, read_status
from sdxl_trainer.train.report.settings import read_settings
from sdxl_trainer.train.report.validation_charts import draw_validation_charts
from sdxl_trainer.train.sampling.image_grid import read_prompt, select_step_folders

PAGE = Path(__file__).with_name("page.html")
NICENESS = 10  # of a report written during training, so that the loader's workers have priority
THUMBNAIL_PX = 160  # longer side of a generated image on the page
WEBP_QUALITY = 75
MAX_PROMPTS, MAX_STEPS = 8, 10  # rows and columns of generated images on the page


@dataclass(frozen=True)
class EmbeddedImage:
    """An image within the page: its content as a URI, its size in pixels, and a description."""

    uri: str
    width: int
    height: int
    text: str


@dataclass(frozen=True)
class Strip:
    """The images generated from a prompt, one for each step; None for a step without one."""

    prompt: str
    images: list[EmbeddedImage | None]


def write_report(folder: Path) -> Path:
    """Write a run's report into its folder: `report/report.html`, and each chart as a PNG beside it.

    Raises:
        OSError: a file cannot be read or written.
    """
    target = folder / "report"
    target.mkdir(parents=True, exist_ok=True)
    logs = folder / "logs"
    numbers = RunNumbers(
        series=read_series(logs / "metrics.jsonl"),
        counts=read_counts(target / "data.json"),
        changes=read_changes(logs / CHANGES_FILE),
        noise_levels=read_noise_levels(target),
    )
    histories = read_histories(list_files(folder)).by_average
    of_validations = draw_validation_charts(histories, numbers.get("validation/over_fitting"), numbers.changes)
    charts = [
        (chart, write_chart(chart, target / f"{chart.name}.png"))
        for chart in map(translate_chart, [*draw_charts(numbers), *of_validations])
    ]
    steps, strips = read_strips(folder / "samples")
    page = load_template().render(
        t=fill_text,
        language=get_language(),
        name=folder.resolve().name,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        state=translate_state(describe_state(folder, numbers)),
        facts={translate_label(name): translate(value) for name, value in list_facts(numbers).items()},
        settings=read_settings(folder / "config.yaml"),
        charts=charts,
        headings=[fill_text("step {step}", step=step) for step in steps],
        strips=strips,
    )
    write_atomic(target / "report.html", page)
    return target / "report.html"


def describe_state(folder: Path, numbers: RunNumbers) -> str:
    """Return the state of the run in words, such as `stopped: stopped by SIGTERM`."""
    status, steps = read_status(folder / "logs" / STATUS_FILE), numbers.get("loss").steps
    last_step = int(steps[-1]) if len(steps) else 0
    if status is not None and status.state == RUNNING and last_step >= status.max_steps:
        return FINISHED  # the run writes this page last
    silent = time.time() - (folder / "logs" / ("metrics.jsonl" if status is None else STATUS_FILE)).stat().st_mtime
    max_steps = read_settings(folder / "config.yaml").get("train.max_steps", "")
    state, text = resolve_state(
        status, read_holder(folder), silent, last_step, int(max_steps) if max_steps.isdecimal() else 0
    )
    return text if text.startswith(state) else f"{state}: {text}" if text else state


def translate_state(text: str) -> str:
    """Return a state in words, in the language of this process."""
    state, separator, reason = text.partition(": ")
    return join_label(translate_label(state), translate(reason)) if separator else translate_label(state)


def load_template(file: Path = PAGE) -> jinja2.Template:
    """Load a page's template, which escapes every value and may use the pieces and the style of the report."""
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    loader = jinja2.FileSystemLoader([file.parent, PAGE.parent])
    return jinja2.Environment(loader=loader, **options).get_template(file.name)


def read_counts(file: Path) -> dict:
    """Read the counts of the training set that the run stored; an empty dict if the file is missing or damaged."""
    if not file.is_file():
        return {}
    try:
        counts = orjson.loads(file.read_bytes())
        buckets = {str(name): int(count) for name, count in counts["buckets"].items()}
        tokens = counts["tokens"]
        classes = {str(name): (int(first), int(second)) for name, (first, second) in tokens["classes"].items()}
        cut = [int(number) for number in tokens["num_cut"]]
        names = ("num_captions", "max_tokens", *(["num_dropped"] if "num_dropped" in tokens else []))
        numbers = {name: int(tokens[name]) for name in names}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"{file} is damaged and left out; the next start of the run writes it anew: {error}"
        sys.stderr.write(f"{translate(message)}\n")
        return {}
    return {"buckets": buckets, "tokens": {**numbers, "classes": classes, "num_cut": cut}}


def list_facts(numbers: RunNumbers) -> dict[str, str]:
    """List the figures at the top of the page, name → value, for the metrics that the run has."""
    loss, validation = numbers.get("loss"), numbers.get("validation/loss")
    facts = {"steps": f"{loss.steps[-1]:,}"} if len(loss.steps) else {}
    if len(loss.finite.values):
        facts["loss, moving average"] = f"{smooth(loss.finite.values)[-1]:.4f}"
    if len(validation.finite.values):
        facts["validation loss"] = f"{validation.last:.4f}"
    if len(values := numbers.get("samples_per_second").finite.values):
        facts["speed, median"] = format_rate(float(np.median(values)))
    if len(values := numbers.get("data_wait_share").finite.values):
        facts["data wait, median"] = f"{np.median(values):.1%}"
    counts = {"epoch": "epoch", "num_bad": "bad samples", "num_non_finite": "non-finite updates"}
    for name, title in counts.items():
        if len(numbers.get(name).finite.values):
            facts[title] = f"{numbers.get(name).last:,.0f}"
    return facts


def write_chart(chart: Chart, file: Path) -> EmbeddedImage:
    """Write a chart as a PNG with a transparent background, and return it for embedding."""
    buffer = io.BytesIO()
    translate_figure(chart.figure)
    set_fonts(chart.figure)
    chart.figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, transparent=True)
    write_atomic(file, buffer.getvalue())
    width, height = (round(side * DOTS_PER_INCH) for side in SIZE_INCHES)
    return EmbeddedImage(make_uri(buffer.getvalue(), "png"), width, height, f"{chart.title}: {chart.text}")


def read_strips(folder: Path) -> tuple[list[int], list[Strip]]:
    """Return the steps that have generated images, and a strip of images for each prompt."""
    folders = select_step_folders(folder, MAX_STEPS)
    steps = [int(path.name.removeprefix("step-")) for path in folders]
    file_names = sorted({file.name for path in folders for file in path.glob("*.png")})[:MAX_PROMPTS]
    strips = []
    for file_name in file_names:
        results = [read_generated_image(path / file_name, step) for path, step in zip(folders, steps, strict=True)]
        prompt = next((prompt for _, prompt in reversed(results) if prompt), file_name)
        strips.append(Strip(prompt, [image for image, _ in results]))
    return steps, strips


def read_generated_image(file: Path, step: int) -> tuple[EmbeddedImage | None, str]:
    """Return a thumbnail of a generated image and its prompt; None and "" if the file is missing or cannot be read."""
    try:
        with Image.open(file) as image:
            prompt = read_prompt(image)
            image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=WEBP_QUALITY, method=2)
    except OSError:
        return None, ""
    uri, (width, height) = make_uri(buffer.getvalue(), "webp"), image.size
    return EmbeddedImage(
        uri, width, height, join_label(fill_text("step {step}", step=step), prompt or file.name)
    ), prompt


def make_uri(content: bytes, kind: str) -> str:
    """Return a data URI of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of a run, finished or not, and return the exit status (0 done, 1 failed, 2 wrong input)."""
    parser = TranslatedParser(
        prog="python -m sdxl_trainer.train.report",
        description="Write the report of a run, finished or not: report/report.html in its folder, one page with "
        "charts, settings and generated images. A run does so by itself while it trains.",
        examples=["%(prog)s runs/my"],
    )
    parser.add_argument("folder", type=parse_path, metavar="RUN_FOLDER", help="a run's folder, such as runs/quickstart")
    parser.add_argument("--background", action="store_true", help="run at low priority")
    options = parser.parse_args(arguments)
    folder = options.folder
    if not (folder / "logs" / "metrics.jsonl").is_file():
        parser.error(f"{folder} is not a run folder: it contains no logs/metrics.jsonl")
    if options.background:
        os.nice(NICENESS)
    language = read_settings(folder / "config.yaml").get("log.language", "")
    choose_language(language if language in ("en", *CATALOGUES) else None)
    started = time.monotonic()
    try:
        file = write_report(folder)
    except OSError as error:
        sys.stderr.write(f"{translate(f'the report cannot be written: {error}')}\n")
        return 1
    sys.stdout.write(f"{file} ({file.stat().st_size / 1e6:.2f} MB, {time.monotonic() - started:.1f} s)\n")
    return 0
