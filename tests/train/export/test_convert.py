"""Conversion: bit-equal round trips between files and folders, and the same generated images with diffusers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers_drawing import draw_with_diffusers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_trainer.train.checkpoint.model_argument import DeclaredPrediction, read_declared_prediction
from sdxl_trainer.train.convert import main


def assert_equal_files(file: Path, expected_file: Path) -> None:
    tensors, expected = load_file(file), load_file(expected_file)
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []


@pytest.fixture(scope="module")
def converted(one_rank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert the run's newest checkpoint to a file, and that file to a diffusers folder, both in fp32."""
    folder = tmp_path_factory.mktemp("converted")
    assert main([str(one_rank), str(folder / "model.safetensors")]) == 0
    words = ["--dtype", "fp32", f"model.config={one_rank.parent.parent / 'model'}"]
    assert main([str(folder / "model.safetensors"), str(folder / "model"), *words]) == 0
    return folder


def test_a_converted_checkpoint_equals_the_exported_file(converted: Path, one_rank: Path) -> None:
    assert_equal_files(converted / "model.safetensors", one_rank / "models" / "step-00000020.safetensors")


def test_an_older_checkpoint_is_converted_by_its_path(one_rank: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.safetensors"
    assert main([str(one_rank / "checkpoints" / "step-00000004"), str(target), "--dtype", "bf16"]) == 0
    older, newest = load_file(target), load_file(one_rank / "models" / "step-00000020.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert older[name].dtype == torch.bfloat16 and not torch.equal(older[name].float(), newest[name])


def test_file_to_folder_and_back_is_bit_equal(converted: Path, tmp_path: Path) -> None:
    assert main([str(converted / "model"), str(tmp_path / "again.safetensors"), "--dtype", "fp32"]) == 0
    assert_equal_files(converted / "model.safetensors", tmp_path / "again.safetensors")


def test_diffusers_generates_the_same_images_from_the_folder(converted: Path, one_rank: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(converted / "model", add_watermarker=False)
    image = draw_with_diffusers(pipeline, "a red circle on a white background", 0)
    drawn = np.asarray(Image.open(one_rank / "samples" / "step-00000020" / "000.png"), np.int16)
    assert np.abs(image - drawn).max() <= 2


def test_both_formats_declare_the_prediction_type(converted: Path, tmp_path: Path) -> None:
    words = ["objective.prediction=v", "objective.zero_terminal_snr=true", "run.name=mine"]
    file, folder = tmp_path / "v.safetensors", tmp_path / "v"
    assert main([str(converted / "model"), str(file), *words]) == 0
    assert main([str(converted / "model"), str(folder), *words]) == 0
    with safe_open(file, framework="pt") as opened:
        assert {"v_pred", "ztsnr"} < set(opened.keys())
        metadata = opened.metadata()
    assert metadata["modelspec.prediction_type"] == "v" and metadata["modelspec.title"] == "mine"
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert scheduler["timestep_spacing"] == "trailing"
    assert load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16


def test_conversion_keeps_the_declared_prediction_type(converted: Path, tmp_path: Path) -> None:
    """Without settings, a v-prediction model stays one in either format, and `--cfg` overrules the declaration."""
    config, tokenizer = f"model.config={converted / 'model'}", f"model.tokenizer={converted / 'model' / 'tokenizer'}"
    file, folder, again = tmp_path / "v.safetensors", tmp_path / "v", tmp_path / "again.safetensors"
    words = ["objective.prediction=v", "objective.zero_terminal_snr=true"]
    assert main([str(converted / "model"), str(file), *words]) == 0
    assert main([str(file), str(folder), config, tokenizer]) == 0
    assert main([str(folder), str(again)]) == 0
    assert read_declared_prediction(folder) == read_declared_prediction(again) == DeclaredPrediction("v", True)
    (tmp_path / "flow.yaml").write_text(
        "objective: {prediction: flow, timestep_shift: 3, timestep_shift_base_px: 1024}\ndata: {resolution_px: 512}"
    )
    assert main([str(folder), str(again), "--cfg", str(tmp_path / "flow.yaml"), "--overwrite"]) == 0
    assert read_declared_prediction(again) == DeclaredPrediction("flow", False, 1.5)  # the shift at 512 x 512


def test_a_folder_of_a_flow_model_names_a_scheduler_that_diffusers_pipeline_can_use(
    converted: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder = tmp_path / "flow"
    words = ["--dtype", "fp32", "objective.prediction=flow", "objective.timestep_shift=3"]
    assert main([str(converted / "model"), str(folder), *words]) == 0
    assert read_declared_prediction(folder) == DeclaredPrediction("flow", False, 3.0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler).__name__ == "UniPCMultistepScheduler"
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline("a", width=64, height=64, num_inference_steps=2, generator=generator, output_type="pt").images
    assert images.isfinite().all()
    # Two steps from s = 1, evenly spaced up to 1/1000 before the shift: 0.5005 becomes 3·s/(1 + 2·s).
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1, 3 * 0.5005 / (1 + 2 * 0.5005), 0], abs=1e-5)


class Malicious:
    """Pickles as a call."""

    def __reduce__(self) -> tuple:
        return (print, ("code of a checkpoint runs",))


def test_a_pickled_checkpoint_becomes_safetensors_without_running_code(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = {"a.weight": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.float16)}
    for number, is_zip in enumerate((True, False)):
        torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=is_zip)
        assert main([str(tmp_path / "old.ckpt"), str(tmp_path / f"{number}.safetensors")]) == 0
        modes = {(tmp_path / name).stat().st_mode for name in ("old.ckpt", f"{number}.safetensors")}
        assert len(modes) == 1  # that of new files, not 0600
        converted = load_file(tmp_path / f"{number}.safetensors")
        assert converted.keys() == weights.keys() and all(converted[name].equal(weights[name]) for name in weights)
    torch.save({"state_dict": weights, "x": Malicious()}, tmp_path / "bad.ckpt")
    assert main([str(tmp_path / "bad.ckpt"), str(tmp_path / "bad.safetensors")]) == 2
    printed = capsys.readouterr()
    assert "cannot be loaded safely" in printed.err and "code of a checkpoint runs" not in printed.out
    assert main([str(tmp_path / "old.ckpt"), str(tmp_path / "folder")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["0.safetensors", "1.safetensors"]


def test_a_source_that_is_not_a_model_ends_with_status_2(
    one_rank: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(one_rank / "checkpoints" / "step-00000020", damaged)
    weights = next((damaged / "state").glob("*_model_states.pt"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main([str(damaged), str(tmp_path / "x.safetensors")]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), str(tmp_path / "x.safetensors")]) == 2
    assert f"source = '{tmp_path / 'nothing'}'\n      does not exist" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    words = [str(one_rank / "models" / "step-00000020.safetensors"), str(tmp_path / "x.safetensors"), "--merge"]
    assert main([*words, f"model.config={one_rank.parent.parent / 'model'}"]) == 2
    assert "--merge\n      needs adapters" in capsys.readouterr().err


def test_an_existing_target_is_replaced_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "old.ckpt")
    words = [str(tmp_path / "old.ckpt"), str(tmp_path / "new.safetensors")]
    (tmp_path / "new.safetensors").write_text("precious")
    assert main(words) == 2 and (tmp_path / "new.safetensors").read_text() == "precious"
    assert "exists already\n      cure: give another name, or add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert load_file(tmp_path / "new.safetensors")["a"].tolist() == [1, 1]
    assert main([words[1], words[1], "--overwrite"]) == 2
    assert "is the source itself" in capsys.readouterr().err
