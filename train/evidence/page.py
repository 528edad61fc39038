"""The page of a comparison: verdicts, curves, intervals, samples side by side, and the settings that differ."""

from collections.abc import Sequence
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path

from sdxl_trainer.configs.language.pages import fill_text
from sdxl_trainer.configs.language.translate import get_language, translate, translate_label
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.train.evidence.comparison import ArmComparison, Comparison
from sdxl_trainer.train.evidence.runs import EvidenceRun
from sdxl_trainer.train.evidence.text import (
    EFFECT_HEADINGS,
    EFFECTS_TITLE,
    ERROR_NAMES,
    HEADINGS,
    describe_frame,
    describe_need,
    describe_setting,
    describe_weights,
    format_effect,
    format_row,
    list_tables,
)
from sdxl_trainer.train.report.charts import (
    DOTS_PER_INCH,
    OTHER,
    SIZE_INCHES,
    STRONG,
    Chart,
    build_figure,
    rotate_labels,
    set_fonts,
    translate_chart,
    translate_figure,
)
from sdxl_trainer.train.report.page import (
    MAX_PROMPTS,
    EmbeddedImage,
    Strip,
    load_template,
    make_uri,
    read_generated_image,
)

COLOURS = (STRONG, OTHER, "#7a4fa3", "#2e8b57", "#8c6d1f", "#a33f63")  # of arms, in turn


def write_page(comparison: Comparison, runs: Sequence[EvidenceRun], file: Path) -> None:
    """Write the page. Raises OSError."""
    charts = [draw_curves(comparison), *(draw_intervals(comparison, arm) for arm in comparison.arms)]
    names, strips = read_strips(comparison, runs)
    page = load_template(Path(__file__).with_name("comparison.html")).render(
        t=fill_text,
        language=get_language(),
        frame=translate(describe_frame(comparison)),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        arms=[describe_arm(arm) for arm in comparison.arms],
        notes=[translate(note) for note in comparison.notes],
        effects_title=translate_label(EFFECTS_TITLE),
        effect_headings=[translate_label(heading) for heading in EFFECT_HEADINGS],
        effects=[[*format_effect(effect), translate_label(effect.verdict.verdict)] for effect in comparison.effects],
        table_headings=[translate_label(heading) for heading in HEADINGS],
        charts=[(chart, embed_chart(chart)) for chart in map(translate_chart, charts)],
        headings=names,
        strips=strips,
        runs=list(comparison.steps),
        settings=comparison.settings,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, page)


def describe_arm(arm: ArmComparison) -> dict:
    """Return the texts of an arm for the page."""
    return {
        "name": arm.arm,
        "verdict": arm.setting.verdict,
        "setting": translate(describe_setting(arm.setting, arm.weights.baseline)),
        "need": translate(describe_need(arm.setting)),
        "weights": translate(describe_weights(arm.weights)),
        "tables": [
            (translate_label(title), [[line.name, *format_row(line), translate_label(line.verdict)] for line in lines])
            for title, lines in list_tables(arm)
        ],
    }


def draw_curves(comparison: Comparison) -> Chart:
    """Draw the error of each run at all moments that the runs share, in the colour of its arm."""
    error = ERROR_NAMES[comparison.error]
    figure, axes = build_figure(error)
    arms = list(dict.fromkeys(curve.arm for curve in comparison.curves))
    labelled = set()
    for curve in comparison.curves:
        label = None if curve.arm in labelled else curve.arm
        labelled.add(curve.arm)
        colour = COLOURS[arms.index(curve.arm) % len(COLOURS)]
        axes.plot(curve.steps, curve.errors, marker="o", ms=3, color=colour, alpha=0.8, label=label)
    axes.legend(frameon=False, fontsize="small")
    texts = [f"{curve.run}: {curve.errors[-1]:.4g} at step {curve.steps[-1]}" for curve in comparison.curves]
    return Chart("curves", "Error by step", "; ".join(texts), figure)


def draw_intervals(comparison: Comparison, arm: ArmComparison) -> Chart:
    """Draw the difference of an arm at each noise level with its interval over samples."""
    figure, axes = build_figure("difference, %", "ln(SNR)")
    lines = [line for line in arm.by_noise if line.baseline]
    shares = [[100 * value / line.baseline for value in (line.difference, line.low, line.high)] for line in lines]
    names = [line.name for line in lines]
    below = [middle - low for middle, low, _ in shares]
    above = [high - middle for middle, _, high in shares]
    axes.errorbar(names, [middle for middle, _, _ in shares], [below, above], fmt="o", color=STRONG, capsize=3)
    axes.axhline(0, color=OTHER, linewidth=1)
    rotate_labels(axes, len(names))
    text = "; ".join(f"{line.name}: {share[0]:+.2f} %" for line, share in zip(lines, shares, strict=True))
    title = f"{arm.arm} against {comparison.baseline}, by noise level"
    return Chart("intervals", title, text, figure)


def embed_chart(chart: Chart) -> EmbeddedImage:
    """Return a chart as an image within the page."""
    buffer = BytesIO()
    translate_figure(chart.figure)
    set_fonts(chart.figure)
    chart.figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, transparent=True)
    width, height = (round(side * DOTS_PER_INCH) for side in SIZE_INCHES)
    return EmbeddedImage(make_uri(buffer.getvalue(), "png"), width, height, f"{chart.title}: {chart.text}")


def read_strips(comparison: Comparison, runs: Sequence[EvidenceRun]) -> tuple[list[str], list[Strip]]:
    """Return the runs that have generated images up to the compared step, and their images prompt by prompt."""
    folders = {}
    for run in runs:
        steps = {int(path.name.removeprefix("step-")): path for path in (run.folder / "samples").glob("step-*[0-9]")}
        reached = [step for step in steps if step <= comparison.steps[run.name]]
        if reached:
            folders[f"{run.name}, {fill_text('step {step}', step=max(reached))}"] = (max(reached), steps[max(reached)])
    files = sorted({file.name for _, folder in folders.values() for file in folder.glob("*.png")})[:MAX_PROMPTS]
    strips = []
    for file in files:
        found = [read_generated_image(folder / file, step) for step, folder in folders.values()]
        strips.append(Strip(next((prompt for _, prompt in found if prompt), file), [image for image, _ in found]))
    return list(folders), strips
