"""Your own optimizer, schedule, loss and weighting: loaded by file, tried at the start, and compared by a resume."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from programs import ROOT

from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.order.plan import Plan
from sdxl_trainer.data.own_code import load_own_code
from sdxl_trainer.train.checkpoint import resume
from sdxl_trainer.train.checkpoint.resume import hash_code_of_settings, restore_progress
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.objective.diffusion import LatentStatistics
from sdxl_trainer.train.objective.objective import Objective
from sdxl_trainer.train.objective.own_formulas import check_own_formulas
from sdxl_trainer.train.optim.optimizers import build_optimizer, check_optimizer
from sdxl_trainer.train.optim.schedules import check_own_schedule, compute_lr

PAGE = (ROOT / "docs" / "OWN_CODE.md").read_text()


def list_own_problems(config: Config) -> list[str]:
    found = [*check_optimizer(config.optim, config.engine), *check_own_schedule(config.optim)]
    return [
        f"{problem.key}: {problem.rule}; {problem.cure}" for problem in (*found, *check_own_formulas(config.objective))
    ]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Config:
    """Return the settings of the page's examples together."""
    monkeypatch.chdir(ROOT)
    raw: dict[str, dict] = {"optim": {}, "objective": {}}
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        for section, settings in yaml.safe_load(block).items():
            raw[section] |= settings
    assert (loss := "docs/examples/own_formulas.py:log_cosh") in PAGE
    config, problems = build_config(raw, ["engine.zero_stage=0", f"objective.loss={loss}"])
    assert problems == []
    return config


def test_the_examples_of_the_page_do_what_it_says(examples: Config) -> None:
    assert list_own_problems(examples) == []
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    weight.grad = torch.tensor([3.0, -4.0])
    groups = [{"params": [weight], "lr": 0.5, "lr_scale": 1.0, "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, examples.optim, examples.engine)
    assert type(optimizer).__name__ == "SignSGD" and optimizer.param_groups[0]["momentum"] == 0.95
    optimizer.step()
    assert weight.tolist() == [0.5, -1.5]
    # 100 steps of warm-up, then |cos| over a thousand steps each
    rates = [compute_lr(step, examples.optim, 2100) / examples.optim.lr for step in (49, 100, 600, 1100)]
    assert rates == pytest.approx([0.5, 1.0, 0.1, 1.0])
    objective = Objective(examples.objective, LatentStatistics(torch.zeros(1), torch.ones(1)), 2)
    prediction, timesteps = torch.full((2, 4, 2, 2), 3.0), torch.tensor([10, 900])
    snr = objective._process.compute_snr(timesteps)
    expected = math.log(math.cosh(3.0)) / (1 + (snr / 5).log().square())
    losses = objective.compute_losses(prediction, torch.zeros_like(prediction), timesteps)
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "code", "expected"),
    [
        ("optim.name", "class Own: pass", "is no torch.optim.Optimizer"),
        ("optim.name", "import torch\nclass Own(torch.optim.SGD):\n    def step(self): 1 / 0", "ZeroDivisionError"),
        ("optim.name", "class own: pass", "has no class Own; did you mean own?"),
        ("optim.name", "import nowhere_at_all", "No module named 'nowhere_at_all'"),
        ("optim.schedule", "def Own(progress): return -1", "returned -1 at progress 0, which is not a number of 0 or"),
        ("optim.schedule", "def Own(): return 1", "takes 0 positional arguments"),
        ("optim.schedule", "Own = 3", "needs a function, but Own is of type int; write one, as docs/OWN_CODE.md shows"),
        ("optim.name", "def Own(): pass", "needs a class, but Own is of type function; write a class with the methods"),
        (
            "objective.loss",
            "def Own(prediction, target): return (prediction - target).mean()",
            "the shape [] for [3, 4,",
        ),
        ("objective.loss", "def Own(prediction, target): return target", "do not depend on the prediction"),
        ("objective.weighting", "def Own(snr): return snr.log()", "returned a negative weight"),
        ("objective.weighting", "def Own(snr): return snr / 0", "values that are not finite"),
        ("objective.weighting", "def Own(snr): return 1.0", "returned float, not a tensor with the weight of each"),
    ],
)
def test_a_fault_in_the_code_is_found_at_the_start(tmp_path: Path, setting: str, code: str, expected: str) -> None:
    (tmp_path / "own.py").write_text(code)
    config, problems = build_config({}, [f"{setting}={tmp_path}/own.py:Own"])
    assert problems == []
    [problem] = list_own_problems(config)
    assert problem.startswith(f"{setting}: ") and expected in problem, problem


def test_a_module_and_a_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_rates.py").write_text("def fall(progress): return 1 - progress")
    monkeypatch.syspath_prepend(tmp_path)
    config, _ = build_config({}, ["optim.schedule=my_rates:fall"])
    assert list_own_problems(config) == [] and compute_lr(5, config.optim, 10) == pytest.approx(0.5e-5)
    assert load_own_code("optim.name", "torch.optim:SGD").target is torch.optim.SGD
    config, _ = build_config({}, ["optim.schedule=my_rate:fall"])
    assert "names a module that does not exist: my_rate" in list_own_problems(config)[0]


def test_a_resume_names_own_code_that_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text("def fall(progress): return 1 - progress")
    (tmp_path / "tags.csv").write_text("kitty,cat")
    words = [f"optim.schedule={tmp_path}/own.py:fall", f"data.caption.aliases={tmp_path}/tags.csv"]
    settings = build_config({}, words)[0].model_dump(mode="json")
    saved = TrainState(step=7, config=settings, own_code=hash_code_of_settings(settings))
    assert list(saved.own_code) == ["optim.schedule", "data.caption.aliases"]
    warnings: list[str] = []
    monkeypatch.setattr(resume, "warn_once", lambda text, *values: warnings.append(text.format(*values)))
    plan = Plan(torch.zeros(8).long().numpy(), 4, 0, None)
    for code, expected in (("1 - progress", []), ("0.5", ["the file of optim.schedule has changed since step 7"])):
        (tmp_path / "own.py").write_text(f"def fall(progress): return {code}")
        fresh = TrainState(config=settings, own_code=hash_code_of_settings(settings))
        assert restore_progress(saved, fresh, plan, "stop").own_code == fresh.own_code
        assert warnings == expected
    (tmp_path / "tags.csv").write_text("kitty,dog")
    fresh = TrainState(config=settings, own_code=hash_code_of_settings(settings))
    restore_progress(saved, fresh, plan, "stop")
    assert warnings[-1] == "the file of optim.schedule and data.caption.aliases has changed since step 7"
