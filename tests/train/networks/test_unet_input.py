"""The U-Net's conditioning in training, compared with diffusers' SDXL pipeline for the same prompt and sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_trainer.cache.models.encoders import load_text_encoders, load_tokenizers
from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.loading.loader import build_dataset
from sdxl_trainer.data.loading.micro_batch import MicroSpec
from sdxl_trainer.data.text.strategy import load_strategy
from sdxl_trainer.train.networks.conditioning import TextConditioner
from sdxl_trainer.train.networks.trained_networks import ENCODERS, TrainedNetworks, load_unet, unfreeze_text_encoder


class UnetReachedError(Exception):
    """Raised in place of running the U-Net."""


@torch.no_grad()
def capture_conditioning(unet: torch.nn.Module, call: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Return the conditioning that `call` passes to the U-Net: everything besides latents and timestep."""
    conditioning: dict[str, torch.Tensor] = {}

    def capture(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        conditioning.update(hidden=hidden, **kwargs["added_cond_kwargs"])
        raise UnetReachedError

    handle = unet.register_forward_pre_hook(capture, with_kwargs=True)
    with pytest.raises(UnetReachedError):
        call()
    handle.remove()
    return conditioning


@pytest.mark.parametrize("trained", [(), ("text_encoder", "text_encoder_2")])
@pytest.mark.parametrize("caption", ["a red circle on a white background", ("a blue star " * 40).strip(), ""])
def test_conditioning_matches_diffusers(cached_folder: Path, tmp_path: Path, caption: str, trained: tuple) -> None:
    from diffusers import StableDiffusionXLPipeline

    (tmp_path / "own.py").write_text(f"class Own:\n    def caption(self, record, rng):\n        return {caption!r}\n")
    config, _ = load_config(cached_folder / "tiny.yaml", ["data.caption.dropout_rate=0"])
    source = resolve_model(config.model)
    index, _ = open_training_set(config)
    assert index is not None
    strategy = load_strategy(f"{tmp_path / 'own.py'}:Own")
    dataset = build_dataset(config, index, load_tokenizers(source, config.model), strategy)
    row = next(row for row in range(len(index)) if index.row(row)["crop_left"] or index.row(row)["crop_top"])
    record = index.row(row)
    bucket = (record["bucket_width"], record["bucket_height"])
    batch = dataset[MicroSpec(bucket=bucket, rows=np.array([row]), epochs=np.zeros(1, int), positions=np.zeros(1, int))]
    loaded = load_text_encoders(source, config.model)
    encoders = dict(zip(ENCODERS, loaded, strict=True))
    for name in trained:
        unfreeze_text_encoder(encoders[name].eval(), gradient_checkpointing=False)
    networks = TrainedNetworks(load_unet(source, config.engine), **{name: encoders[name] for name in trained}).eval()
    text = TextConditioner(loaded, trained).build_inputs(batch, torch.device("cpu"))
    ours = capture_conditioning(networks.unet, lambda: networks(batch.latents, torch.tensor([7]), text, batch.time_ids))

    pipeline = StableDiffusionXLPipeline.from_pretrained(cached_folder / "model", add_watermarker=False)
    theirs = capture_conditioning(
        pipeline.unet,
        lambda: pipeline(
            caption,
            width=bucket[0],
            height=bucket[1],
            original_size=(record["original_height"], record["original_width"]),
            crops_coords_top_left=(record["crop_top"], record["crop_left"]),
            target_size=bucket[::-1],
            num_inference_steps=1,
            guidance_scale=1.0,
        ),
    )
    assert ours.keys() == theirs.keys() == {"hidden", "text_embeds", "time_ids"}
    assert len(set(ours["time_ids"][0].tolist())) > 3 and ours["hidden"].shape[1] == 77
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6, msg=name)
