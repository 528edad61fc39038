"""Tiny feature models with random weights, written as their publishers write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

IMAGE_PX, PATCH_PX = 28, 14
DINOV2_PROCESSOR = {  # as facebook/dinov2-base has it, but for its sizes
    "crop_size": {"height": IMAGE_PX, "width": IMAGE_PX},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 32},
}


@pytest.fixture(scope="session")
def write_clip() -> Callable:
    """`_write_clip`."""
    return _write_clip


@pytest.fixture(scope="session")
def write_dinov2() -> Callable:
    """`_write_dinov2`."""
    return _write_dinov2


def _write_clip(folder: Path, with_text: bool = False) -> tuple[Any, Any]:
    """Write a CLIP, by itself its network for images; return the network and the processor."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": IMAGE_PX, "patch_size": PATCH_PX}
    if with_text:
        text = {**sizes, "hidden_size": 16, "vocab_size": 50}
        network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        network = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=16))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_PX}, crop_size={"height": IMAGE_PX, "width": IMAGE_PX}
    )
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return network.eval().requires_grad_(False), processor


def _write_dinov2(folder: Path) -> Any:
    """Write a DINOv2, and return it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    settings = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE_PX, patch_size=PATCH_PX
    )
    network = Dinov2Model(settings)
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV2_PROCESSOR))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def inception_weights() -> dict[str, torch.Tensor]:
    """Random weights of FID's Inception, with which activations keep their size."""
    from sdxl_trainer.train.quality.inception import list_shapes

    random, state = np.random.default_rng(7), {}
    for name, shape in sorted(list_shapes().items()):
        values = random.standard_normal(shape, np.float32)
        if name.endswith("conv.weight"):
            values *= np.float32((2 / np.prod(shape[1:])) ** 0.5)
        elif name.endswith("running_var"):
            values = 1 + 0.1 * np.abs(values)
        elif name.endswith("bn.weight"):
            values = 1 + 0.1 * values
        else:
            values = 0.1 * values
        state[name] = torch.from_numpy(np.asarray(values, np.float32))
    return state
