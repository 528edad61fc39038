"""A measurement from models to result: open, write images, compute features, measure."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from loguru import logger
from PIL import Image

from sdxl_trainer.configs.problems import Problem, UserInputError, format_count, raise_if_any
from sdxl_trainer.data.checks.folders import check_writable
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import (
    Ranks,
    broadcast_object,
    close_ranks,
    gather_objects,
    init_ranks,
    read_environment,
    wait_for_ranks,
)
from sdxl_trainer.launch.kernels import set_tf32
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.train.quality.comparison import (
    FeatureSet,
    correct_verdicts,
    list_floors,
    list_lines,
    list_subsets,
    measure_features,
    measure_x0,
)
from sdxl_trainer.train.quality.drawing import share_work, write_generated_images, write_validation_images
from sdxl_trainer.train.quality.feature_cache import hash_images, read_blocks, write_block
from sdxl_trainer.train.quality.features import (
    OPTION,
    FeatureModel,
    check_features,
    identify_features,
    load_features,
)
from sdxl_trainer.train.quality.models import (
    Frame,
    check_models,
    check_once,
    choose_labels,
    identify_drawing,
    identify_vae_files,
    open_models,
)
from sdxl_trainer.train.quality.result import Quality, write_lines
from sdxl_trainer.train.quality.validation_images import (
    MIN_IMAGES,
    UNSAFE,
    build_validation_images,
    open_samples,
    without_cached_text,
)

FEATURE_BATCH = 32
IMAGES_A_BLOCK = 512  # whose features are stored together; less is lost when the job is stopped
RESULT = "quality.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A measurement as the command line asks for it."""

    models: Sequence[str]
    features: Sequence[Path]
    average: str | None
    max_images: int | None
    cfg: Path | None
    out: Path | None
    overrides: Sequence[str]


def run_quality(request: Request, as_json: bool = False) -> None:
    """Draw images for the captions of the validation set, measure them, and print the result.

    What is drawn or computed already is not done again.

    Raises:
        UserInputError: models, feature models or settings are wrong; the message lists every problem.
    """
    rank = read_environment().rank
    init_logger(rank)
    frame = open_models(request.models, request.average, request.cfg, request.overrides)
    config, opened, identities = without_cached_text(frame.config), None, []
    if rank == 0:  # the other ranks wait for rank 0 in init_ranks
        found = [*frame.problems, *check_out(request, frame)]
        found += [problem for path in request.features for problem in check_features(path)]
        found += check_once(OPTION, request.features)
        if not frame.problems:  # the defaults in place of wrong settings would contradict data and model
            found += check_models(frame, request.average)
            opened, of_set = open_samples(config, request.max_images)
            found += of_set
        raise_if_any(found)
        identities = [identify_features(path) for path in request.features]
    ranks = init_ranks(config.engine.timeout_minutes)
    set_tf32(False)
    path, rows, identities = broadcast_object(opened and (opened.index.path, opened.rows.tolist(), identities))
    images = build_validation_images(config, Index(path), rows)
    out = choose_out(request, frame)
    with ACTIVITY.during("decoding the validation images"):
        reference = out / f"validation-{identify_vae_files(config)[:12]}"
        bad = write_validation_images(reference, images, config, ranks)
    samples = [sample for sample in images.samples if sample.key not in bad]
    if len(samples) < MIN_IMAGES:
        cure = "repair the latents: bash launch/cache.sh --repair"
        rule = f"leaves too few samples that can be read: at least {MIN_IMAGES}"
        raise UserInputError([Problem("validation", len(samples), rule, cure)])
    drawn = {model.label: out / f"{_name(model.label)}-{identify_drawing(model)[:12]}" for model in frame.models}
    for model in frame.models:
        with ACTIVITY.during(f"generating images of {model.label}"):
            write_generated_images(drawn[model.label], model, samples, ranks)
    wait_for_ranks("the images")
    folders = [reference, *drawn.values()]
    files = [[folder / sample.file_name for sample in samples] for folder in folders]
    sets = [
        compute_feature_set(load_features(path, name, identity, ranks.device), out, files, ranks)
        for path, name, identity in zip(request.features, choose_labels(request.features), identities, strict=True)
    ]
    quality = measure(frame, sets, {sample.key for sample in samples}, drawn, ranks)
    if ranks.is_main:
        write_result(out / RESULT, quality, as_json)
    close_ranks()


