"""Ablations: the grid, the rule that stops arms, what is refused, and one that really trains."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from programs import run_program

from sdxl_trainer.configs.load import dump_config, load_config
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.ablation.grid import build_arms, parse_variations
from sdxl_trainer.train.ablation.hopeless import find_hopeless
from sdxl_trainer.train.ablation.plan import Request, plan_runs
from sdxl_trainer.train.ablation.training import estimate_rest, read_share, read_state
from sdxl_trainer.train.held_out.sample_errors import WEIGHTS, Facts, SampleError, list_files, write_sample_errors

PROGRAM = "train/ablation/__main__.py"


def test_values_are_combined_with_the_baseline_first() -> None:
    variations = parse_variations(["optim.lr=1e-5,2e-5", "optim.betas=[0.9, 0.99],[0.9, 0.999]"])
    assert variations[1].values == ("[0.9, 0.99]", "[0.9, 0.999]")
    arms = build_arms(variations, ["optim.lr=2e-5"])
    assert [arm.label for arm in arms] == [
        "optim.lr=2e-5 optim.betas=[0.9, 0.99]",
        "optim.lr=2e-5 optim.betas=[0.9, 0.999]",
        "optim.lr=1e-5 optim.betas=[0.9, 0.99]",
        "optim.lr=1e-5 optim.betas=[0.9, 0.999]",
    ]
    assert [arm.name for arm in arms[:2]] == ["lr-2e-5_betas-0.9-0.99", "lr-2e-5_betas-0.9-0.999"]


def test_values_without_an_own_file_name_are_numbered() -> None:
    arms = build_arms(parse_variations(["objective.timestep_density=[1,2],[1 2]"]))
    assert [arm.name for arm in arms] == ["timestep_density-1-2-1", "timestep_density-1-2-2"]


@pytest.mark.parametrize(
    "word, rule",
    [
        ("optim.lr", "is not a setting with its values"),
        ("optim.lr=1e-5", "needs two different values"),
        ("optim.lr=1e-5,1e-5", "needs two different values"),
        ("optim.lr=1e-5,", "needs two different values"),
        ("run.seed=1,2", "belongs to the ablation"),
        ("validation.seed=1,2", "must be the same in all runs"),
        ("sample.sampler=euler,ddim", "changes nothing that a run learns"),
        ("log.level=INFO,DEBUG", "changes nothing that a run learns"),
        ("checkpoint.keep_last=1,2", "changes nothing that a run learns"),
        ("ema.decays=[0.9],[0.99]", "changes only the moving averages"),
        ("train.max_steps=10,20", "must be the same in all runs"),
    ],
)
def test_a_variation_that_cannot_be_is_refused(word: str, rule: str) -> None:
    with pytest.raises(UserInputError, match=rule):
        parse_variations([word])


def test_a_baseline_outside_the_grid_is_refused() -> None:
    variations = parse_variations(["optim.lr=1e-5,2e-5"])
    with pytest.raises(UserInputError, match="is not in the grid"):
        build_arms(variations, ["optim.lr=3e-5"])
    with pytest.raises(UserInputError, match="names no setting that varies"):
        build_arms(variations, ["optim.eps=1e-8"])


def write_validations(folder: Path, factors: dict[int, float], spread: float = 0.01) -> Path:
    """Write validations by their steps, with errors of 40 samples around a factor."""
    for step, factor in factors.items():
        random = np.random.default_rng([step, len(folder.name)])
        errors = [
            SampleError(f"key-{n}", Size(64, 64), 0, 0, 500.0, 0.0, 1.0, value, value, value)
            for n, value in enumerate((factor * (1 + spread * random.standard_normal(40))).tolist())
        ]
        facts = Facts(step=step, samples_seen=step, seed=0, timesteps_per_sample=1, prediction="v")
        write_sample_errors(folder, {WEIGHTS: errors}, facts)
    return folder


def test_an_arm_is_hopeless_after_two_validations_far_above_the_baseline(tmp_path: Path) -> None:
    base = write_validations(tmp_path / "base", {10: 1.0, 20: 0.9, 30: 0.8, 40: 0.7})

    def judge(name: str, factors: dict[int, float], spread: float = 0.01):
        return find_hopeless(write_validations(tmp_path / name, factors, spread), base, num_steps=80)

    found = judge("worse", {10: 1.0, 20: 1.2, 30: 1.2})
    assert found is not None and found.step == 30
    assert found.excess == pytest.approx(0.5, abs=0.02) and found.low == pytest.approx(0.5, abs=0.05)
    assert (
        judge("early", {10: 9.0}) is None and judge("early-2", {10: 9.0, 20: 9.0}) is None
    )  # within the first quarter
    assert judge("once", {20: 0.9, 30: 1.2}) is None and judge("recovers", {20: 1.2, 30: 0.8}) is None
    assert judge("close", {20: 0.98, 30: 0.87}) is None  # 9 % above
    assert judge("unsure", {20: 1.2, 30: 1.2}, spread=3.0) is None
    found = judge("diverged", {10: float("nan")})
    assert found is not None and found.excess is None and found.step == 10


@pytest.fixture
def settings(cached_folder: Path, tmp_path: Path) -> Path:
    """The tiny settings with a validation in every step."""
    config = yaml.safe_load((cached_folder / "tiny.yaml").read_text())
    config["run"]["dir"] = str(tmp_path / "runs")
    config["validation"] = {"share": 0.3, "every_steps": 1, "timesteps_per_sample": 2}
    config["checkpoint"] = {"every_steps": 0}
    config["sample"] = {"prompts": []}
    config["optim"] = {"lr": 1e-3}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_settings_of_every_arm_are_checked_before_the_first_run(settings: Path) -> None:
    request = Request(cfg=settings, vary=["objective.prediction=epsilon,v", "objective.weighting=none,v_like_epsilon"])
    with pytest.raises(UserInputError) as caught:
        plan_runs(request, num_ranks=1)
    assert [problem.key for problem in caught.value.problems] == [
        "objective.prediction=epsilon objective.weighting=v_like_epsilon: objective.weighting"
    ]
    with pytest.raises(UserInputError, match="without validation there is nothing to compare"):
        plan_runs(Request(cfg=settings, vary=["optim.lr=1,2"], overrides=["validation.share=0"]), num_ranks=1)


def refuse(settings: Path, *vary: str, **fields) -> str:
    with pytest.raises(UserInputError) as caught:
        plan_runs(Request(cfg=settings, vary=vary, **fields), num_ranks=1)
    return str(caught.value)


def test_a_grid_that_cannot_be_is_refused(settings: Path) -> None:
    message = refuse(settings, "foo.bar=1,2")
    assert "is not a known key" in message and message.count("foo.bar=1: ") == 1
    message = refuse(settings, "optim.lr=1e-4,1.0e-4,2e-4")
    assert "needs two different values" in message and "those of optim.lr=1e-4" in message and "2e-4" not in message
    assert "is a setting that varies" in refuse(settings, "optim.lr=1e-4,2e-4", overrides=["optim.lr=3e-4"])
    for name in ("../x", "a/b", "/x", ".."):
        assert "is not a name of a folder" in refuse(settings, "optim.lr=1e-4,2e-4", name=name)
    assert plan_runs(Request(cfg=settings, vary=["optim.lr=1e-4,2e-4"], name="x.1"), num_ranks=1).folder.name == "x.1"


@pytest.mark.parametrize(("schedule", "is_refused"), [("constant", False), ("cosine", True)])
def test_a_larger_budget_extends_runs_of_a_constant_rate(settings: Path, schedule: str, is_refused: bool) -> None:
    """Runs that continue after their rate has fallen would differ from those that begin with the larger budget."""
    words = {"vary": ["optim.lr=1,2"], "overrides": [f"optim.schedule={schedule}"]}
    for run in plan_runs(Request(cfg=settings, budget_steps=3, **words), num_ranks=1).runs:
        (run.folder / "logs").mkdir(parents=True)
        (run.folder / "config.yaml").write_text(dump_config(load_config(settings, run.words)[0]))
        status = {"state": "finished", "step": 3, "max_steps": 3}
        (run.folder / "logs" / "status.json").write_text(json.dumps(status))
    assert read_share(run, 3) == 1 and read_share(run, 6) == 0.5
    if is_refused:
        message = "was begun with 3 steps, for which optim.schedule: cosine lowers the rate"
        assert message in refuse(settings, *words.pop("vary"), budget_steps=6, **words)
    else:
        assert plan_runs(Request(cfg=settings, budget_steps=6, **words), num_ranks=1).num_steps == 6


def test_the_time_left_counts_whole_runs() -> None:
    assert estimate_rest(60.0, trained=0.5, shares=[0.5, 0, 0]) == 300
    assert estimate_rest(60.0, trained=1.5, shares=[0.5, 0.25]) == 50
    assert estimate_rest(60.0, trained=0.0, shares=[0.0, 0, 0]) is None
    assert estimate_rest(60.0, trained=2.0, shares=[]) is None


def test_a_hopeless_arm_is_stopped_and_the_same_command_goes_on(settings: Path) -> None:
    words = ("--cfg", settings, "--vary", "optim.lr=1e-3,5e-1", "--seeds", 1, "--budget-steps")
    printed = run_program(PROGRAM, *words, 3)
    folder = settings.parent / "runs" / "tiny-ablation"
    assert list(list_files(folder / "lr-1e-3-seed-0")) == [1, 2, 3]
    assert "optim.lr=5e-1 is hopeless" in printed and printed.count("run 1 of 2") == 1
    assert list(read_state(folder / "ablation.json").hopeless) == ["lr-5e-1"]
    table = [line.split() for line in printed.splitlines()]
    (baseline,) = (line for line in table if line[:3] == ["optim.lr=1e-3", "1", "baseline"])
    assert float(baseline[3]) > 0 and baseline[4] == "3"  # v error and steps, though nothing is compared with it
    assert "no comparison and no comparison.html: they need two arms" in printed and "1 arm finished" in printed
    assert "left for the runs that are not finished" in printed
    again = run_program(PROGRAM, *words, 3)
    assert "run 1 of 2" not in again and "optim.lr=5e-1 is hopeless" in again
    assert "was begun with objective.loss: l2" in run_program(PROGRAM, *words, 3, "objective.loss=l1", expect=2)
