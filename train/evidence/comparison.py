"""The comparison of runs: do these weights differ, and does this setting help?

The first question is about the weights at hand: samples are what varies (bootstrap over samples). The second is about
training again: seeds vary too, so its variance is that between seeds plus that between samples.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdxl_trainer.configs.problems import Problem, UserInputError, format_count
from sdxl_trainer.train.evidence.grid_contrasts import Contrast, find_contrasts
from sdxl_trainer.train.evidence.pairing import SharedErrors, choose_steps, share_errors
from sdxl_trainer.train.evidence.runs import Arm, Axis, EvidenceRun, form_arms, list_differences
from sdxl_trainer.train.held_out.inference import (
    CONFIDENCE,
    MIN_SAMPLES,
    Uncertainty,
    Variance,
    adjust_by_holm,
    bootstrap_means,
    compute_t_interval,
    count_needed,
)
from sdxl_trainer.train.held_out.sample_errors import NUM_BINS, WEIGHTS, name_bin

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
MIN_SEEDS = 3  # of each arm
OTHER_GROUP = "other"  # of samples that --groups does not name
MAX_SEEDS, MAX_SAMPLES = 100, 1_000_000  # that are asked for


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a comparison.

    Args:
        axis: what is equal between the runs.
        error: a name in `COLUMNS`.
        average: decay of a moving average, or `weights`.
        groups: caption group of each key; empty: unknown.
    """

    axis: Axis = "steps"
    error: str = "v"
    average: str = WEIGHTS
    groups: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between the errors of two arms on a group of samples: the arm's minus the baseline's."""

    name: str
    num_samples: int
    baseline: float  # mean error
    error: float  # mean error of the arm
    difference: float
    low: float
    high: float
    p_value: float  # by Holm's correction over the groups of its kind
    verdict: str  # BETTER, WORSE or UNDECIDED


@dataclass(frozen=True, kw_only=True)
class SettingVerdict:
    """The answer to the question if a setting helps."""

    verdict: str
    reason: str  # of an undecided one
    seeds: tuple[int, int]  # of the baseline and of the arm
    is_paired: bool  # by seeds
    difference: float
    low: float | None  # None without a variance between seeds
    high: float | None
    p_value: float | None  # by Holm's correction over all arms
    needed_seeds: int | None = None  # of each arm, that would decide if the difference stays
    needed_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class ArmComparison:
    """An arm compared with the baseline."""

    arm: str
    setting: SettingVerdict
    weights: Difference
    by_noise: list[Difference]
    by_bucket: list[Difference]
    by_source: list[Difference]
    by_group: list[Difference]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The effect of one setting, averaged over all combinations of the other settings that differ."""

    setting: str  # with its value
    against: str  # value of the baseline
    num_combinations: int
    baseline: float  # mean error with the baseline's value
    verdict: SettingVerdict  # by Holm's correction over all effects


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """The mean error of a run on the shared samples, by step."""

    run: str
    arm: str
    steps: list[int]
    errors: list[float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that a comparison says."""

    baseline: str
    axis: str
    error: str
    average: str
    steps: dict[str, int]  # at which each run is compared
    seeds: dict[str, str]
    num_samples: int
    arms: list[ArmComparison]
    effects: list[Effect]  # empty unless the arms form a grid of two settings or more
    curves: list[RunCurve]
    settings: dict[str, dict[str, str]]  # that differ: key → run → value
    notes: list[str]


def compare_runs(runs: Sequence[EvidenceRun], options: Options) -> Comparison:
    """Compare runs with the arm of the first one.

    Raises:
        UserInputError: the runs cannot be compared.
        OSError, ValueError: a file cannot be read.
    """
    differing, names = list_differences(runs), [run.name for run in runs]
    if options.error == "loss" and (keys := [key for key in differing if key.startswith("objective.")]):
        rule = f"cannot be compared between runs that differ in {keys[0]}"
        raise UserInputError([Problem("--error", "loss", rule, "compare x0 or v, which are one scale")])
    moments = choose_steps(runs, options.axis)
    steps, arms = moments[-1], form_arms(runs)
    tables = [run.read(step) for run, step in zip(runs, steps, strict=True)]
    shared = share_errors(tables, names, options.error, options.average)
    base, *others = [(arm, np.array([runs.index(run) for run in arm.runs])) for arm in arms]
    compared = [compare_arms(base, other, shared, options.groups) for other in others]
    notes = [*shared.notes, *list_omissions(shared, options.groups)]
    if len(others) and all(run.learned_by == runs[0].learned_by for run in runs):
        notes.append("the runs differ in no setting but their seeds: only their weights are compared")
    if len(set(steps)) > 1:
        notes.append("the runs are compared at different steps: the last that each had reached by then")
    effects = judge_effects(runs, find_contrasts(differing, [run.seed for run in runs]), shared)
    reasons = sorted({effect.verdict.reason for effect in effects if effect.verdict.low is None})
    notes += [f"effects of settings without an interval: {reason}" for reason in reasons]
    return Comparison(
        baseline=base[0].label,
        axis=options.axis,
        error=options.error,
        average=options.average,
        steps=dict(zip(names, steps, strict=True)),
        seeds={run.name: run.seed for run in runs},
        num_samples=len(shared.samples),
        arms=correct_over_arms(compared),
        effects=effects,
        curves=draw_curves(runs, arms, moments, options),
        settings={key: dict(zip(names, values, strict=True)) for key, values in differing.items()},
        notes=notes,
    )


def compare_arms(
    base: tuple[Arm, np.ndarray], other: tuple[Arm, np.ndarray], shared: SharedErrors, groups: Mapping[str, str]
) -> ArmComparison:
    """Compare an arm with the baseline; each is given with the numbers of its runs."""
    errors = np.stack([shared.errors[numbers].mean(axis=0) for _, numbers in (base, other)])  # [2, N, NUM_BINS]
    means = np.stack([shared.means[numbers].mean(axis=0) for _, numbers in (base, other)])  # [2, N]
    by_seed = [average_by_seed(arm, shared.means[numbers].mean(axis=1)) for arm, numbers in (base, other)]
    same_seeds = base[0].num_seeds >= MIN_SEEDS and by_seed[0].keys() == by_seed[1].keys()

    def split(names: Sequence[str]) -> list[Difference]:
        kinds = sorted(set(names))
        columns = [np.where(np.array(names) == kind, means, np.nan) for kind in kinds]
        return describe_differences(kinds, np.stack(columns, axis=-1)) if len(kinds) > 1 else []

    captions = [groups.get(sample.key, OTHER_GROUP) for sample in shared.samples] if groups else []
    return ArmComparison(
        arm=other[0].label,
        setting=judge_setting(by_seed[0], by_seed[1], means[1] - means[0], is_paired=same_seeds),
        weights=describe_differences(["all"], means[..., None])[0],
        by_noise=describe_differences([name_bin(number) for number in range(NUM_BINS)], errors),
        by_bucket=split([sample.bucket for sample in shared.samples]),
        by_source=split([str(source) for source in shared.sources]),
        by_group=split(captions),
    )


def list_omissions(shared: SharedErrors, groups: Mapping[str, str]) -> Iterator[str]:
    """Yield which tables and lines are missing, and why: groups that no sample belongs to, and those of one sample."""
    keys = {sample.key for sample in shared.samples}
    if groups and not keys & groups.keys():
        yield f"of {format_count(len(groups), 'key')} in --groups, none is that of a compared sample"
        groups = {}
    in_bins = np.isfinite(shared.errors[0]).sum(axis=0).tolist()
    kinds = {
        "noise level": [name_bin(number) for number, count in enumerate(in_bins) for _ in range(count)],
        "bucket": [sample.bucket for sample in shared.samples],
        "entry of the metadata": [str(source) for source in shared.sources],
        "caption group": [groups.get(sample.key, OTHER_GROUP) for sample in shared.samples] if groups else [],
    }
    for kind, names in kinds.items():
        counts = Counter(names)
        if kind == "caption group" and len(counts) == 1:
            yield f"there is no table by caption group: all samples belong to the group {names[0]}"
        elif len(counts) > 1 and (alone := sorted(name for name, count in counts.items() if count == 1)):
            yield f"without a line, because they have one sample: {kind} {', '.join(alone)}"


def judge_effects(runs: Sequence[EvidenceRun], contrasts: Sequence[Contrast], shared: SharedErrors) -> list[Effect]:
    """Return the effect of each contrast. A seed is one piece of evidence, in however many combinations it was used."""
    verdicts, baselines = [], []
    for contrast in contrasts:
        sides = [np.array(contrast.baseline), np.array(contrast.arm)]
        arms = [Arm(label="", runs=[runs[number] for number in side]) for side in sides]
        by_seed = [average_by_seed(arm, shared.means[side].mean(axis=1)) for arm, side in zip(arms, sides, strict=True)]
        means = [shared.means[side].mean(axis=0) for side in sides]
        verdicts.append(judge_setting(by_seed[0], by_seed[1], means[1] - means[0], is_paired=True))
        baselines.append(float(means[0].mean()))
    found = zip(contrasts, baselines, correct_verdicts(verdicts, "other settings are judged too"), strict=True)
    return [
        Effect(
            setting=contrast.setting,
            against=contrast.against,
            num_combinations=contrast.num_combinations,
            baseline=baseline,
            verdict=verdict,
        )
        for contrast, baseline, verdict in found
    ]


def average_by_seed(arm: Arm, scores: np.ndarray) -> dict[str, float]:
    """Return the mean score of each seed: runs of one seed are no independent evidence."""
    found: dict[str, list[float]] = {}
    for run, score in zip(arm.runs, scores.tolist(), strict=True):
        found.setdefault(run.seed, []).append(score)
    return {seed: float(np.mean(values)) for seed, values in sorted(found.items())}


def describe_differences(names: Sequence[str], errors: np.ndarray) -> list[Difference]:
    """Return the difference of each group of samples that has at least two.

    Args:
        errors: [2, N, K] of baseline and arm; NaN where a sample does not belong to the group.
    """
    found = zip(names, bootstrap_means(errors[1] - errors[0]), np.moveaxis(errors, -1, 0), strict=True)
    rows = [(name, interval, values) for name, interval, values in found if interval is not None]
    adjusted = adjust_by_holm([interval.p_value for _, interval, _ in rows])
    differences = []
    for (name, interval, values), p_value in zip(rows, adjusted, strict=True):
        num_samples = int(np.isfinite(values[0]).sum())
        differences.append(
            Difference(
                name=name,
                num_samples=num_samples,
                baseline=float(np.nanmean(values[0])),
                error=float(np.nanmean(values[1])),
                difference=interval.mean,
                low=interval.low,
                high=interval.high,
                p_value=p_value,
                verdict=decide(interval.mean, p_value) if num_samples >= MIN_SAMPLES else UNDECIDED,
            )
        )
    return differences


def decide(difference: float, p_value: float) -> str:
    """Return the verdict on a difference of errors: a lower error is better."""
    if p_value >= 1 - CONFIDENCE:
        return UNDECIDED
    return BETTER if difference < 0 else WORSE


def judge_setting(
    baseline: Mapping[str, float], arm: Mapping[str, float], differences: np.ndarray, is_paired: bool
) -> SettingVerdict:
    """Return whether a setting helps, by the variance between seeds and between samples.

    Args:
        baseline, arm: mean error of each seed's runs.
        differences: [N] of the arms' mean errors on each sample.
        is_paired: the seeds are the same, and runs of one seed saw the same data and noise: compare them in pairs.
    """
    first, second = (np.array(list(scores.values())) for scores in (baseline, arm))
    effect, seeds = float(second.mean() - first.mean()), (len(first), len(second))
    if min(seeds) < MIN_SEEDS or len(differences) < MIN_SAMPLES:
        few = "one seed" if min(seeds) == 1 else f"{min(seeds)} seeds"
        return SettingVerdict(
            verdict=UNDECIDED,
            reason=few if min(seeds) < MIN_SEEDS else "too few samples",
            seeds=seeds,
            is_paired=False,
            difference=effect,
            low=None,
            high=None,
            p_value=None,
            needed_seeds=MIN_SEEDS if min(seeds) < MIN_SEEDS else None,
            needed_samples=MIN_SAMPLES if len(differences) < MIN_SAMPLES else None,
        )
    spreads = [float((second - first).var(ddof=1))] if is_paired else [float(x.var(ddof=1)) for x in (first, second)]
    of_samples, num_samples = float(differences.var(ddof=1)), len(differences)

    def measure(num_seeds: Sequence[int], num_samples: int) -> Uncertainty:
        parts = [Variance(spread / count, count - 1) for spread, count in zip(spreads, num_seeds, strict=False)]
        return Uncertainty(parts, Variance(of_samples / num_samples, num_samples - 1))

    interval = compute_t_interval(effect, measure(seeds, num_samples))
    verdict = decide(effect, interval.p_value)
    return SettingVerdict(
        verdict=verdict,
        reason="",
        seeds=seeds,
        is_paired=is_paired,
        difference=effect,
        low=interval.low,
        high=interval.high,
        p_value=interval.p_value,
        **_count_needed(effect, seeds, num_samples, measure if verdict == UNDECIDED else None),
    )


def _count_needed(
    effect: float,
    seeds: tuple[int, int],
    num_samples: int,
    measure: Callable[[Sequence[int], int], Uncertainty] | None,
) -> dict[str, int | None]:
    if measure is None:
        return {}
    return {
        "needed_seeds": count_needed(effect, lambda n: measure((n, n), num_samples), min(seeds) + 1, MAX_SEEDS),
        "needed_samples": count_needed(effect, lambda n: measure(seeds, n), num_samples + 1, MAX_SAMPLES),
    }


def correct_over_arms(arms: Sequence[ArmComparison]) -> list[ArmComparison]:
    """Apply Holm's correction to the verdicts of several arms."""
    verdicts = correct_verdicts([arm.setting for arm in arms], "other arms are compared too")
    return [replace(arm, setting=verdict) for arm, verdict in zip(arms, verdicts, strict=True)]


def correct_verdicts(verdicts: Sequence[SettingVerdict], reason: str) -> list[SettingVerdict]:
    """Apply Holm's correction to verdicts.

    Args:
        reason: of the verdicts that become undecided.
    """
    p_values = [verdict.p_value for verdict in verdicts]
    adjusted = iter(adjust_by_holm([value for value in p_values if value is not None]))
    corrected = []
    for found in verdicts:
        if found.p_value is not None:
            p_value = next(adjusted)
            verdict = decide(found.difference, p_value)
            found = replace(
                found, p_value=p_value, verdict=verdict, reason=reason if verdict != found.verdict else found.reason
            )
        corrected.append(found)
    return corrected


def draw_curves(
    runs: Sequence[EvidenceRun], arms: Sequence[Arm], moments: Sequence[Sequence[int]], options: Options
) -> list[RunCurve]:
    """Return the mean error of each run at all moments that the runs share."""
    label_of = {run.folder: arm.label for arm in arms for run in arm.runs}
    curves = [RunCurve(run=run.name, arm=label_of[run.folder], steps=[], errors=[]) for run in runs]
    for steps in moments:
        tables = [run.read(step) for run, step in zip(runs, steps, strict=True)]
        shared = share_errors(tables, [run.name for run in runs], options.error, options.average)
        for curve, step, means in zip(curves, steps, shared.means, strict=True):
            curve.steps.append(step)
            curve.errors.append(float(means.mean()))
    return curves
