"""Charts of a run's report, drawn from its metrics. Imports no torch."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # pyplot would keep all figures and look for a screen
from matplotlib.text import Text

from sdxl_trainer.configs.language.translate import translate, translate_label
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.data.images.fonts import find_face, hint_at_fonts, translate_drawable
from sdxl_trainer.train.report.metrics import read_all_metrics
from sdxl_trainer.train.report.noise_levels import NoiseLevelCurves

PALE, STRONG, OTHER, CHANGED = "#9db4c8", "#1f5c99", "#c2571a", "#7a4fa3"
SIZE_INCHES, DOTS_PER_INCH = (7.2, 3.6), 110
MAX_POINTS = 2000  # points of a curve; a chart is about 800 pixels wide
MAX_BUCKETS, MAX_VALIDATIONS = 24, 8
MAX_CHANGES = 4  # described under a chart
SMOOTHED_SHARE = 0.05  # share of all steps that the moving average covers


@dataclass(frozen=True)
class Series:
    """A metric over the steps: [N] distinct steps in ascending order, and [N] values, NaN where not finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> "Series":
        """The series without its values that are not finite."""
        is_finite = np.isfinite(self.values)
        return Series(self.steps[is_finite], self.values[is_finite])

    @property
    def last(self) -> float:
        """The last finite value, or NaN."""
        values = self.finite.values
        return float(values[-1]) if len(values) else float("nan")


EMPTY_SERIES = Series(np.zeros(0, np.int64), np.zeros(0))


@dataclass(frozen=True)
class RunNumbers:
    """The numbers of a run that charts are drawn from."""

    series: dict[str, Series]  # by metric name
    counts: dict[str, Any]  # `buckets` and `tokens` of data/loading/counts.py; empty if they are not stored
    changes: dict[int, list[str]] = field(default_factory=dict)  # settings and data changed by a resume, by its step
    noise_levels: NoiseLevelCurves | None = None  # None if the run learns nothing about noise levels

    def get(self, name: str) -> Series:
        """Return the series of a metric, empty if the run has none."""
        return self.series.get(name, EMPTY_SERIES)


@dataclass(frozen=True)
class Chart:
    """A drawn chart; `text` describes it in words."""

    name: str
    title: str
    text: str
    figure: Figure


