"""Validation and generated images: the same on any number of ranks, and without effect on training."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import IN_EACH_STEP, MIXED_PROMPTS, list_validation_words, run_program

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.checks.validation_set import (
    check_held_out,
    derive_validation_config,
    find_held_out_rows,
    open_validation_set,
)
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.loading.loader import build_plan
from sdxl_trainer.data.order.plan import Position
from sdxl_trainer.data.order.split import exclude_rows
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.launch.signals import BrokenOff
from sdxl_trainer.train.held_out.sample_errors import WEIGHTS, SampleError, get_file, list_files, read_sample_errors
from sdxl_trainer.train.objective.diffusion import LatentStatistics
from sdxl_trainer.train.objective.objective import Objective, SampleKeys
from sdxl_trainer.train.report.metrics import read_metrics
from sdxl_trainer.train.run.validation import average_losses, spread_timesteps
from sdxl_trainer.train.sampling.job import load_image_generator, run_sampling
from sdxl_trainer.train.sampling.pipeline import generate_images
from sdxl_trainer.train.sampling.prompts import load_prompts


def read_numbers(run: Path, name: str) -> list[dict]:
    return list(read_metrics(run / "logs" / "metrics.jsonl", metric=name))


def test_training_is_not_affected(validated: dict[int, Path], one_rank: Path) -> None:
    alone = [line["loss"] for line in read_numbers(one_rank, "loss")][:2]
    assert [line["loss"] for line in read_numbers(validated[1], "loss")] == alone
    np.testing.assert_allclose([line["loss"] for line in read_numbers(validated[2], "loss")], alone, rtol=0, atol=1e-5)


def test_the_validation_loss_is_the_same_on_any_number_of_ranks(validated: dict[int, Path]) -> None:
    one, two = (read_numbers(validated[ranks], "validation/loss") for ranks in (1, 2))
    assert [line["step"] for line in one] == [0, 1, 2] and len({line["validation/loss"] for line in one}) == 3
    for first, second in zip((one[0], one[2]), two, strict=True):
        assert first.keys() == second.keys() and any("128x128" in name for name in first)
        for name, value in first.items():  # trained weights agree only to rounding
            assert value == pytest.approx(second[name], rel=1e-6 if first["step"] == 0 else 1e-5), name
    bins = {name: value for name, value in one[0].items() if re.fullmatch(r"validation/loss_t[\d-]+", name)}
    assert 6 <= len(bins) <= 10 and min(bins.values()) < one[0]["validation/loss"] < max(bins.values())


def test_averages_are_validated_beside_the_weights(validated: dict[int, Path]) -> None:
    first, _, last = read_numbers(validated[1], "validation/loss")
    names = {name for name in first if name.startswith("validation/") and "_ema_" not in name}
    averages = ("0.5", "length-0.1")
    assert len(names) > 8 and {name for name in first if "_ema_" in name} == {
        f"{name}_ema_{average}" for name in names for average in averages
    }
    for average in averages:  # they start as copies of the weights
        assert all(first[f"{name}_ema_{average}"] == first[name] for name in names)
        assert all(last[f"{name}_ema_{average}"] != last[name] for name in names)


def test_errors_of_each_sample_are_the_same_on_any_number_of_ranks(validated: dict[int, Path]) -> None:
    assert list(list_files(validated[1])) == [0, 1, 2] and list(list_files(validated[2])) == [0, 2]
    for step in (0, 2):
        (facts, one), (other_facts, two) = (read_sample_errors(get_file(validated[ranks], step)) for ranks in (1, 2))
        assert facts == other_facts and (facts.step, facts.samples_seen) == (step, 4 * step)
        assert len(one["key"]) == 7 * 2 * 3 and set(one["key"]) == {f"own_{number}" for number in range(7)}
        for name, values in one.items():
            if values.dtype.kind != "f":
                assert values.tolist() == two[name].tolist(), name
            else:  # trained weights agree only to rounding
                np.testing.assert_allclose(values, two[name], rtol=1e-5 if step == 0 else 1e-4, err_msg=name)
        is_average = one["average"] == "0.5"
        of_weights = one["average"] == WEIGHTS
        assert set(one["average"]) == {WEIGHTS, "0.5", "length-0.1"} and is_average.sum() == of_weights.sum() == 14
        assert (one["v_error"][is_average] == one["v_error"][of_weights]).all() == (step == 0)
        metrics = next(line for line in read_numbers(validated[1], "validation/loss") if line["step"] == step)
        assert one["loss"][of_weights].astype(float).mean() == pytest.approx(metrics["validation/loss"], rel=1e-6)
        # An error e of epsilon is e/snr in x0 and e·(1 + 1/snr) in v.
        snr = np.exp(one["log_snr"].astype(float))
        np.testing.assert_allclose(one["v_error"], one["x0_error"] * (1 + snr), rtol=1e-4)


STOPPING = """
from pathlib import Path

