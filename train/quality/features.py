"""Feature models: networks on disk that turn images into numbers in which images are compared.

Weights are read as safetensors only, and no code of a model's folder runs. A folder's images are prepared by its own
processor of transformers, always the one that works with Pillow, so that an installed torchvision changes nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from sdxl_trainer.cache.models.pickled_file import is_pickled_file
from sdxl_trainer.cache.models.single_file_check import (
    NotSafetensorsError,
    read_json_object,
    read_safetensors_header,
)
from sdxl_trainer.cache.models.source import may_be_hub_id
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.data.files import hash_file
from sdxl_trainer.train.quality.inception import list_shapes, load_inception, prepare_for_inception

OPTION = "--features"
FORMAT = 1  # of the features; a change of how they are computed raises it
WEIGHTS, INDEX, CONFIG, PROCESSOR = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "preprocessor_config.json",
)


class FeatureKind(NamedTuple):
    """A kind of feature model of transformers."""

    model_class: str
    config_class: str
    output: str  # attribute of the network's output, [B, D]
    is_clip: bool = False


CLIP = FeatureKind("CLIPVisionModelWithProjection", "CLIPVisionConfig", "image_embeds", is_clip=True)
# `model_type` of config.json → kind.
KINDS = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "dinov2": FeatureKind("Dinov2Model", "Dinov2Config", "pooler_output"),
    "dinov2_with_registers": FeatureKind("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "pooler_output"),
}
CURE = "give the folder of a CLIP or DINOv2 model with model.safetensors, or FID's Inception (docs/QUALITY.md)"


@dataclass(frozen=True, kw_only=True)
class FeatureModel:
    """A loaded feature model."""

    name: str
    identity: str  # SHA-256 of weights, settings and preparation
    is_clip: bool
    prepare: Callable[[Image.Image], torch.Tensor]  # → [3, H, W]
    network: Callable[[torch.Tensor], torch.Tensor]  # [B, 3, H, W] → [B, D]
    device: torch.device

    @torch.no_grad()
    def compute(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the features of images of any size, [B, D] float32 on the host."""
        inputs = torch.stack([self.prepare(image.convert("RGB")) for image in images])
        return self.network(inputs.to(self.device)).float().cpu()


def check_features(path: Path) -> Iterator[Problem]:
    """Yield a problem if a path names no feature model, without reading its weights."""
    if not path.exists():
        if may_be_hub_id(str(path)):
            rule = "does not exist here, and ids of the hub are not looked up"
            cure = f"check the path, or fetch it: hf download {path} --local-dir models/{path.name}"
            yield Problem(OPTION, path, rule, cure)
        else:
            yield Problem(OPTION, path, "does not exist", "check the path")
    elif path.is_file():
        yield from _check_file(path)
    else:
        yield from _check_folder(path)


def _check_file(path: Path) -> Iterator[Problem]:
    if is_pickled_file(path):
        cure = f"convert it: python train/convert.py {path} {path.with_suffix('.safetensors')}"
        yield Problem(OPTION, path, "is a pickled file, which could run code", cure)
        return
    try:
        found = read_safetensors_header(path).shapes
    except NotSafetensorsError as error:
        yield Problem(OPTION, path, str(error), error.cure)
        return
    wrong = [name for name, shape in list_shapes().items() if tuple(found.get(name, ())) != shape]
    if wrong:
        rule = f"is not FID's Inception: {wrong[0]} is missing or has another shape"
        yield Problem(OPTION, path, rule, CURE)


def _check_folder(folder: Path) -> Iterator[Problem]:
    try:
        kind = read_json_object(folder / CONFIG).get("model_type")
        read_json_object(folder / PROCESSOR)
    except (OSError, ValueError) as error:
        yield Problem(OPTION, folder, f"is no model of transformers: {error}", CURE)
        return
    if kind not in KINDS:
        rule = f"is a model of the type {kind}, and not one of {', '.join(KINDS)}"
        yield Problem(OPTION, folder, rule, CURE)
    elif not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        convert = f"convert it: python train/convert.py {pickled} {folder / WEIGHTS}"
        rule = "has pickled weights, which could run code" if pickled else f"has no {WEIGHTS}"
        yield Problem(OPTION, folder, rule, convert if pickled else CURE)


def identify_features(path: Path) -> str:
    """Return the SHA-256 of a feature model's weights, settings, and preparation of images. Reads all weights."""
    parts: list[Any] = [FORMAT]
    if path.is_file():
        parts.append(hash_file(path))
    else:
        parts += [hash_file(file) for file in sorted(path.glob("*.safetensors"))]
        parts += [read_json_object(path / name) for name in (CONFIG, PROCESSOR)]
        parts += [version(library) for library in ("transformers", "pillow")]  # which prepare the images
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_features(path: Path, name: str, identity: str, device: torch.device) -> FeatureModel:
    """Load a feature model in fp32 that `check_features` accepts.

    Args:
        name: shown with its measures.
        identity: as `identify_features` returns it.

    Raises:
        UserInputError: weights are missing or misshapen, or the folder asks for code of its own.
    """
    try:
        if path.is_file():
            network, prepare, is_clip = load_inception(path, device), prepare_for_inception, False
        else:
            network, prepare, is_clip = _load_folder(path, device)
    # transformers raises RuntimeError for misshapen weights, and ValueError where a processor needs code of the folder.
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserInputError([Problem(OPTION, path, f"cannot be loaded: {reason}", CURE)]) from error
    return FeatureModel(name=name, identity=identity, is_clip=is_clip, prepare=prepare, network=network, device=device)


def _load_folder(folder: Path, device: torch.device) -> tuple[Callable, Callable, bool]:
    import transformers

    settings = read_json_object(folder / CONFIG)
    kind = KINDS[settings["model_type"]]
    network: Any
    network, report = getattr(transformers, kind.model_class).from_pretrained(
        folder,
        config=getattr(transformers, kind.config_class)(**_find_vision_settings(settings)),
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise ValueError(f"the weights lack {sorted(report['missing_keys'])[0]}")
    processor = transformers.AutoImageProcessor.from_pretrained(
        folder, backend="pil", local_files_only=True, trust_remote_code=False
    )
    network = network.to(device).eval().requires_grad_(False)

    def prepare(image: Image.Image) -> torch.Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    def compute(pixels: torch.Tensor) -> torch.Tensor:
        return getattr(network(pixel_values=pixels), kind.output)

    return compute, prepare, kind.is_clip


def _find_vision_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the network for images. Those of a whole CLIP have its projection's width beside them."""
    if settings["model_type"] != "clip":
        return settings
    return {**settings["vision_config"], "projection_dim": settings["projection_dim"]}