def check_out(request: Request, frame: Frame) -> Iterator[Problem]:
    """Yield a problem if images have no place: no folder is given, and the first model is not in a run."""
    if request.out is not None:
        yield from check_writable("--out", request.out)
    elif len(frame.models) == len(request.models) and frame.models[0].run_folder is None:
        rule = "is needed: the first model is not in a run folder"
        yield Problem("--out", None, rule, "give a folder for the images")


def choose_out(request: Request, frame: Frame) -> Path:
    """Return the folder for images and features."""
    return request.out or (frame.models[0].run_folder or Path()) / "quality"


def compute_feature_set(model: FeatureModel, out: Path, files: Sequence[Sequence[Path]], ranks: Ranks) -> FeatureSet:
    """Compute the features that are not cached, and return all of them. All ranks call it together and share them.

    Args:
        files: images of the validation set, and of each model.
    """
    folder = out / "features" / model.identity[:16]
    with ACTIVITY.during(f"computing features with {model.name}"):
        all_files = [file for group in files for file in group]
        hashed = hash_images(all_files[ranks.rank :: ranks.world_size])
        digests = {file: digest for part in gather_objects(hashed) for file, digest in part.items()}
        by_digest = {digest: file for file, digest in digests.items()}
        known = read_blocks(folder)
        order = sorted(by_digest)
        missing = share_work(range(len(order)), lambda number: order[number] not in known, ranks)
        mine = [order[number] for number in missing[ranks.rank :: ranks.world_size]]
        computed = compute_features(model, folder, {digest: by_digest[digest] for digest in mine})
        for part in gather_objects(computed):
            known |= part
    if ranks.is_main:
        logger.info("{}: features of {} computed", model.name, format_count(len(missing), "image"))
    reference, *drawn = (
        torch.from_numpy(np.stack([known[digests[file]] for file in group])).to(ranks.device) for group in files
    )
    return FeatureSet(model.name, model.is_clip, drawn, reference)


def compute_features(model: FeatureModel, folder: Path, files: dict[bytes, Path]) -> dict[bytes, np.ndarray]:
    """Compute and store the features of images, by the SHA-256 of each image."""
    computed, block = {}, {}
    digests = list(files)
    for start in range(0, len(digests), FEATURE_BATCH):
        batch = digests[start : start + FEATURE_BATCH]
        images = [load_image(files[digest]) for digest in batch]
        block |= dict(zip(batch, model.compute(images).numpy(), strict=True))
        ACTIVITY.note_piece(start + len(batch), len(digests))
        if len(block) >= IMAGES_A_BLOCK or start + len(batch) == len(digests):
            write_block(folder, block)
            computed |= block
            block = {}
    return computed


def load_image(file: Path) -> Image.Image:
    """Load the pixels of an image."""
    with Image.open(file) as image:
        return image.convert("RGB")


def measure(frame: Frame, sets: Sequence[FeatureSet], keys: set[str], drawn: dict[str, Path], ranks: Ranks) -> Quality:
    """Compute all measures. All ranks call it together."""
    labels = [model.label for model in frame.models]
    lines, notes = measure_x0(frame.models, keys)
    subsets, floors = [], []
    for features in sets:
        with ACTIVITY.during(f"measuring with {features.name}"):
            found = measure_features(features, ranks)
        for name, resampled in found.items():
            lines += list_lines(name, features.name, labels, resampled)
        subsets += list_subsets(features, labels)
        floors += list_floors(features, list(found), labels)
        number, size = features.reference.shape
        if number <= size:
            notes.append(
                f"FID with {features.name}: {number} images are too few for {size} numbers an image, so it is far too "
                "high; compare it only between models with as many images"
            )
    if len(labels) > 1:
        notes.append(
            "verdicts are on these weights, with these captions and this noise; whether a setting helps takes three "
            "seeds of each (sdxl-trainer compare)"
        )
    return Quality(
        models=labels,
        num_images=len(keys),
        feature_sizes={features.name: features.reference.shape[1] for features in sets},
        lines=correct_verdicts(lines),
        subsets=subsets,
        floors=floors,
        notes=notes,
        folders={label: str(folder) for label, folder in drawn.items()},
    )


def write_result(file: Path, quality: Quality, as_json: bool) -> None:
    """Write the result as JSON beside the images, and print it."""
    encoded = msgspec.json.format(msgspec.json.encode(quality)).decode() + "\n"
    write_atomic(file, encoded)
    sys.stdout.write(encoded if as_json else "".join(f"{line}\n" for line in write_lines(quality)) + f"\n{file}\n")


def _name(label: str) -> str:
    return UNSAFE.sub("_", label)[-60:]
