"""The charts of a run's report, from the numbers that the run has written down. Needs no torch."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a screen

from sdxl_trainer.train.report.metrics import read_lines

PALE, STRONG, OTHER = "#9db4c8", "#1f5c99", "#c2571a"
SIZE_INCHES, DOTS_PER_INCH = (7.2, 3.6), 110
MAX_POINTS = 2000  # of a curve: as many as a chart has columns of pixels, and then some
MAX_BUCKETS, MAX_VALIDATIONS = 24, 8
SMOOTHED_SHARE = 0.05  # of all steps, that the moving average reaches over


@dataclass(frozen=True)
class Series:
    """A number over the steps: [N] steps, each once and in order, and [N] values, NaN where it was not finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> "Series":
        """Without what is not finite."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])

    @property
    def last(self) -> float:
        """The newest finite value, or NaN."""
        values = self.finite.values
        return float(values[-1]) if len(values) else float("nan")


NOTHING = Series(np.zeros(0, np.int64), np.zeros(0))


@dataclass(frozen=True)
class Numbers:
    """What charts are drawn from."""

    series: dict[str, Series]
    counts: dict[str, Any]  # `buckets` and `tokens` of data/loading/counts.py, or nothing

    def get(self, name: str) -> Series:
        """A series, empty if there is none of that name."""
        return self.series.get(name, NOTHING)


@dataclass(frozen=True)
class Chart:
    """A drawn chart; `text` says in words what it shows."""

    name: str
    title: str
    text: str
    figure: Figure


def read_series(file: Path) -> dict[str, Series]:
    """Every number of a metrics file by its name. Of lines of the same step the later one counts."""
    columns: dict[str, tuple[array, array]] = {}
    for line in read_lines(file) if file.is_file() else ():
        step = line.pop("step")
        for name, value in line.items():
            steps, values = columns.setdefault(name, (array("q"), array("d")))
            steps.append(step)
            values.append(float("nan") if value is None else value)
    return {name: _sort(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def _sort(steps: np.ndarray, values: np.ndarray) -> Series:
    kept, places = np.unique(steps[::-1], return_index=True)  # of the reversed order, so the first is the latest
    return Series(kept, values[::-1][places])


def smooth(values: np.ndarray, share: float = SMOOTHED_SHARE) -> np.ndarray:
    """Exponential moving average over about `share` of all values, corrected for its start. [N] in and out."""
    decay = 1 - 1 / max(1.0, share * len(values))
    average, weight, result = 0.0, 0.0, np.empty(len(values))
    for place, value in enumerate(values.tolist()):
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result[place] = average / weight if weight else value
    return result


def draw_charts(numbers: Numbers) -> list[Chart]:
    """All charts for which there are numbers."""
    return [chart for draw in CHARTS if (chart := draw(numbers)) is not None]


def draw_loss(numbers: Numbers) -> Chart | None:
    """The loss of the steps, its average, and the validations'."""
    every = numbers.get("loss")
    steps, validations = every.finite, numbers.get("validation/loss").finite
    if len(every.steps) + len(validations.steps) == 0:
        return None
    figure, axes = build_figure("loss")
    said = [f"{len(every.steps)} steps"]
    if len(steps.steps):
        averages = smooth(steps.values)
        draw_raw(axes, steps, "loss of the step")
        draw_line(axes, Series(steps.steps, averages), color=STRONG, linewidth=2, label="moving average")
        said.append(f"the moving average goes from {averages[0]:.4g} to {averages[-1]:.4g}")
    for name, series in numbers.series.items():
        if name == "validation/loss" or name.startswith("validation/loss_ema_"):
            label = "validation" + name.removeprefix("validation/loss").replace("_ema_", ", average of ")
            line = "-" if name == "validation/loss" else "--"
            axes.plot(series.finite.steps, series.finite.values, line, color=OTHER, marker="o", ms=3, label=label)
    if len(validations.steps):
        said.append(f"the validation loss from {validations.values[0]:.4g} to {validations.last:.4g}")
    lost = every.steps[~np.isfinite(every.values)]
    if len(lost):
        axes.plot(
            lost,
            np.zeros(len(lost)),
            "|",
            color="#d01020",
            ms=12,
            label="not finite",
            clip_on=False,
            transform=axes.get_xaxis_transform(),
        )
        said.append(f"of {len(lost)} steps it was not finite")
    axes.legend(frameon=False)
    return Chart("loss", "Loss", "; ".join(said), figure)


def draw_loss_by_timestep(numbers: Numbers) -> Chart | None:
    """The validation loss in each part of the timesteps, a line for each of some validations."""
    prefix = "validation/loss_t"
    names = [name for name in numbers.series if name.startswith(prefix) and name.removeprefix(prefix)[:1].isdigit()]
    bins = {name.removeprefix(prefix): numbers.get(name).finite for name in sorted(names) if "_ema_" not in name}
    steps = np.unique(np.concatenate([series.steps for series in bins.values()])) if bins else np.zeros(0, np.int64)
    if not len(steps):
        return None
    figure, axes = build_figure("loss", "timesteps")
    shown = steps[np.unique(np.linspace(0, len(steps) - 1, MAX_VALIDATIONS).round().astype(int))]
    for place, step in enumerate(shown.tolist()):
        known = [dict(zip(series.steps.tolist(), series.values.tolist(), strict=True)) for series in bins.values()]
        values = [column.get(step, float("nan")) for column in known]
        share = (place + 1) / len(shown)
        axes.plot(list(bins), values, marker="o", ms=3, color=STRONG, alpha=0.2 + 0.8 * share, label=f"step {step}")
    turn_labels(axes, len(bins))
    figure.subplots_adjust(right=0.84)
    axes.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    text = (
        f"{len(bins)} parts of the timesteps at {len(shown)} of {len(steps)} validations; at the last one "
        + ", ".join(f"{name}: {series.last:.4g}" for name, series in bins.items())
    )
    return Chart("loss_by_timestep", "Validation loss by timestep", text, figure)


