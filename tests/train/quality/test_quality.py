"""The program that measures generated images, with the tiny SDXL: ranks, resuming, damage, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import run_program

from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.launch.distributed import close_ranks
from sdxl_trainer.train.held_out.history import read_histories
from sdxl_trainer.train.held_out.sample_errors import WEIGHTS, get_file, read_sample_errors
from sdxl_trainer.train.quality.job import Request, run_quality
from sdxl_trainer.train.quality.models import open_models

PROGRAM = "train/quality/__main__.py"


@pytest.fixture(scope="module")
def stage(
    validated: dict[int, Path],
    cached_folder: Path,
    write_clip: Callable,
    write_dinov2: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two feature models, and a validation set of 10 samples: the 7 of the runs and 3 more."""
    folder = tmp_path_factory.mktemp("quality")
    write_clip(folder / "clip")
    write_dinov2(folder / "dinov2")
    shutil.copytree(validated[1].parent / "own", folder / "own")
    for number, latents in enumerate(sorted((cached_folder / "latents").glob("*.npz"))[7:10], start=7):
        shutil.copy(latents, folder / "own" / f"own_{number}.npz")
        (folder / "own" / f"own_{number}.txt").write_text(latents.stem)
    return folder


def list_settings(stage: Path) -> list[str]:
    own = stage / "own"
    return [f"validation.image_dirs=[{own}]", f"validation.cache_dir={own}", "sample.num_inference_steps=1"]


def list_words(stage: Path, validated: dict[int, Path], cached_folder: Path) -> list[object]:
    models = ["--model", validated[1], "--model", cached_folder / "model"]
    features = ["--features", stage / "dinov2", "--features", stage / "clip"]
    return [*models, *features, "--out", stage / "out", *list_settings(stage)]


def read_images(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.glob("*/*.png"))}


