"""The demo set and the tiny SDXL of the quick start and of all tests of whole runs."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sdxl_trainer.data.images.demo_set import (
    BACKGROUNDS,
    COLOURS,
    NEW_SHAPES,
    SHAPES,
    draw_demo_set,
    nearest_colour,
    nearest_shape,
)
from sdxl_trainer.train.tiny.build import CONFIG_FOLDER, VAE_WEIGHTS, build_tiny_sdxl, load_tiny_vae, load_wide_vae
from sdxl_trainer.train.tiny.tokenizer import build_vocabulary, learn_merges, list_byte_symbols, write_tokenizers

SCALING_FACTOR = 0.13025
BUCKETS_PX = ((128, 128), (160, 96), (96, 160), (192, 64))
PROMPT = "a red circle on a white background"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, dict]:
    path = draw_demo_set(tmp_path_factory.mktemp("demo"))
    return path, json.loads(path.read_text())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipeline(model_folder):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_resized(path: Path) -> torch.Tensor:
    """Read an image, resize it to cover its bucket, crop the centre; return [1, 3, H, W] from -1 to 1."""
    image = Image.open(path).convert("RGB")
    width, height = min(BUCKETS_PX, key=lambda bucket: abs(bucket[0] / bucket[1] - image.width / image.height))
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_demo_images_match_their_metadata(demo):
    path, metadata = demo
    assert len(metadata) == 96
    formats, ratios, captions = Counter(), set(), Counter()
    for stem, record in metadata.items():
        file = path.parent / record["image_path"]
        assert file.stem == stem
        with Image.open(file) as image:
            formats[image.format] += 1
            assert list(image.size) == record["original_size"]
        ratios.add(round(image.width / image.height, 2))
        captions[record["caption"]] += 1
    assert formats == {"JPEG": 32, "PNG": 32, "WEBP": 32}
    assert len(ratios) >= 4
    assert set(captions) == {f"a {c} {s} on a {b} background" for c in COLOURS for s in SHAPES for b in BACKGROUNDS}
    assert Counter(caption.split()[1] for caption in captions.elements()) == dict.fromkeys(COLOURS, 16)


def test_nearest_colour_finds_the_colour_of_every_demo_image(demo):
    path, metadata = demo
    for record in metadata.values():
        image = np.asarray(Image.open(path.parent / record["image_path"]).convert("RGB"))
        assert nearest_colour(image) == record["caption"].split()[1], record
        assert nearest_colour(image / 255) == record["caption"].split()[1], record


def test_demo_set_depends_only_on_its_seed(tmp_path):
    def read(name: str, seed: int) -> dict[str, bytes]:
        folder = draw_demo_set(tmp_path / name, num_images=12, seed=seed).parent
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    first = read("first", 3)
    assert len(first) == 13
    assert first == read("again", 3)
    assert first != read("other", 4)


def test_vae_reconstructs_demo_images_and_has_sdxl_latent_scale(demo):
    path, metadata = demo
    assert VAE_WEIGHTS.stat().st_size <= 2_000_000
    with safe_open(VAE_WEIGHTS, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    vae, latents, errors = load_tiny_vae(), [], []
    for record in list(metadata.values())[:48]:
        image = _load_resized(path.parent / record["image_path"])
        with torch.no_grad():
            posterior = vae.encode(image).latent_dist
            decoded = vae.decode(posterior.mode()).sample.clamp(-1, 1)
        assert posterior.mean.shape == (1, 4, image.shape[2] // 8, image.shape[3] // 8)
        assert posterior.std.max() * SCALING_FACTOR < 0.2
        latents.append(posterior.mean[0].flatten(1) * SCALING_FACTOR)
        errors.append((decoded - image).square().mean().item())
    assert 10 * math.log10(4 / np.mean(errors)) >= 26  # dB
    channels = torch.cat(latents, dim=1)  # [4, pixels]
    assert channels.mean(dim=1).abs().max() < 0.35
    assert (channels.std(dim=1) - 1).abs().max() < 0.25


def test_tokenizers_have_a_token_for_each_demo_word_and_pad_like_sdxl(pipeline):
    bos, eos = len(pipeline.tokenizer) - 2, len(pipeline.tokenizer) - 1
    for tokenizer, pad in ((pipeline.tokenizer, eos), (pipeline.tokenizer_2, 0)):
        ids = tokenizer(PROMPT, padding="max_length", truncation=True).input_ids
        assert len(ids) == tokenizer.model_max_length == 77
        assert (ids[0], ids[8], ids[9:]) == (bos, eos, [pad] * 68)
        assert tokenizer.convert_ids_to_tokens(ids[1:8]) == [f"{word}</w>" for word in PROMPT.split()]
        for word in (*COLOURS, *SHAPES, *BACKGROUNDS):
            assert len(tokenizer.tokenize(word)) == 1
        unusual = "naïve 猫 №5, ok?"
        assert tokenizer.decode(tokenizer(unusual).input_ids, skip_special_tokens=True).replace(" ", "") == (
            unusual.replace(" ", "")
        )
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        assert (encoder.config.bos_token_id, encoder.config.eos_token_id) == (bos, eos)
        assert encoder.config.vocab_size == len(pipeline.tokenizer)


def test_tokenizer_files_are_current(tmp_path):
    write_tokenizers(tmp_path)
    for folder in ("tokenizer", "tokenizer_2"):
        for file in (tmp_path / folder).iterdir():
            assert file.read_bytes() == (CONFIG_FOLDER / folder / file.name).read_bytes()
    vocabulary, merges = build_vocabulary()
    assert (vocabulary["!"], len(list_byte_symbols()), len(vocabulary)) == (0, 256, 514 + len(merges))
    assert learn_merges(["aab", "ab"]) == [("a", "b</w>"), ("a", "ab</w>")]


def test_tiny_sdxl_has_sdxl_topology_and_generates_an_image(pipeline):
    unet, first, second = pipeline.unet.config, pipeline.text_encoder.config, pipeline.text_encoder_2.config
    assert unet.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert unet.addition_embed_type == "text_time"
    assert unet.cross_attention_dim == first.hidden_size + second.hidden_size
    assert unet.projection_class_embeddings_input_dim == second.projection_dim + 6 * unet.addition_time_embed_dim
    assert first.hidden_size != second.hidden_size == second.projection_dim
    assert pipeline.vae.config.scaling_factor == SCALING_FACTOR
    image = pipeline(PROMPT, height=96, width=160, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (96, 160, 3)
    assert np.isfinite(image).all()


def test_text_encoders_distinguish_words(pipeline):
    prompts = [f"a {colour} circle on a white background" for colour in COLOURS]
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    for states in (hidden[:, 2], hidden[:, 8], pooled):  # the word itself, EOS, pooled: [6, width]
        distances = torch.cdist(states, states) / states.norm(dim=1).mean()
        assert distances[~torch.eye(6, dtype=torch.bool)].min() > 0.1


def test_tiny_sdxl_depends_only_on_its_seed_and_keeps_the_random_state(model_folder, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again, other = build_tiny_sdxl(tmp_path / "again"), build_tiny_sdxl(tmp_path / "other", seed=1)
    assert torch.equal(torch.rand(1), expected)
    for file in sorted(model_folder.rglob("*.safetensors")):
        name = file.relative_to(model_folder)
        assert file.read_bytes() == (again / name).read_bytes()
        assert (file.read_bytes() == (other / name).read_bytes()) == (name.parts[0] == "vae")


def test_nearest_shape_finds_the_shape_of_every_image_old_and_new(tmp_path):
    path = draw_demo_set(tmp_path, num_images=36, seed=5, shapes=(*SHAPES, *NEW_SHAPES))
    for record in json.loads(path.read_text()).values():
        image = np.asarray(Image.open(path.parent / record["image_path"]).convert("RGB"))
        assert nearest_shape(image) == record["caption"].split()[2], record


@pytest.mark.parametrize(("channels", "scaling", "shift"), [(16, 0.3611, 0.1159), (32, 0.6043, 0.0760)])
def test_wide_vaes_decode_like_the_trained_one(demo: tuple[Path, dict], channels: int, scaling: float, shift: float):
    vae, wide = load_tiny_vae(), load_wide_vae(channels)
    assert (wide.config.latent_channels, wide.config.scaling_factor, wide.config.shift_factor) == (
        channels,
        scaling,
        shift,
    )
    pixels = torch.cat([_load_resized(path) for path in sorted(demo[0].parent.rglob("*.*g"))[:1]])
    with torch.no_grad():
        posterior, wide_posterior = vae.encode(pixels).latent_dist, wide.encode(pixels).latent_dist
        assert wide_posterior.mean.shape[1] == channels
        decoded, expected = (
            model.decode(latents).sample for model, latents in ((wide, wide_posterior.mean), (vae, posterior.mean))
        )
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
    # Both give the U-Net the same energy on average over the channels, and the same noise.
    x0, wide_x0 = posterior.mean * SCALING_FACTOR, (wide_posterior.mean - shift) * scaling
    assert wide_x0.square().mean().item() == pytest.approx(x0.square().mean().item(), rel=1e-4)
    log_std, wide_log_std = (
        (std.log().mean() + math.log(factor)).item()
        for std, factor in ((posterior.std, SCALING_FACTOR), (wide_posterior.std, scaling))
    )
    assert wide_log_std == pytest.approx(log_std, abs=1e-4)
