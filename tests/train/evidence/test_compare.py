"""Comparison of runs that are written by hand: what is paired, what is refused, and both verdicts."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import NO_BROWSER, visit
from PIL import Image

from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.evidence.comparison import BETTER, UNDECIDED, WORSE, Comparison, Options, compare_runs
from sdxl_trainer.train.evidence.program import main
from sdxl_trainer.train.evidence.runs import form_arms, open_runs
from sdxl_trainer.train.held_out.sample_errors import WEIGHTS, Facts, SampleError, write_sample_errors
from sdxl_trainer.train.sampling.image_grid import write_image

LOG_SNRS = (-5.0, -1.0, 1.0, 5.0)


def write_run(
    folder: Path,
    seed: int = 0,
    lr: str = "1e-5",
    effect: float = 0.0,
    steps: tuple[int, ...] = (10, 20),
    batch: int = 4,
    keys: range = range(40),
    validation_seed: int = 0,
    **fields: float,
) -> Path:
    """Write a run whose error of v is 1 + effect times a number of each sample, within 1 % by the seed."""
    settings = {"run": {"name": folder.name, "seed": seed}, "optim": {"lr": lr}, "objective": {"prediction": "v"}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "logs").mkdir()
    lines = [json.dumps({"step": step, "step_seconds": batch / 4}) for step in range(1, max(steps) + 1)]
    (folder / "logs" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    of_run = np.random.default_rng([seed, len(lr), ord(lr[-1])])
    level = (1 + effect) * (1 + 0.01 * of_run.standard_normal())
    errors = []
    for number in keys:
        of_sample = np.random.default_rng(number)
        for turn, log_snr in enumerate(LOG_SNRS):
            v_error = 0.5 * of_sample.lognormal(0, 0.3) * level * (1 + 0.01 * of_run.standard_normal())
            error = SampleError(
                key=f"key-{number}",
                bucket=Size(64, 32) if number % 2 else Size(32, 64),
                source=0,
                turn=turn,
                timestep=200.0 * turn,
                log_snr=log_snr + fields.get("log_snr_shift", 0),
                x0_power=1.0 if number >= fields.get("num_other_latents", 0) else 1.1,
                loss=v_error,
                x0_error=v_error / (1 + np.exp(log_snr)),
                v_error=v_error,
            )
            errors.append(error)
    for step in steps:
        facts = Facts(
            step=step, samples_seen=batch * step, seed=validation_seed, timesteps_per_sample=4, prediction="v"
        )
        write_sample_errors(folder, {WEIGHTS: errors}, facts)
    return folder


def compare(*folders: Path, **options) -> Comparison:
    return compare_runs(open_runs(folders), Options(groups=options.pop("groups", {}), **options))


def test_three_seeds_judge_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    low = [write_run(tmp_path / f"low-{seed}", seed=seed) for seed in range(3)]
    high = [write_run(tmp_path / f"high-{seed}", seed=seed, lr="1e-3", effect=0.2) for seed in range(3)]
    found = compare(*low, *high, groups={f"key-{number}": "tags" for number in range(20)})
    (arm,) = found.arms
    assert (found.baseline, arm.arm) == ("optim.lr=0.00001", "optim.lr=0.001") and found.num_samples == 40
    assert arm.setting.verdict == WORSE and arm.setting.seeds == (3, 3) and arm.setting.is_paired
    assert arm.setting.low is not None and 0 < arm.setting.low < arm.setting.difference
    assert arm.setting.difference == pytest.approx(0.2 * arm.weights.baseline, rel=0.15)
    assert arm.weights.verdict == WORSE and arm.weights.low < arm.weights.difference < arm.weights.high
    assert [line.name for line in arm.by_noise] == ["-6 … -4", "-2 … 0", "0 … 2", "4 … 6"]
    assert {line.verdict for line in arm.by_noise} == {WORSE} and arm.by_source == []
    assert [(line.name, line.num_samples) for line in arm.by_bucket] == [("32x64", 20), ("64x32", 20)]
    assert [(line.name, line.num_samples) for line in arm.by_group] == [("other", 20), ("tags", 20)]
    assert list(found.settings) == ["optim.lr"] and set(found.steps.values()) == {20}
    assert [curve.steps for curve in found.curves] == [[10, 20]] * 6
    assert compare(*high, *low).arms[0].setting.verdict == BETTER
    # By noise level x0 says the same as v: the errors differ by a factor.
    shares = [
        [line.difference / line.baseline for line in compare(*low, *high, error=e).arms[0].by_noise]
        for e in "v x0".split()
    ]
    np.testing.assert_allclose(shares[0], shares[1], rtol=1e-4)
    assert main([str(folder) for folder in (*low, *high)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("optim.lr=0.001: worse (+") and lines[0].endswith("3 and 3 seeds, in pairs)")
    assert lines[1].startswith("  these weights are worse (+")
    assert main([str(folder) for folder in (*low, *high)] + ["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"][0]["setting"]["verdict"] == "worse"


def test_a_grid_has_a_table_of_effects_and_many_arms_leave_theirs_to_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Shown are the effects of a grid of 2 x 3; with 2 x 2 also the tables of each arm."""
    runs = {
        (lr, batch): [write_run(tmp_path / f"{lr}-{batch}-{seed}", seed=seed, lr=lr) for seed in range(3)]
        for lr in ("1e-5", "1e-3")
        for batch in ("2", "4", "8")
    }
    for (_, batch), folders in runs.items():
        for folder in folders:
            with open(folder / "config.yaml", "a") as file:
                file.write(f"train: {{global_batch_size: {batch}}}\n")
    for batches, has_tables in ((("2", "4"), True), (("2", "4", "8"), False)):
        folders = [folder for (_, batch), group in runs.items() for folder in group if batch in batches]
        assert main([*map(str, folders), "--out", str(tmp_path / "page.html")]) == 0
        lines = capsys.readouterr().out.splitlines()
        place = lines.index("Effect of each setting, averaged over the others")
        effects = [line.split() for line in lines[place + 2 : place + 2 + len(batches)]]
        assert effects[0][:3] == ["optim.lr=0.001", "0.00001", str(len(batches))]
        assert [effect[:3] for effect in effects[1:]] == [
            [f"train.global_batch_size={b}", "2", "2"] for b in batches[1:]
        ]
        assert ("optim.lr=0.001 train.global_batch_size=2, by noise level, ln(SNR)" in lines) == has_tables
        assert ("the page has the tables of each arm by noise level and bucket" in lines) != has_tables
        page = (tmp_path / "page.html").read_text()
        assert "averaged over the others</h2>" in page
        assert page.count("by noise level, ln(SNR)</h3>") == 2 * len(batches) - 1
        assert "without an interval" not in page
    two_seeds = [folder for (_, batch), group in runs.items() for folder in group[:2] if batch != "8"]
    assert "effects of settings without an interval: 2 seeds" in compare(*two_seeds).notes