RUN = Path({run!r})


def square(prediction, target):
    if (RUN / "logs" / "validation" / "step-00000000.parquet").exists() and not (RUN / "asked").exists():
        (RUN / "asked").touch()
        (RUN / "stop").touch()
    return (prediction - target) ** 2
"""


def test_a_run_that_was_stopped_stores_the_same_errors_and_images(
    validated: dict[int, Path], cached_folder: Path, tmp_path: Path
) -> None:
    """A file asks it to stop in the first step, so it ends before the step's validation."""
    whole, part = validated[1], validated[1].with_name("stopped")
    (tmp_path / "stopping.py").write_text(STOPPING.format(run=str(part)))
    words = [*list_validation_words(cached_folder, whole.parent), *IN_EACH_STEP, f"run.name={part.name}"]
    words.append(f"objective.loss={tmp_path / 'stopping.py'}:square")
    run_program("train/main.py", *words, expect=143)
    assert list(list_files(part)) == [0] and [path.name for path in (part / "checkpoints").iterdir()] == [
        "step-00000001"
    ]
    twice = [["train", *words[1:]], ["train", *words[1:], "train.max_steps=3"]]  # the second finds all of step 2
    run_program("tests/support/several_runs.py", *twice[0], "+", *twice[1])
    assert list(list_files(part)) == [0, 1, 2, 3]
    assert [line["step"] for line in read_numbers(part, "validation/loss")] == [0, 1, 2, 3]
    for step in (0, 1, 2):
        tables = [read_sample_errors(get_file(run, step)) for run in (whole, part)]
        assert tables[0].facts == tables[1].facts
        for name, values in tables[0].columns.items():
            np.testing.assert_array_equal(tables[1].columns[name], values, err_msg=f"{step} {name}")
    for name in ("validation/loss", "loss"):
        numbers = [[line[name] for line in read_numbers(run, name)] for run in (whole, part)]
        assert numbers[1][:-1] == numbers[0]
    images = [path.relative_to(whole) for path in (whole / "samples").glob("step-*/*.png")]
    assert len(images) == 2 * len(list((whole / "samples" / "step-00000001").iterdir()))
    for image in images:
        ours, theirs = Image.open(part / image), Image.open(whole / image)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=str(image))
        # The parameters name the run.
        assert ours.text["parameters"].replace(part.name, whole.name) == theirs.text["parameters"]


def test_a_sample_file_asks_for_images_once(validated: dict[int, Path]) -> None:
    samples = validated[2] / "samples"
    assert sorted(path.name for path in samples.glob("step-*.png")) == [f"step-{s:08d}.png" for s in (1, 2)]
    assert not (validated[2] / "sample").exists()
    for number in range(3):
        images = [Image.open(validated[r] / "samples" / "step-00000001" / f"{number:03d}.png") for r in (1, 2)]
        assert images[0].size == images[1].size


def test_images_are_the_same_on_any_number_of_ranks_and_from_the_checkpoint(validated: dict[int, Path]) -> None:
    samples = validated[1] / "samples"
    assert sorted(path.name for path in samples.glob("step-*.png")) == [f"step-{s:08d}.png" for s in (1, 2)]
    assert Image.open(samples / "strip.png").size[0] == 2 * 128
    assert "Sampler: Euler a" in Image.open(samples / "step-00000002" / "002.png").text["parameters"]
    out = validated[1] / "drawn"
    run_program(
        "train/sample_main.py",
        "--model",
        validated[1],
        "--prompts",
        validated[1].parent / "prompts.txt",
        "--out",
        out,
        ranks=2,
    )
    for number, size in enumerate(((128, 96), (64, 128), (128, 96))):
        live = np.asarray(Image.open(samples / "step-00000002" / f"{number:03d}.png"), np.int16)
        assert live.shape[:2] == size[::-1]
        for folder in (out, validated[2] / "samples" / "step-00000002"):
            image = Image.open(folder / f"{number:03d}.png")
            parameters = Image.open(samples / "step-00000002" / f"{number:03d}.png").text["parameters"]
            run, other_run = (path.name for path in (validated[1], validated[1 if folder == out else 2]))
            assert image.text == {"parameters": parameters.replace(f"Run: {run},", f"Run: {other_run},")}
            other = np.asarray(image, np.int16)
            assert np.abs(live - other).max() <= 2, (folder, number)
    assert Image.open(out / "contact_sheet.png").width > 256


