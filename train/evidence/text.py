"""The words of a comparison, for the console and for its page. All texts are English; who shows them translates."""

from collections.abc import Iterator, Sequence

from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.train.evidence.comparison import (
    UNDECIDED,
    ArmComparison,
    Comparison,
    Difference,
    Effect,
    SettingVerdict,
)
from sdxl_trainer.train.held_out.sample_errors import WEIGHTS

ERROR_NAMES = {"x0": "mean x0 error", "v": "v error", "loss": "validation loss"}


def describe_setting(setting: SettingVerdict, baseline_error: float) -> str:
    """Return the verdict on a setting in a sentence.

    Args:
        baseline_error: mean error of the baseline, in which the difference is expressed.
    """
    verdict = f"undecided: {setting.reason}" if setting.verdict == UNDECIDED and setting.reason else setting.verdict
    change = format_share(setting.difference, baseline_error)
    first, second = setting.seeds
    if setting.low is None or setting.high is None:
        return f"{verdict} ({change} with {first} and {second} seeds)"
    interval = f"{format_share(setting.low, baseline_error)} to {format_share(setting.high, baseline_error)}"
    pairs = ", in pairs" if setting.is_paired else ""
    return f"{verdict} ({change}, 95 % interval {interval}, {first} and {second} seeds{pairs})"


def describe_need(setting: SettingVerdict) -> str:
    """Return how many seeds or samples would decide an undecided setting; "" for a decided one."""
    if setting.verdict != UNDECIDED:
        return ""
    if setting.low is None:
        seeds = f"{setting.needed_seeds} seeds of each arm" if setting.needed_seeds else ""
        samples = f"{setting.needed_samples} validation samples" if setting.needed_samples else ""
        return f"at least {' and '.join(filter(None, (seeds, samples)))} are needed"
    seeds = f"{setting.needed_seeds} seeds of each arm" if setting.needed_seeds else ""
    samples = f"{setting.needed_samples:,} validation samples" if setting.needed_samples else ""
    if not seeds and not samples:
        return "even 100 seeds or a million validation samples would not decide a difference this small"
    return f"{' or '.join(filter(None, (seeds, samples)))} would decide if the difference stays"


def describe_weights(difference: Difference) -> str:
    """Return the verdict on the weights at hand in a sentence."""
    change = format_share(difference.difference, difference.baseline)
    low, high = (format_share(edge, difference.baseline) for edge in (difference.low, difference.high))
    interval = f"{change}, 95 % interval {low} to {high}"
    if difference.verdict == UNDECIDED:
        return f"these weights do not differ measurably ({interval})"
    return f"these weights are {difference.verdict} ({interval})"


def format_share(difference: float, baseline: float) -> str:
    """Return a difference as a share of the baseline's error, such as `-3.1 %`."""
    return f"{100 * difference / baseline:+.2f} %" if baseline else f"{difference:+.3g}"


def describe_frame(comparison: Comparison) -> str:
    """Return what is compared with what, in a sentence."""
    steps = sorted(set(comparison.steps.values()))
    at = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    weights = "weights" if comparison.average == WEIGHTS else f"EMA {comparison.average}"
    number = format_count(comparison.num_samples, "sample")
    error = ERROR_NAMES[comparison.error]
    return f"{error} of the {weights} at {at} on {number}; lower is better; baseline: {comparison.baseline}"


def list_tables(arm: ArmComparison) -> Iterator[tuple[str, Sequence[Difference]]]:
    """Yield the title and the lines of each table of an arm."""
    titles = {
        "by noise level, ln(SNR)": arm.by_noise,
        "by bucket": arm.by_bucket,
        "by entry of the metadata": arm.by_source,
        "by caption group": arm.by_group,
    }
    yield from ((title, lines) for title, lines in titles.items() if lines)


def format_row(line: Difference) -> list[str]:
    """Return the cells of a line of a table, without its name and verdict."""
    shares = [format_share(value, line.baseline) for value in (line.difference, line.low, line.high)]
    return [f"{line.num_samples:,}", f"{line.baseline:.4g}", f"{line.error:.4g}", *shares, f"{line.p_value:.2g}"]


HEADINGS = ("group", "samples", "baseline", "arm", "difference", "low", "high", "p", "verdict")

EFFECTS_TITLE = "Effect of each setting, averaged over the others"
EFFECT_HEADINGS = ("setting", "against", "combinations", "difference", "low", "high", "p", "verdict")


def format_effect(effect: Effect) -> list[str]:
    """Return the cells of an effect's line, without its verdict."""
    verdict = effect.verdict
    values = (verdict.difference, verdict.low, verdict.high)
    shares = ["" if value is None else format_share(value, effect.baseline) for value in values]
    p_value = "" if verdict.p_value is None else f"{verdict.p_value:.2g}"
    return [effect.setting, effect.against, str(effect.num_combinations), *shares, p_value]