def read_series(file: Path) -> dict[str, Series]:
    """Read every metric of a metrics file, by name. If a step has several lines, the last one counts."""
    columns: dict[str, tuple[array, array]] = {}
    for line in read_all_metrics(file) if file.is_file() else ():
        step = line.pop("step")
        for name, value in line.items():
            steps, values = columns.setdefault(name, (array("q"), array("d")))
            steps.append(step)
            values.append(float("nan") if value is None else value)
    return {name: _build_series(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def _build_series(steps: np.ndarray, values: np.ndarray) -> Series:
    # np.unique returns the first of equal steps, which in reversed order is the last one written.
    distinct_steps, positions = np.unique(steps[::-1], return_index=True)
    return Series(distinct_steps, values[::-1][positions])


def smooth(values: np.ndarray, share: float = SMOOTHED_SHARE) -> np.ndarray:
    """Return the bias-corrected exponential moving average over about `share` of all values, [N]."""
    decay = 1 - 1 / max(1.0, share * len(values))
    average, weight, averages = 0.0, 0.0, np.empty(len(values))
    for position, value in enumerate(values.tolist()):
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        averages[position] = average / weight if weight else value
    return averages


def draw_charts(numbers: RunNumbers) -> list[Chart]:
    """Draw every chart for which the run has numbers."""
    return [chart for draw in CHARTS if (chart := draw(numbers)) is not None]


def draw_loss(numbers: RunNumbers) -> Chart | None:
    """Draw the loss of each step, its moving average, and the validation losses."""
    losses = numbers.get("loss")
    finite_losses, validations = losses.finite, numbers.get("validation/loss").finite
    if len(losses.steps) + len(validations.steps) == 0:
        return None
    figure, axes = build_figure("loss")
    texts = [format_count(len(losses.steps), "step")]
    if len(finite_losses.steps):
        averages = smooth(finite_losses.values)
        draw_noisy_curve(axes, finite_losses, "loss of the step")
        average_curve = Series(finite_losses.steps, averages)
        draw_smooth_curve(axes, average_curve, color=STRONG, linewidth=2, label="moving average")
        texts.append(f"moving average from {averages[0]:.4g} to {averages[-1]:.4g}")
    for name, series in numbers.series.items():
        if name == "validation/loss" or name.startswith("validation/loss_ema_"):
            label = "validation" + name.removeprefix("validation/loss").replace("_ema_", ", EMA ")
            line = "-" if name == "validation/loss" else "--"
            axes.plot(series.finite.steps, series.finite.values, line, color=OTHER, marker="o", ms=3, label=label)
    if len(validations.steps):
        texts.append(f"validation loss from {validations.values[0]:.4g} to {validations.last:.4g}")
    non_finite = losses.steps[~np.isfinite(losses.values)]
    if len(non_finite):
        axes.plot(
            non_finite,
            np.zeros(len(non_finite)),
            "|",
            color="#d01020",
            ms=12,
            label="not finite",
            clip_on=False,
            transform=axes.get_xaxis_transform(),
        )
        texts.append(f"not finite in {format_count(len(non_finite), 'step')}")
    texts += mark_changes(axes, numbers.changes)
    axes.legend(frameon=False)
    return Chart("loss", "Loss", "; ".join(texts), figure)


def draw_loss_by_timestep(numbers: RunNumbers) -> Chart | None:
    """Draw the validation loss of each bin of timesteps, one line for each of up to `MAX_VALIDATIONS` validations."""
    prefix = "validation/loss_t"
    names = [name for name in numbers.series if name.startswith(prefix) and name.removeprefix(prefix)[:1].isdigit()]
    bins = {name.removeprefix(prefix): numbers.get(name).finite for name in sorted(names) if "_ema_" not in name}
    steps = np.unique(np.concatenate([series.steps for series in bins.values()])) if bins else np.zeros(0, np.int64)
    if not len(steps):
        return None
    figure, axes = build_figure("loss", "timesteps")
    shown = steps[np.unique(np.linspace(0, len(steps) - 1, MAX_VALIDATIONS).round().astype(int))]
    losses = [dict(zip(series.steps.tolist(), series.values.tolist(), strict=True)) for series in bins.values()]
    for number, step in enumerate(shown.tolist(), start=1):
        values = [bin_losses.get(step, float("nan")) for bin_losses in losses]
        share = number / len(shown)
        axes.plot(list(bins), values, marker="o", ms=3, color=STRONG, alpha=0.2 + 0.8 * share, label=f"step {step}")
    rotate_labels(axes, len(bins))
    figure.subplots_adjust(right=0.84)
    axes.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    text = (
        f"bins of timesteps: {len(bins)}, validations: {len(shown)} of {len(steps)}; at the last validation "
        + ", ".join(f"{name}: {series.last:.4g}" for name, series in bins.items())
    )
    return Chart("loss_by_timestep", "Validation loss by timestep", text, figure)


def build_curve_chart(name: str, title: str, unit: str, scale: float = 1.0) -> Callable[[RunNumbers], Chart | None]:
    """Return a function that draws a metric over the steps with its moving average."""

    def draw(numbers: RunNumbers) -> Chart | None:
        series = numbers.get(name).finite
        if not len(series.steps):
            return None
        series = Series(series.steps, series.values * scale)
        figure, axes = build_figure(unit)
        draw_noisy_curve(axes, series, "of the step")
        draw_smooth_curve(
            axes, Series(series.steps, smooth(series.values)), color=STRONG, linewidth=2, label="moving average"
        )
        axes.set_ylim(bottom=min(0.0, float(series.values.min())))
        axes.legend(frameon=False)
        values = series.values
        text = f"median {np.median(values):.3g}, min {values.min():.3g}, max {values.max():.3g}, last {values[-1]:.3g}"
        return Chart(name, title, f"{unit}: {text}", figure)

    return draw


def draw_learned_weighting(numbers: RunNumbers) -> Chart | None:
    """Draw the weight that a learned weighting gives the loss at each timestep."""
    curves = numbers.noise_levels
    if curves is None or not curves.weights:
        return None
    figure, axes = build_figure("weight", "timestep")
    axes.plot(curves.timesteps, curves.weights, color=STRONG, linewidth=2)
    axes.set_ylim(bottom=0)
    lowest, highest = (reduce(zip(curves.weights, curves.timesteps, strict=True)) for reduce in (min, max))
    text = f"from {lowest[0]:.3g} at timestep {lowest[1]:.0f} to {highest[0]:.3g} at timestep {highest[1]:.0f}"
    return Chart("learned_weighting", "Learned weight of the loss", text, figure)


def draw_adaptive_timesteps(numbers: RunNumbers) -> Chart | None:
    """Draw how often adaptive timesteps draw each bin."""
    curves = numbers.noise_levels
    if curves is None or not curves.frequencies:
        return None
    figure, axes = build_figure("frequency, relative", "timestep")
    axes.stairs(curves.frequencies, curves.edges, color=STRONG, linewidth=2, baseline=None)
    axes.axhline(1, color=PALE, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    frequencies = np.array(curves.frequencies)
    texts = [f"bins of timesteps: {len(frequencies)}", "not every bin has enough losses yet"]
    if np.ptp(frequencies):
        least, most = frequencies.argmin(), frequencies.argmax()
        texts[1] = (
            f"from {frequencies[least]:.3g} times as often at timestep {curves.edges[least]:.0f} "
            f"to {frequencies[most]:.3g} times at timestep {curves.edges[most]:.0f}"
        )
    return Chart("adaptive_timesteps", "Adaptive timesteps", "; ".join(texts), figure)


def draw_lr(numbers: RunNumbers) -> Chart | None:
    """Draw the learning rate, without an average."""
    series = numbers.get("lr").finite
    if not len(series.steps):
        return None
    figure, axes = build_figure("learning rate")
    draw_smooth_curve(axes, series, color=STRONG, linewidth=2)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    values = series.values
    text = f"first {values[0]:.3g}, max {values.max():.3g}, last {values[-1]:.3g} at step {series.steps[-1]}"
    texts = [text, *mark_changes(axes, numbers.changes)]
    if numbers.changes:
        axes.legend(frameon=False)
    return Chart("lr", "Learning rate", "; ".join(texts), figure)


def draw_buckets(numbers: RunNumbers) -> Chart | None:
    """Draw the number of samples of each bucket in an epoch; the smallest buckets share a bar."""
    sizes: dict[str, int] = numbers.counts.get("buckets", {})
    if not sizes:
        return None
    shown = dict(list(sizes.items())[:MAX_BUCKETS])
    if len(sizes) > len(shown):
        shown[f"{format_count(len(sizes) - len(shown), 'other')}"] = sum(sizes.values()) - sum(shown.values())
    figure, axes = build_figure("samples in epoch 0", "bucket")
    axes.bar(list(shown), list(shown.values()), color=STRONG)
    rotate_labels(axes, len(shown))
    axes.grid(visible=False, axis="x")
    total = f"{format_count(sum(sizes.values()), 'sample')} in {format_count(len(sizes), 'bucket')}"
    largest = ", ".join(f"{name}: {count:,}" for name, count in list(sizes.items())[:3])
    return Chart("buckets", "Buckets", f"{total}; largest buckets {largest}", figure)


def draw_tokens(numbers: RunNumbers) -> Chart | None:
    """Draw the lengths of captions in tokens of text encoder 1's tokenizer.

    Captions that are empty because caption dropout emptied them have a bar of their own.
    """
    tokens = numbers.counts.get("tokens", {})
    if not tokens.get("num_captions"):
        return None
    figure, axes = build_figure("captions", "tokens")
    counts = {name: first for name, (first, _) in tokens["classes"].items()}
    dropped = ""
    if "num_dropped" in tokens:  # not counted by earlier versions
        num_empty = counts.pop("0", 0) - tokens["num_dropped"]
        counts = {"dropped": tokens["num_dropped"], "empty": num_empty, **counts}
        dropped = f"; {tokens['num_dropped']:,} dropped by caption dropout, {num_empty:,} empty in the data"
    bars = axes.bar(list(counts), list(counts.values()), color=STRONG)
    axes.bar_label(bars, fontsize="small")
    axes.grid(visible=False, axis="x")
    text = (
        f"of {tokens['num_captions']:,} captions, {tokens['num_cut'][0]:,} are longer than data.max_tokens = "
        f"{tokens['max_tokens']} and are truncated{dropped}"
    )
    return Chart("tokens", "Length of captions", text, figure)


def translate_chart(chart: Chart) -> Chart:
    """Return a chart with its title and its description in the language of this process."""
    return replace(chart, title=translate_label(chart.title), text=translate(chart.text))


def translate_figure(figure: Figure) -> None:
    """Put the words of a figure into the language of this process, as far as fonts of this machine can draw it."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(translate_drawable(text.get_text()))


def set_fonts(figure: Figure) -> None:
    """Let each text of a figure that is not plain ASCII use the system's fonts that have its characters."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if not (words := text.get_text()).isascii():
            files = {face.file for face in map(find_face, words) if face is not None}
            hint_at_fonts(char for char in words if not char.isascii() and find_face(char) is None)
            for file in sorted(files):
                font_manager.fontManager.addfont(file)
            names = [font_manager.FontProperties(fname=file).get_name() for file in sorted(files)]
            text.set_fontfamily(["DejaVu Sans", *names])


def build_figure(y_label: str, x_label: str = "step") -> tuple[Figure, Axes]:
    """Build an empty chart."""
    # No automatic layout, which would draw everything twice.
    figure = Figure(figsize=SIZE_INCHES)
    figure.subplots_adjust(left=0.11, right=0.98, top=0.95, bottom=0.14)
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def rotate_labels(axes: Axes, num_labels: int) -> None:
    """Rotate the labels of the x axis and make room for them if they do not fit side by side."""
    if num_labels > 6:
        axes.tick_params(axis="x", labelrotation=60, labelsize="small")
        axes.figure.subplots_adjust(bottom=0.3)


def mark_changes(axes: Axes, changes: dict[int, list[str]]) -> list[str]:
    """Mark the steps at which a resume changed settings or data, and return a text for each of the last ones."""
    for number, step in enumerate(changes):
        label = "settings or data changed" if number == 0 else None
        axes.axvline(step, color=CHANGED, linestyle="--", linewidth=1, label=label)
    shown = list(changes.items())[-MAX_CHANGES:]
    return [f"changed at step {step}: {', '.join(texts)}" for step, texts in shown]


def draw_noisy_curve(axes: Axes, series: Series, label: str) -> None:
    """Draw a noisy curve, or for a long curve the band between its minima and maxima."""
    if len(series.steps) <= MAX_POINTS:
        axes.plot(series.steps, series.values, color=PALE, linewidth=0.8, label=label)
        return
    starts = np.linspace(0, len(series.steps), MAX_POINTS, endpoint=False).astype(int)
    low, high = (reduce.reduceat(series.values, starts) for reduce in (np.minimum, np.maximum))
    axes.fill_between(series.steps[starts], low, high, color=PALE, linewidth=0, label=label)


def draw_smooth_curve(axes: Axes, series: Series, **style: Any) -> None:
    """Draw a smooth curve through at most `MAX_POINTS` of its points."""
    positions = np.unique(np.linspace(0, len(series.steps) - 1, MAX_POINTS).round().astype(int))
    axes.plot(series.steps[positions], series.values[positions], **style)


CHARTS: tuple[Callable[[RunNumbers], Chart | None], ...] = (
    draw_loss,
    draw_loss_by_timestep,
    draw_learned_weighting,
    draw_adaptive_timesteps,
    draw_lr,
    build_curve_chart("grad_norm", "Gradient norm", "norm before clipping"),
    build_curve_chart("samples_per_second", "Throughput", "samples per second"),
    build_curve_chart("data_wait_share", "Waiting for data", "% of the step's time", scale=100),
    draw_buckets,
    draw_tokens,
)