def test_a_single_file_draws_what_the_live_model_drew(validated: dict[int, Path], cached_folder: Path) -> None:
    """Generating images leaves every global random state unchanged."""
    file = validated[1] / "models" / "step-00000002.safetensors"
    model = cached_folder / "model"
    words = [f"model.path={file}", f"model.config={model}", f"model.tokenizer={model / 'tokenizer'}"]
    config, problems = load_config(cached_folder / "tiny.yaml", [*words, "sample.num_inference_steps=2"])
    assert problems == []
    generator = load_image_generator(config, None, torch.device("cpu"))
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    prompts, _ = load_prompts(
        config.sample.model_copy(update={"prompts": MIXED_PROMPTS.splitlines()}), config.objective
    )
    drawn = [generator.generate(prompt) for prompt in prompts]
    assert torch.get_rng_state().equal(states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    for number, image in enumerate(drawn):
        live = np.asarray(Image.open(validated[1] / "samples" / "step-00000002" / f"{number:03d}.png"), np.int16)
        assert np.abs(live - np.asarray(image, np.int16)).max() <= 1
    passes = iter(range(3))

    def break_off() -> None:
        if next(passes) == 2:
            raise BrokenOff

    with pytest.raises(BrokenOff):  # between two denoising steps of the second image
        generate_images(generator, prompts, Ranks(0, 0, 1, torch.device("cpu")), break_off_if_stopped=break_off)
    assert next(passes, None) is None


def test_a_share_is_held_out_and_never_trained_on(cached_folder: Path) -> None:
    config, problems = load_config(cached_folder / "tiny.yaml", ["validation.share=0.2"])
    index, _ = open_training_set(config)
    assert problems == [] and index is not None and open_validation_set(config) == (None, [])
    held_out = find_held_out_rows(config.validation, index, None)
    assert 1 <= len(held_out) <= 10
    plan = build_plan(index, 4, 0, exclude_rows(held_out, len(index), None))
    used = {
        row
        for epoch in range(8)
        for number in range(plan.num_batches(epoch))
        for row in plan.batch(Position(epoch, number)).rows
    }
    assert used == set(range(len(index))) - set(held_out.tolist())
    derived = derive_validation_config(config)
    assert derived.data.caption.dropout_rate == 0 and derived.data.metadata == config.data.metadata


def test_problems_of_a_validation_set_are_reported(cached_folder: Path, tmp_path: Path) -> None:
    config, _ = load_config(
        cached_folder / "tiny.yaml", ["validation.share=0.2", f"validation.image_dirs=[{tmp_path}]"]
    )
    assert [problem.key for problem in open_validation_set(config)[1]] == ["validation.share"]
    config, _ = load_config(cached_folder / "tiny.yaml", ["validation.metadata=[no.json]"])
    assert [problem.key for problem in open_validation_set(config)[1]] == ["validation.metadata.0"]
    config, _ = load_config(cached_folder / "tiny.yaml", ["validation.share=0.0001"])
    index, _ = open_training_set(config)
    assert index is not None and len(find_held_out_rows(config.validation, index, None)) == 2  # a tenth of 24
    assert list(check_held_out(config.validation, index, None)) == []
    assert "leaves none of 24" in next(check_held_out(config.validation, index, index)).rule
    (tmp_path / "bad.txt").write_text("a --w 3")
    with pytest.raises(UserInputError, match=r"bad.txt:1: has --w = '3'"):
        run_sampling(str(cached_folder / "model"), tmp_path / "bad.txt", tmp_path / "out", None, [])


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_each_sample_meets_every_part_of_the_timesteps_at_the_same_places(prediction: str) -> None:
    settings = ObjectiveConfig(prediction=prediction, min_timestep=200, max_timestep=600)
    objective = Objective(settings, LatentStatistics(mean=torch.zeros(1), scale=torch.ones(1)), 4)
    turns = [spread_timesteps(objective, SampleKeys(1, turn, [5, 6, 7]), 4) for turn in range(4)]
    for turn, timesteps in enumerate(turns):
        assert (timesteps >= 200 + 100 * turn).all() and (timesteps < 300 + 100 * turn).all()
        assert len(set(timesteps.tolist())) == 3
        torch.testing.assert_close(timesteps - 100 * turn, turns[0], rtol=0, atol=1)
    alone = spread_timesteps(objective, SampleKeys(1, 2, [6]), 4)
    assert alone[0] == turns[2][1]


def test_losses_are_averaged_by_timestep_and_by_bucket() -> None:
    def build_error(timestep: float, bucket: Size, loss: float) -> SampleError:
        return SampleError("a", bucket, 0, 0, timestep, 0.0, 1.0, loss, 0.0, 0.0)

    wide, tall = Size(64, 32), Size(32, 64)
    errors = [build_error(0.0, wide, 1.0), build_error(499.9, wide, 2.0)]
    errors += [build_error(500, tall, 6.0), build_error(1000, tall, 7.0)]
    assert average_losses(errors, 2) == {
        "loss": 4.0,
        "loss_32x64": 6.5,
        "loss_64x32": 1.5,
        "loss_t000-499": 1.5,
        "loss_t500-999": 6.5,
    }
