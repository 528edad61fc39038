"""The plan of an ablation: its folder, and the settings of each run, all checked before the first one begins."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.renames import rename_key
from sdxl_trainer.configs.schema import NAME_PATTERN, Config
from sdxl_trainer.train.ablation.grid import GridArm, Variation, build_arms, parse_variations
from sdxl_trainer.train.evidence.runs import NEUTRAL_SETTINGS
from sdxl_trainer.train.report.run_status import FINISHED, STATUS_FILE, read_status
from sdxl_trainer.train.report.settings import flatten_settings, read_settings
from sdxl_trainer.train.setting_checks import check_model_settings, check_rank_settings, check_run_settings

EXTENDED = "train.max_steps"  # a larger budget continues runs with a constant rate
RESOLVED_LATER = ("null", "auto")  # a run writes what it has chosen


@dataclass(frozen=True, kw_only=True)
class Request:
    """The request of a user.

    Args:
        vary: words such as `optim.lr=1e-5,2e-5`.
        baseline: words such as `optim.lr=1e-5`.
        name: of the folder in `run.dir`; "" for the default.
        budget_steps: `train.max_steps` of every run; None leaves it.
        overrides: settings of all runs.
    """

    cfg: Path
    vary: Sequence[str]
    baseline: Sequence[str] = ()
    num_seeds: int = 3
    name: str = ""
    budget_steps: int | None = None
    per_gpu: bool = False
    keep_hopeless: bool = False
    overrides: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run of the grid.

    Args:
        folder: of the run.
        words: settings that override the file's.
    """

    arm: GridArm
    seed: int
    folder: Path
    words: list[str]

    @property
    def label(self) -> str:
        """The run as people read it."""
        return f"{self.arm.label}, seed {self.seed}"

    def is_finished(self, num_steps: int | None) -> bool:
        """Return whether the run has made all of its steps. `num_steps` is None where epochs are counted."""
        status = read_status(self.folder / "logs" / STATUS_FILE)
        return status is not None and status.state == FINISHED and status.step >= (num_steps or 0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All runs of an ablation, in the order in which they are trained: by seeds, the baseline of each seed first."""

    cfg: Path
    folder: Path
    arms: list[GridArm]
    runs: list[PlannedRun]
    num_steps: int | None  # `train.max_steps`

    def find_baseline(self, run: PlannedRun) -> PlannedRun | None:
        """Return the baseline's run of the same seed; None for a run of the baseline."""
        if run.arm is self.arms[0]:
            return None
        return next(other for other in self.runs if other.arm is self.arms[0] and other.seed == run.seed)


def plan_runs(request: Request, num_ranks: int) -> Plan:
    """Plan an ablation.

    Args:
        num_ranks: of each run.

    Raises:
        UserInputError: the grid, the settings of an arm, or an existing folder is wrong.
    """
    base, problems = load_config(request.cfg, request.overrides)
    raise_if_any([*problems, *check_validation(base), *check_name(request.name)])
    variations = parse_variations(request.vary)
    raise_if_any(check_overrides(variations, request.overrides))
    arms = build_arms(variations, request.baseline)
    folder = base.run.dir / (request.name or f"{base.run.name}-ablation")
    common = [*request.overrides, f"run.dir={json.dumps(str(folder), ensure_ascii=False)}", "run.resume=auto"]
    if request.budget_steps:
        common += [f"train.max_steps={request.budget_steps}", "train.max_epochs=null"]
    runs = [
        PlannedRun(
            arm=arm,
            seed=seed,
            folder=folder / f"{arm.name}-seed-{seed}",
            words=[*common, *arm.words, f"run.name={arm.name}-seed-{seed}", f"run.seed={seed}"],
        )
        for seed in range(base.run.seed, base.run.seed + request.num_seeds)
        for arm in arms
    ]
    configs, found = {}, []
    for run in runs:
        config, problems = load_config(request.cfg, run.words)
        if run.seed == base.run.seed and not problems:  # the seeds of an arm have the same problems
            problems = list(check_settings(config, num_ranks))
        of_arm = [replace(problem, key=f"{run.arm.label}: {problem.key}") for problem in problems]
        found += [problem for problem in of_arm if problem not in found]
        configs[run.folder] = config
    raise_if_any(found or check_different(arms, [configs[run.folder] for run in runs[: len(arms)]]))
    raise_if_any(problem for run in runs for problem in check_folder(run, configs[run.folder]))
    num_steps = request.budget_steps or base.train.max_steps
    return Plan(cfg=request.cfg, folder=folder, arms=arms, runs=runs, num_steps=num_steps)


def check_name(name: str) -> Iterator[Problem]:
    """Yield a problem if a name is no name of a folder in `run.dir`."""
    if name and not re.fullmatch(NAME_PATTERN, name):
        rule = "is not a name of a folder: letters, digits, . _ and -, and no other folder"
        yield Problem("--name", name, rule, "choose a name; run.dir=FOLDER chooses the folder that contains it")


def check_overrides(variations: Sequence[Variation], overrides: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each word that gives one value to a setting that varies."""
    varied = {rename_key(variation.key) for variation in variations}
    for word in overrides:
        if rename_key(word.partition("=")[0]) in varied:
            rule = "is a setting that varies, whose values --vary lists"
            yield Problem("key.sub=value", word, rule, "leave it out; --baseline chooses the value to compare with")


def check_different(arms: Sequence[GridArm], configs: Sequence[Config]) -> Iterator[Problem]:
    """Yield a problem for arms whose settings are equal, such as two spellings of one number.

    Args:
        configs: of the arms, with one seed.
    """
    names: dict[str, str] = {}
    for arm, config in zip(arms, configs, strict=True):
        settings = flatten_settings(config.model_dump(mode="json"))
        learned = json.dumps([pair for pair in settings if not pair[0].startswith(NEUTRAL_SETTINGS)])
        if learned in names:
            rule = f"needs two different values or more: its settings are those of {names[learned]}"
            yield Problem("--vary", arm.label, rule, "leave one of the two out")
        names.setdefault(learned, arm.label)


def check_validation(config: Config) -> Iterator[Problem]:
    """Yield a problem if the runs would have nothing that they can be compared by."""
    if not (config.validation.share or config.validation.has_own_set):
        rule = "is 0: without validation there is nothing to compare the runs by"
        yield Problem("validation.share", 0, rule, "set validation.share: 0.05 and validation.every_steps")


def check_settings(config: Config, num_ranks: int) -> Iterator[Problem]:
    """Yield the problems of an arm's settings that need neither data nor weights."""
    yield from check_model_settings(config)
    yield from check_rank_settings(config, num_ranks)
    yield from check_run_settings(config)


def check_folder(run: PlannedRun, config: Config) -> Iterator[Problem]:
    """Yield a problem if the folder of a run holds one with other settings.

    A larger budget continues only runs with a constant rate. Any other rate has fallen by the end of the smaller
    budget, so that these runs would differ from those that begin with the larger one.
    """
    existing, own = read_settings(run.folder / "config.yaml"), dict(flatten_settings(config.model_dump(mode="json")))
    cure = "choose another --name, or delete the folder"
    for key, value in existing.items():
        is_neutral = (key == EXTENDED and config.optim.schedule == "constant") or key.startswith(NEUTRAL_SETTINGS)
        if not is_neutral and own.get(key, value) not in (value, *RESOLVED_LATER):
            rule = f"was begun with {key}: {value}, and that is {own[key]} now"
            if key == EXTENDED:
                rule = (
                    f"was begun with {value} steps, for which optim.schedule: {config.optim.schedule} lowers the rate"
                )
            yield Problem("--name", run.folder, rule, cure)
            return
