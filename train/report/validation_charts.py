"""Charts of the x0 error of validations: by noise level, and above the best step. Imports no torch."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from sdxl_trainer.configs.language.translate import translate_label
from sdxl_trainer.train.held_out.best_step import BestStep, find_best_step
from sdxl_trainer.train.held_out.history import ErrorHistory
from sdxl_trainer.train.held_out.sample_errors import NUM_BINS, WEIGHTS, name_bin
from sdxl_trainer.train.report.charts import OTHER, STRONG, Chart, Series, build_figure, mark_changes

COLORS = (STRONG, OTHER, "#3fa66b", "#7a4fa3")  # of the weights and the first averages
OVER_FITTING_COLOR = "#d01020"
LINEAR_PERCENT = 1.0  # up to here the axis of differences is linear, beyond logarithmic


def draw_validation_charts(
    histories: Mapping[str, ErrorHistory], over_fitting: Series, changes: dict[int, list[str]]
) -> list[Chart]:
    """Draw the x0 error by noise level, and that above the best step, for the weights and up to three averages.

    Args:
        over_fitting: the metric `validation/over_fitting`: the best step at each validation that found over-fitting.
        changes: settings and data changed by a resume, by its step.
    """
    names = [name for name in (WEIGHTS, *histories) if name in histories]
    chosen = {name: histories[name] for name in dict.fromkeys(names) if len(histories[name].steps) > 1}
    found = {name: best for name, history in chosen.items() if (best := find_best_step(history)) is not None}
    shown = dict(list(found.items())[: len(COLORS)])
    if not shown:
        return []
    stale_step = find_stale_step(shown, over_fitting)
    texts = [describe_best(name, best) for name, best in shown.items()]
    if stale_step is not None:
        texts.append(f"over-fitting since step {stale_step}")
    charts = [draw_excesses(shown, stale_step, [*texts])]
    if WEIGHTS in shown:
        charts.insert(0, draw_noise_levels(chosen[WEIGHTS], shown, stale_step))
    for chart in charts:
        mark_changes(chart.figure.axes[0], changes)
        chart.figure.axes[0].legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return charts


def find_stale_step(best: Mapping[str, BestStep], over_fitting: Series) -> int | None:
    """Return the best step of the weights if the run named over-fitting since then, and found no better step later."""
    named = set(over_fitting.finite.values.astype(int).tolist())
    return best[WEIGHTS].step if WEIGHTS in best and best[WEIGHTS].step in named else None


def describe_best(name: str, best: BestStep) -> str:
    """Return the best step of the weights or of an average, and the steps that are not measurably worse, in words."""
    words = f"{name_average(name)}: lowest x0 error {best.error:.4g} at step {best.step}"
    others = [step for step in best.equals if step != best.step]
    if not others:
        return f"{words}, all others measurably worse"
    if len(others) == 1:
        return f"{words}, not measurably worse: step {others[0]}"
    return f"{words}, not measurably worse: {len(others)} others from step {others[0]} to {others[-1]}"


def name_average(name: str) -> str:
    """Return the label of the weights or of an average."""
    return translate_label(WEIGHTS) if name == WEIGHTS else f"EMA {name}"


def draw_noise_levels(history: ErrorHistory, best: Mapping[str, BestStep], stale_step: int | None) -> Chart:
    """Draw the x0 error of the weights in each bin of the logarithm of the SNR, and the best steps."""
    figure, axes = build_figure("x0 error")
    figure.subplots_adjust(right=0.76)
    means = np.where(np.isfinite(history.bin_means), history.bin_means, np.nan)  # [T, NUM_BINS]
    known = [number for number in range(NUM_BINS) if np.isfinite(means[:, number]).any()]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(1, len(known))))
    lowest = []
    for number, color in zip(known, colors, strict=True):
        name, values = name_bin(number), means[:, number]
        axes.plot(history.steps, values, color=color, marker=".", label=f"ln(SNR) {name}")
        place = int(np.nanargmin(values))
        axes.plot(history.steps[place], values[place], "o", color=color, ms=7, mfc="none")
        lowest.append(f"{name}: {values[place]:.3g} at step {history.steps[place]}")
    axes.set_yscale("log")
    for (name, found), color in zip(best.items(), COLORS, strict=False):
        axes.axvline(found.step, color=color, linestyle=":", label=f"best step, {name_average(name)}")
    mark_over_fitting(axes, stale_step, history.steps[-1])
    text = f"x0 error of the weights, lowest by ln(SNR) {', '.join(lowest)}"
    return Chart("x0_error", "Validation x0 error by noise level", text, figure)


def draw_excesses(best: Mapping[str, BestStep], stale_step: int | None, texts: list[str]) -> Chart:
    """Draw the x0 error above that of the best step, with its interval."""
    figure, axes = build_figure("% above the best step")
    figure.subplots_adjust(right=0.76)
    for (name, found), color in zip(best.items(), COLORS, strict=False):
        steps = [excess.step for excess in found.excesses]
        mean, low, high = ([100 * value for value in column] for column in list(zip(*found.excesses, strict=True))[1:4])
        axes.plot(steps, mean, color=color, marker=".", label=name_average(name))
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.axvline(found.step, color=color, linestyle=":")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=LINEAR_PERCENT)
    mark_over_fitting(axes, stale_step, max(found.excesses[-1].step for found in best.values()))
    return Chart("best_step", "When to stop", "; ".join(texts), figure)


def mark_over_fitting(axes: Axes, stale_step: int | None, last_step: int) -> None:
    """Shade the steps since which the weights over-fit."""
    if stale_step is not None:
        axes.axvspan(stale_step, last_step, color=OVER_FITTING_COLOR, alpha=0.1, linewidth=0, label="over-fitting")
