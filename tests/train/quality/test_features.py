"""Feature models: transformers' own outputs, torch-fidelity's Inception, what is refused, and the cache."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.train.quality.feature_cache import read_blocks, write_block
from sdxl_trainer.train.quality.features import check_features, identify_features, load_features
from sdxl_trainer.train.quality.inception import prepare_for_inception

CPU = torch.device("cpu")


def draw_image(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_features_are_those_of_transformers(tmp_path: Path, write_clip: Callable, write_dinov2: Callable) -> None:
    images = [draw_image(1, 40, 30), draw_image(2, 32, 64)]
    clip, processor = write_clip(tmp_path / "clip")
    loaded = load_features(tmp_path / "clip", "clip", "", CPU)
    pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in images])
    assert loaded.is_clip and pixels.shape == (2, 3, 28, 28) and loaded.name == "clip"
    torch.testing.assert_close(loaded.compute(images), clip(pixel_values=pixels).image_embeds, rtol=1e-5, atol=1e-6)
    whole, _ = write_clip(tmp_path / "whole", with_text=True)  # as CLIP models are published
    expected = whole.get_image_features(pixel_values=pixels)
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(load_features(tmp_path / "whole", "", "", CPU).compute(images), expected)
    dinov2 = write_dinov2(tmp_path / "dinov2")
    loaded = load_features(tmp_path / "dinov2", "", "", CPU)
    pixels = torch.stack([loaded.prepare(image) for image in images])
    state = dinov2(pixel_values=pixels).last_hidden_state[:, 0]  # of the class token, normalised
    torch.testing.assert_close(loaded.compute(images), state, rtol=1e-5, atol=1e-6)
    assert not loaded.is_clip
    assert not [*(problem for name in ("clip", "whole", "dinov2") for problem in check_features(tmp_path / name))]


def test_the_inception_of_fid_is_that_of_torch_fidelity(tmp_path: Path, inception_weights: dict) -> None:
    """`FeatureExtractorInceptionV3` of torch-fidelity 0.4.0 with these random weights, and its scaling to 299x299."""
    save_file({**inception_weights, "fc.bias": torch.zeros(1008)}, tmp_path / "inception.safetensors")
    assert list(check_features(tmp_path / "inception.safetensors")) == []
    image = draw_image(8, 70, 50)
    pixels = prepare_for_inception(image)
    expected = [-0.39606815576553345, -0.3214761018753052, -0.08920252323150635]
    assert pixels.shape == (3, 299, 299) and pixels[:, 17, 123].tolist() == pytest.approx(expected, abs=1e-6)
    assert pixels[:, 298, 298].tolist() == [0.2578125, 0.9765625, -0.359375]
    features = load_features(tmp_path / "inception.safetensors", "", "", CPU).compute([image])[0]
    expected = [0.06719247996807098, 0.0012978797312825918, 0.04263152927160263, 0.4371826648712158]
    assert features[:4].tolist() == pytest.approx(expected, abs=1e-5) and len(features) == 2048
    assert float(features.mean()) == pytest.approx(0.3325551152229309, abs=1e-5)
    assert float(features.std()) == pytest.approx(0.4530356824398041, abs=1e-5)


def test_what_is_no_feature_model_is_refused(tmp_path: Path, write_dinov2: Callable) -> None:
    def refuse(path: Path) -> str:
        return " ".join(f"{problem.rule}: {problem.cure}" for problem in check_features(path))

    assert "does not exist" in refuse(tmp_path / "none")
    write_dinov2(tmp_path / "model")
    config, weights = tmp_path / "model" / "config.json", tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    stored = weights.read_bytes()
    weights.unlink()
    assert "has pickled weights" in refuse(tmp_path / "model") and "train/convert.py" in refuse(tmp_path / "model")
    assert "is a pickled file" in refuse(tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "pytorch_model.bin").unlink()
    assert "has no model.safetensors" in refuse(tmp_path / "model")
    weights.write_bytes(stored)
    assert "is not FID's Inception: Conv2d_1a_3x3" in refuse(weights)
    (tmp_path / "cut.safetensors").write_bytes(stored[:1000])
    assert refuse(tmp_path / "cut.safetensors") and refuse(config)
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "layernorm.weight"}, weights)
    with pytest.raises(UserInputError, match=r"the weights lack layernorm.weight"):
        load_features(tmp_path / "model", "", "", CPU)  # transformers would draw it at random
    save_file(state | {"layernorm.weight": torch.ones(3)}, weights)
    with pytest.raises(UserInputError, match="cannot be loaded"):
        load_features(tmp_path / "model", "", "", CPU)
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"model_type": "bert"}))
    assert "is a model of the type bert" in refuse(tmp_path / "model")
    config.write_text("[]")
    assert "is not a JSON object" in refuse(tmp_path / "model")


def test_a_processor_with_code_of_its_own_is_refused(tmp_path: Path, write_dinov2: Callable) -> None:
    write_dinov2(tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    file = tmp_path / "model" / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {
        "auto_map": {"AutoImageProcessor": "own.Own"},
        "image_processor_type": "Own",
    }
    file.write_text(json.dumps(settings))
    with pytest.raises(UserInputError, match="cannot be loaded"):
        load_features(tmp_path / "model", "", "", CPU)
    assert not (tmp_path / "ran").exists()


def test_the_identity_follows_weights_and_preparation(tmp_path: Path, write_dinov2: Callable) -> None:
    write_dinov2(tmp_path / "model")
    before = identify_features(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "moved")
    assert identify_features(tmp_path / "moved") == before
    file = tmp_path / "moved" / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"resample": 3', '"resample": 2'))
    other = identify_features(tmp_path / "moved")
    save_file({"x": torch.ones(1)}, tmp_path / "moved" / "model.safetensors")
    assert len({before, other, identify_features(tmp_path / "moved")}) == 3


def test_damaged_features_are_computed_again(tmp_path: Path) -> None:
    features = {bytes([number] * 32): np.full(4, number, np.float32) for number in range(6)}
    write_block(tmp_path, dict(list(features.items())[:3]))
    write_block(tmp_path, dict(list(features.items())[3:]))
    found = read_blocks(tmp_path)
    assert found.keys() == features.keys() and all((found[name] == features[name]).all() for name in features)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-3] ^= 1
    first.write_bytes(content)
    left = read_blocks(tmp_path)
    assert len(left) == 3
    second.write_bytes(second.read_bytes()[:-8])
    (tmp_path / "other.safetensors").write_bytes(b"no safetensors")
    assert read_blocks(tmp_path) == {} and read_blocks(tmp_path / "none") == {}