def test_two_ranks_measure_and_one_continues(
    stage: Path, validated: dict[int, Path], cached_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stage / "out"
    printed = run_program(PROGRAM, *list_words(stage, validated, cached_folder), ranks=2)
    result, images = json.loads((out / "quality.json").read_text()), read_images(out)
    assert "10 generated images and as many validation images" in printed and "CMMD, clip" in printed
    assert "10 images are too few for 24 numbers" in printed and "CMMD, dinov2" not in printed
    assert len(images) == 30 and len({name.split("/")[0] for name in images}) == 3 and len(set(images.values())) == 30
    assert result["models"] == ["ranks-1", "model"] and result["num_images"] == 10
    lines = {(line["measure"], line["features"], line["model"]): line for line in result["lines"]}
    assert lines.keys() == {
        *(("x0 error", "", name) for name in ("ranks-1",)),
        *((m, f, name) for m in ("FID", "KID") for f in ("dinov2", "clip") for name in ("ranks-1", "model")),
        *(("CMMD", "clip", name) for name in ("ranks-1", "model")),
    }
    for line in result["lines"]:
        assert line["low"] < line["value"] < line["high"]
        assert line["low"] >= 0 or line["measure"] == "KID"
        has_difference = line["model"] == "model"
        assert (line["difference"] is not None) == has_difference
        assert not has_difference or line["difference_low"] < line["difference"] < line["difference_high"]
    for sizes, prompt in check_sizes(out):
        assert len(sizes) == 1 and "\n" in prompt

    # The same command on one rank: nothing is drawn or computed again, but what is damaged, missing or another's.
    names = list(images)
    torn, flipped, lost, foreign = names[0], names[4], names[15], names[25]
    (out / torn).write_bytes(images[torn][:-40])
    content = bytearray(images[flipped])
    content[len(content) // 2] ^= 4
    (out / flipped).write_bytes(content)
    (out / lost).unlink()
    (out / foreign).write_bytes(images[names[26]])
    blocks = sorted((out / "features").glob("*/*.safetensors"))
    blocks[0].write_bytes(blocks[0].read_bytes()[:-1])
    times = {name: (out / name).stat().st_mtime_ns for name in names if name not in (torn, flipped, lost, foreign)}
    kept = {block: block.stat().st_mtime_ns for block in blocks[1:]}
    request = build_request(stage, [validated[1], cached_folder / "model"], stage / "out")
    run_quality(request)
    close_ranks()
    again = json.loads((out / "quality.json").read_text())
    assert read_images(out) == images
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert {block: block.stat().st_mtime_ns for block in kept} == kept
    assert flatten(again) == pytest.approx(flatten(result), rel=1e-5, abs=1e-7)
    assert len(sorted((out / "features").glob("*/*.safetensors"))) == len(blocks)


def check_sizes(out: Path) -> list[tuple[set, str]]:
    """The sizes of the images of each sample, and the text that is stored with the last."""
    found: dict[str, tuple[set, str]] = {}
    for file in sorted(out.glob("*/*.png")):
        with Image.open(file) as image:
            sizes, _ = found.get(file.name, (set(), ""))
            found[file.name] = (sizes | {image.size}, str(image.info["parameters"]))
    assert len({size for sizes, _ in found.values() for size in sizes}) > 1
    return list(found.values())


def flatten(result: dict) -> list[float]:
    return [line[name] or 0.0 for line in result["lines"] for name in ("value", "low", "high", "difference", "p_value")]


def build_request(stage: Path, models: list[Path], out: Path | None, *words: str, **changes: object) -> Request:
    fields = {
        "models": [str(model) for model in models],
        "features": [stage / "dinov2", stage / "clip"],
        "average": None,
        "max_images": None,
        "cfg": None,
        "out": out,
        "overrides": [*list_settings(stage), *words],
    }
    return Request(**(fields | changes))


def test_the_x0_error_is_that_of_the_validation(
    stage: Path, validated: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An average draws its own images, and its x0 error is of the samples that are measured."""
    request = build_request(
        stage, [validated[1]], stage / "ema", average="0.5", max_images=8, features=[stage / "clip"]
    )
    run_quality(request, as_json=True)
    close_ranks()
    result = json.loads(capsys.readouterr().out)
    assert result["num_images"] == 8 and result["lines"][0]["measure"] == "x0 error"
    line = result["lines"][0]
    names = {file.name.rpartition("-")[0] for file in (stage / "ema").glob("ranks-1-*/*.png")}
    logged = read_histories({2: get_file(validated[1], 2)}).by_average["0.5"]
    columns = read_sample_errors(get_file(validated[1], 2)).columns
    cells: dict[tuple[str, int], list[float]] = {}
    for key, average, number, error in zip(
        *(columns[name].tolist() for name in ("key", "average", "log_snr_bin", "x0_error")), strict=True
    ):
        if key in names and average == "0.5":
            cells.setdefault((key, number), []).append(error)
    samples: dict[str, list[float]] = {}
    for (key, _), errors in cells.items():
        samples.setdefault(key, []).append(math.log(sum(errors) / len(errors)))
    means = [sum(errors) / len(errors) for errors in samples.values()]
    assert 5 <= line["num_images"] == len(means) < 8
    assert line["value"] == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-6) and WEIGHTS != "0.5"
    if len(means) == logged.errors.shape[1]:  # the number that the run logs
        assert line["value"] == pytest.approx(float(logged.means[-1]), rel=1e-6)
    shared = {file.name: file.read_bytes() for file in (stage / "out").glob("ranks-1-*/*.png")}
    own = {file.name: file.read_bytes() for file in (stage / "ema").glob("ranks-1-*/*.png")}
    if shared:  # drawn by the other test
        assert own.keys() <= shared.keys() and all(shared[name] != content for name, content in own.items())


def test_settings_are_those_of_the_first_run_but_a_model_keeps_its_prediction(
    stage: Path, validated: dict[int, Path], cached_folder: Path, one_rank: Path
) -> None:
    words = list_settings(stage)
    frame = open_models([str(cached_folder / "model"), str(one_rank), str(validated[1])], None, None, words)
    assert frame.problems == [] and [model.label for model in frame.models] == ["model", "one", "ranks-1"]
    assert all(model.config.sample == frame.config.sample for model in frame.models)
    assert frame.config.run.name == "one" and frame.models[2].config.run.name == "ranks-1"
    assert frame.models[0].config.model.path == str(cached_folder / "model") and frame.models[0].run_folder is None
    assert frame.models[2].run_folder == validated[1] and frame.models[2].step == 2


def test_what_cannot_be_measured_is_refused(
    stage: Path, validated: dict[int, Path], cached_folder: Path, one_rank: Path, tmp_path: Path
) -> None:
    def refuse(*arguments: object, **changes: object) -> str:
        with pytest.raises(UserInputError) as caught:
            run_quality(build_request(stage, *arguments, **changes))
        return str(caught.value.format())

    assert "does not exist" in refuse([tmp_path / "none"], tmp_path)
    message = refuse([cached_folder / "model"], None)
    assert "--cfg" in message and "no model is a run" in message
    message = refuse([cached_folder / "model"], None, cfg=cached_folder / "tiny.yaml", average="0.9")
    assert "--out" in message and "--ema" in message
    message = refuse([one_rank], None, overrides=[], features=[tmp_path / "none", stage / "clip"], average="0.9")
    assert "holds no samples out" in message and "does not exist" in message and "0.9" in message
    message = refuse([validated[1]], None, max_images=7)
    assert "--max-images = 7" in message and "is too few samples" in message
    assert "validation.max_samples = 5" in refuse([validated[1]], None, "validation.max_samples=5")
    assert "--model" in (message := refuse([validated[1], validated[1]], None)) and "is named twice" in message
    assert "which is named twice" in refuse([validated[1], validated[1] / "checkpoints" / "step-00000002"], None)
    same = [stage / "clip", stage / "own" / ".." / "clip"]
    assert "--features" in (message := refuse([validated[1]], None, features=same)) and "is named twice" in message
    message = refuse([tmp_path / "none"], None, features=[tmp_path / "no-1", Path("openai/clip")])
    assert message.count("does not exist") == 3 and "hf download openai/clip" in message and "--cfg" not in message
    (tmp_path / "x.safetensors").write_bytes(b"none")
    message = refuse([tmp_path / "x.safetensors", validated[1]], None)
    assert "--model" in message and "--out" in message and "model.path" not in message
    assert "cannot be a folder" in refuse([validated[1]], tmp_path / "x.safetensors" / "out")
    message = refuse([validated[1], one_rank], None, overrides=[])
    assert (
        f"--model = '{one_rank}'" in message
        and "another validation.image_dirs" in message
        and "may have seen" in message
        and "7" in message
    )
    assert "does not support zero terminal SNR" in refuse(
        [validated[1]], None, "objective.zero_terminal_snr=true", "objective.prediction=v", "sample.scheduler=heun"
    )
    (tmp_path / "own").mkdir()
    assert refuse([validated[1]], None, overrides=[f"validation.image_dirs=[{tmp_path / 'own'}]"])
    assert not (validated[1] / "quality").exists() and torch.is_grad_enabled()


def test_samples_that_cannot_be_read_are_left_out(
    stage: Path, validated: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stage / "own", tmp_path / "own")
    file = tmp_path / "own" / "own_3.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    own = tmp_path / "own"
    words = [f"validation.image_dirs=[{own}]", f"validation.cache_dir={own}", "sample.num_inference_steps=1"]
    request = build_request(stage, [validated[1]], tmp_path / "out", overrides=words, features=[stage / "clip"])
    run_quality(request, as_json=True)
    close_ranks()
    printed = capsys.readouterr()
    assert json.loads(printed.out)["num_images"] == 9 and len(read_images(tmp_path / "out")) == 18
    assert not list((tmp_path / "out").glob("*/own_3-*"))