def test_one_seed_judges_weights_but_no_setting(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", lr="1e-3", effect=-0.2)
    (arm,) = compare(one, two).arms
    assert (arm.setting.verdict, arm.setting.reason, arm.setting.needed_seeds) == (UNDECIDED, "one seed", 3)
    assert arm.weights.verdict == BETTER
    assert main([str(one), str(two)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("optim.lr=0.001: undecided: one seed (-")
    assert lines[1] == "  at least 3 seeds of each arm are needed"
    namesake = write_run(tmp_path / "other" / "one", lr="1e-3")
    assert list(compare(one, namesake).steps) == [str(one), str(namesake)]
    # Runs that differ only in their seeds form no arms.
    third = write_run(tmp_path / "third", seed=1)
    assert [arm.label for arm in form_arms(open_runs([one, third]))] == ["one", "third"]
    assert "only their weights are compared" in " ".join(compare(one, third).notes)


def test_small_effects_stay_undecided_and_say_what_would_decide(tmp_path: Path) -> None:
    first = [write_run(tmp_path / f"a-{seed}", seed=seed) for seed in range(3)]
    second = [write_run(tmp_path / f"b-{seed}", seed=seed + 5, lr="2e-5", effect=0.01) for seed in range(3)]
    setting = compare(*first, *second).arms[0].setting
    assert setting.verdict == UNDECIDED and not setting.is_paired and setting.needed_seeds is not None
    assert 3 < setting.needed_seeds <= 100


def test_runs_are_compared_on_what_they_share(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole")
    part = write_run(tmp_path / "part", lr="1e-3", keys=range(10, 50), steps=(20, 30))
    found = compare(whole, part)
    assert found.num_samples == 30 and set(found.steps.values()) == {20}
    assert found.notes[0] == "compared on 30 of 50 samples: the others are not in all runs"
    others = write_run(tmp_path / "others", lr="1e-3", num_other_latents=15)
    found = compare(whole, others)
    assert found.num_samples == 25 and "15 samples left out, whose latents differ" in found.notes[0]
    shifted = write_run(tmp_path / "shifted", lr="1e-3", log_snr_shift=2)
    found = compare(whole, shifted)
    assert [line.name for line in found.arms[0].by_noise] == ["0 … 2"] and "other timesteps" in found.notes[0]


def test_timesteps_of_samples_that_are_not_shared_do_not_count(tmp_path: Path) -> None:
    half = write_run(tmp_path / "half", keys=range(20))
    found = compare(write_run(tmp_path / "whole", lr="1e-3"), half)
    assert found.num_samples == 20 and found.notes == ["compared on 20 of 40 samples: the others are not in all runs"]


def test_groups_and_lines_that_are_missing_are_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one", keys=range(0, 9)), write_run(tmp_path / "two", lr="1e-3", keys=range(0, 9))]
    assert "of 1 key in --groups, none is" in compare(*runs, groups={"nothing": "a"}).notes[-1]
    found = compare(*runs, groups={"key-0": "a", "key-1": "b", "key-2": "b"})
    assert [line.name for line in found.arms[0].by_group] == ["b", "other"]
    assert found.notes == ["without a line, because they have one sample: caption group a"]
    found = compare(*runs, groups={f"key-{number}": "all" for number in range(9)})
    assert found.notes == ["there is no table by caption group: all samples belong to the group all"]
    pair = [write_run(tmp_path / name, lr=lr, keys=range(1, 4)) for name, lr in (("five", "1e-5"), ("six", "1e-3"))]
    assert compare(*pair).notes == ["without a line, because they have one sample: bucket 32x64"]


@pytest.mark.parametrize(
    ("fields", "options", "text"),
    [
        ({"validation_seed": 1}, {}, "validation.seed = 'whole: 0, other: 1'"),
        ({"keys": range(50, 60)}, {}, "have no validation sample in common"),
        ({"num_other_latents": 40}, {}, "holds other latents in each run"),
        ({"log_snr_shift": 50}, {}, "leads to no noise level"),
        ({"steps": (30,)}, {}, "finds no validation that all runs have in common"),
        ({}, {"average": "0.9"}, "validated with: weights(.|\n)*choose one of weights, or train with ema.decays"),
    ],
)
def test_runs_that_share_nothing_are_refused(tmp_path: Path, fields: dict, options: dict, text: str) -> None:
    whole, other = write_run(tmp_path / "whole"), write_run(tmp_path / "other", lr="1e-3", **fields)
    with pytest.raises(UserInputError, match=text):
        compare(whole, other, **options)


def test_equal_samples_and_equal_time(tmp_path: Path) -> None:
    small = write_run(tmp_path / "small", steps=(10, 20, 40))
    large = write_run(tmp_path / "large", lr="1e-3", batch=8, steps=(10, 20, 30))
    assert compare(small, large).steps == {"small": 20, "large": 20}
    assert compare(small, large, axis="samples").steps == {"small": 40, "large": 20}
    found = compare(small, large, axis="time")  # 40 steps of 1 s, and 20 of 2 s
    assert found.steps == {"small": 40, "large": 20} and "at different steps" in found.notes[-1]


def test_wrong_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "run")
    other = write_run(tmp_path / "other", lr="1e-3")
    (tmp_path / "empty").mkdir()
    assert main([str(run), str(tmp_path / "empty")]) == 2
    assert "is not a run folder: it contains no config.yaml" in capsys.readouterr().err
    (tmp_path / "groups.json").write_text("[1]")
    assert main([str(run), str(other), "--groups", str(tmp_path / "groups.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), str(other), "--groups", str(tmp_path / "groups.json")]) == 2
    message = capsys.readouterr().err
    assert "cannot be read" in message and "contains no config.yaml" in message
    file = tmp_path / "groups.json"
    for place, rule in (
        (tmp_path, "is a folder"),
        (file / "x.html", "is a file"),
        ("/proc/x.html", "cannot be written"),
    ):
        assert main([str(run), str(other), "--out", str(place)]) == 2
        message = capsys.readouterr().err
        assert "--out" in message and rule in message
    (other / "logs" / "validation" / "step-00000020.parquet").write_bytes(b"PAR1")
    assert main([str(run), str(other)]) == 2
    assert "step-00000020.parquet holds no validation errors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(run)])


@pytest.mark.skipif(bool(NO_BROWSER), reason=str(NO_BROWSER))
def test_the_page_shows_all_and_loads_nothing(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", lr="<b>1e-3", effect=0.2)]
    for run in runs:
        write_image(run / "samples" / "step-00000010" / "000.png", Image.new("RGB", (64, 64)), "a cat")
    assert main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    (view,) = visit([(tmp_path / "page.html", "light")])
    assert view.complaints == [] and view.requests == [(tmp_path / "page.html").as_uri()] and not view.overflow
    assert len(view.images) == 2 + 2 and all(image["width"] > 50 for image in view.images)  # charts, generated images
    assert view.title == "Comparison of runs"