def draw_curve(name: str, title: str, unit: str, scale: float = 1.0) -> Callable[[Numbers], Chart | None]:
    """What draws one number over the steps: raw and averaged."""

    def draw(numbers: Numbers) -> Chart | None:
        series = numbers.get(name).finite
        if not len(series.steps):
            return None
        series = Series(series.steps, series.values * scale)
        figure, axes = build_figure(unit)
        draw_raw(axes, series, "of the step")
        draw_line(axes, Series(series.steps, smooth(series.values)), color=STRONG, linewidth=2, label="moving average")
        axes.set_ylim(bottom=min(0.0, float(series.values.min())))
        axes.legend(frameon=False)
        values = series.values
        text = (
            f"median {np.median(values):.3g}, least {values.min():.3g}, most {values.max():.3g}, last {values[-1]:.3g}"
        )
        return Chart(name, title, f"{unit}: {text}", figure)

    return draw


def draw_lr(numbers: Numbers) -> Chart | None:
    """The learning rate, which is no measurement and needs no average."""
    series = numbers.get("lr").finite
    if not len(series.steps):
        return None
    figure, axes = build_figure("learning rate")
    draw_line(axes, series, color=STRONG, linewidth=2)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    values = series.values
    text = f"starts at {values[0]:.3g}, is at most {values.max():.3g}, and {values[-1]:.3g} at step {series.steps[-1]}"
    return Chart("lr", "Learning rate", text, figure)


def draw_buckets(numbers: Numbers) -> Chart | None:
    """Samples of each bucket in an epoch, the fullest ones by themselves."""
    sizes: dict[str, int] = numbers.counts.get("buckets", {})
    if not sizes:
        return None
    shown = dict(list(sizes.items())[:MAX_BUCKETS])
    if len(sizes) > len(shown):
        shown[f"{len(sizes) - len(shown)} others"] = sum(sizes.values()) - sum(shown.values())
    figure, axes = build_figure("samples in epoch 0", "bucket")
    axes.bar(list(shown), list(shown.values()), color=STRONG)
    turn_labels(axes, len(shown))
    axes.grid(visible=False, axis="x")
    text = f"{sum(sizes.values()):,} samples in {len(sizes)} buckets; the fullest are " + ", ".join(
        f"{name} with {count:,}" for name, count in list(sizes.items())[:3]
    )
    return Chart("buckets", "Buckets", text, figure)


def draw_tokens(numbers: Numbers) -> Chart | None:
    """Lengths of captions in tokens, by text encoder 1's tokenizer."""
    tokens = numbers.counts.get("tokens", {})
    if not tokens.get("num_captions"):
        return None
    figure, axes = build_figure("captions", "tokens")
    counts = [first for first, _ in tokens["classes"].values()]
    bars = axes.bar(list(tokens["classes"]), counts, color=STRONG)
    axes.bar_label(bars, fontsize="small")
    axes.grid(visible=False, axis="x")
    text = (
        f"of {tokens['num_captions']:,} captions {tokens['num_cut'][0]:,} are longer than data.max_tokens = "
        f"{tokens['max_tokens']} and are cut off there"
    )
    return Chart("tokens", "Length of captions", text, figure)


def build_figure(unit: str, over: str = "step") -> tuple[Figure, Axes]:
    """An empty chart."""
    figure = Figure(figsize=SIZE_INCHES)  # without an automatic layout, which draws everything twice
    figure.subplots_adjust(left=0.11, right=0.98, top=0.95, bottom=0.14)
    axes = figure.subplots()
    axes.set(xlabel=over, ylabel=unit)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def turn_labels(axes: Axes, number: int) -> None:
    """Make room below for labels of so many classes, if they are too many to stand side by side."""
    if number > 6:
        axes.tick_params(axis="x", labelrotation=60, labelsize="small")
        axes.figure.subplots_adjust(bottom=0.3)


def draw_raw(axes: Axes, series: Series, label: str) -> None:
    """A curve that jumps about; of a long one, what it spans."""
    if len(series.steps) <= MAX_POINTS:
        axes.plot(series.steps, series.values, color=PALE, linewidth=0.8, label=label)
        return
    starts = np.linspace(0, len(series.steps), MAX_POINTS, endpoint=False).astype(int)
    low, high = (reduce.reduceat(series.values, starts) for reduce in (np.minimum, np.maximum))
    axes.fill_between(series.steps[starts], low, high, color=PALE, linewidth=0, label=label)


def draw_line(axes: Axes, series: Series, **style: Any) -> None:
    """A smooth curve, of which an even choice of points will do."""
    places = np.unique(np.linspace(0, len(series.steps) - 1, MAX_POINTS).round().astype(int))
    axes.plot(series.steps[places], series.values[places], **style)


CHARTS: tuple[Callable[[Numbers], Chart | None], ...] = (
    draw_loss,
    draw_loss_by_timestep,
    draw_lr,
    draw_curve("grad_norm", "Gradient norm", "norm before clipping"),
    draw_curve("samples_per_second", "Throughput", "samples per second"),
    draw_curve("data_wait_share", "Waiting for data", "% of the step's time", scale=100),
    draw_buckets,
    draw_tokens,
)
