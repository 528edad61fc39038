"""Adopt latents and text encoder outputs of other programs (`--adopt`)."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import orjson

from sdxl_trainer.cache.encode.encode_plan import TextRequirement
from sdxl_trainer.cache.encode.text_caching import TextShapes
from sdxl_trainer.data.files import hash_file, read_regular
from sdxl_trainer.data.formats.latent_header import read_latent_header
from sdxl_trainer.data.formats.latents import (
    BadLatentError,
    LatentSample,
    describe_other_channels,
    find_latent_file,
    parse_latents,
)
from sdxl_trainer.data.formats.manifest import Identity, ManifestEntry, TextPart
from sdxl_trainer.data.formats.refused_files import read_refused, write_refused
from sdxl_trainer.data.formats.shards import MAX_SAMPLE_BYTES
from sdxl_trainer.data.formats.text_outputs import BadTextError, parse_text_outputs
from sdxl_trainer.data.images.bucket import BucketRule, Placement, Size, list_buckets, place_image
from sdxl_trainer.data.images.image_files import TEXT_OUTPUTS_SUFFIX
from sdxl_trainer.data.images.transforms import BadImageError, read_image_size
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.missing_latents import get_key_folder
from sdxl_trainer.data.index.unlisted_latents import infer_placement
from sdxl_trainer.data.text.strategy import StrategyError
from sdxl_trainer.data.text.variants import hash_captions


class Refusal(NamedTuple):
    """The reason why a file is not adopted; `file` is given for latents, which training must not use either."""

    reason: str
    file: Path | None = None


@dataclass(frozen=True)
class TextAdopter:
    """Finds and verifies `<stem>_te_outputs.npz` files beside images or in the cache folder.

    Args:
        requirement: text encoder outputs that the settings require.
        shapes: expected shapes of the arrays of one caption.
        folder: the cache folder.
    """

    requirement: TextRequirement
    shapes: TextShapes
    folder: Path

    def adopt(self, image: Path, record: bytes, key_folder: str = "") -> TextPart | None:
        """Return the manifest's entry of an image's text file, or None if there is no file.

        Args:
            key_folder: folder below the cache folder that holds the files of the image's key.

        Raises:
            BadTextError: the file does not fit the settings.
            StrategyError: the user's class failed on the record.
        """
        name = image.stem + TEXT_OUTPUTS_SUFFIX
        path = next((path for path in (image.with_name(name), self.folder / key_folder / name) if path.is_file()), None)
        if path is None:
            return None
        content, captions = (
            read_regular(path, MAX_SAMPLE_BYTES).content,
            self.requirement.variants.build(orjson.loads(record)),
        )
        try:
            self._verify(content, len(captions))
        except BadTextError as error:
            raise BadTextError(f"{path}: {error}") from None
        file = _name_file(path, self.folder)
        digest, identity = hashlib.sha256(content).hexdigest(), self.requirement.identity.name
        return TextPart(
            file=file,
            bytes=len(content),
            sha256=digest,
            identity=identity,
            captions_sha256=hash_captions(captions),
            variants=len(captions),
        )

    def _verify(self, content: bytes, num_variants: int) -> None:
        outputs = parse_text_outputs(content, num_variants)[0]
        shapes = TextShapes(outputs.hidden_1.shape, outputs.hidden_2.shape, outputs.pooled.shape)
        if shapes != self.shapes:
            raise BadTextError(f"holds arrays of {_list_shapes(shapes)}, the settings give {_list_shapes(self.shapes)}")
        expected = self.requirement.identity.dtype
        dtype = "bfloat16" if b"_bf16.npy" in content else str(outputs.pooled.dtype)
        if dtype != expected:
            raise BadTextError(f"holds {dtype}, cache.dtype is {expected}")


def _name_file(path: Path, folder: Path) -> str:
    """Return a file's name in the manifest: relative to the cache folder, or absolute outside of it."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path.absolute())


def _list_shapes(shapes: TextShapes) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def adopt_files(
    folder: Path,
    index: Index,
    known: Mapping[str, ManifestEntry],
    identity: Identity,
    rule: BucketRule,
    text: TextAdopter | None = None,
) -> Iterator[tuple[str, ManifestEntry | Refusal]]:
    """Yield (key, manifest entry) for each usable file, (key, refusal) for each file that does not fit the settings.

    Files are searched beside the images and in the cache folder. A file does not name its VAE, text encoders or
    caption; the user who adopts the file asserts that they match the settings.

    Args:
        text: adopter of text encoder outputs; None skips them.
    """
    buckets = list_buckets(rule)
    for row in range(len(index)):
        record = index.row(row)
        key, image = record["key"], Path(record["image_path"])
        entry = known.get(key)
        if entry is None:
            path = find_latent_file(image, folder / get_key_folder(key))
            if path is None:
                continue
            try:
                content = read_regular(path, MAX_SAMPLE_BYTES).content
                sample = parse_latents(content)
                _verify_fit(sample, image, identity, rule, buckets)
                placement = infer_placement(read_latent_header(str(path)), sample.original_size, rule)
            except (OSError, BadLatentError) as error:
                yield key, Refusal(f"{path}: {error}", path)
                continue
            entry = _build_entry(key, _name_file(path, folder), content, sample, image, identity, placement)
        if text is not None and not text.requirement.is_valid(index.record_json(row), entry.text):
            try:
                entry = replace(
                    entry, text=text.adopt(image, index.record_json(row), get_key_folder(key)) or entry.text
                )
            except (OSError, BadTextError, StrategyError) as error:
                yield key, Refusal(str(error))
        if entry != known.get(key):
            yield key, entry


def list_refused(folder: Path, refusals: list[Refusal]) -> None:
    """List refused latents in the cache, so that training does not use them. Earlier ones stay until they change."""
    found = {}
    for file in (refusal.file for refusal in refusals if refusal.file is not None and refusal.file.exists()):
        status = file.stat()
        found[os.path.abspath(file)] = (status.st_size, status.st_mtime_ns)
    if found:
        write_refused(folder, read_refused(folder) | found)


def _verify_fit(sample: LatentSample, image: Path, identity: Identity, rule: BucketRule, buckets: list[Size]) -> None:
    """Compare latents with the settings and their image.

    Raises:
        BadLatentError: the latents do not fit the settings or the image.
    """
    bucket = place_image(sample.original_size, rule, buckets).bucket
    has_moments = sample.std is not None
    if len(sample.latents) != identity.latent_channels:
        raise BadLatentError(describe_other_channels(len(sample.latents), identity.latent_channels))
    if bucket != sample.bucket:
        raise BadLatentError(f"was made for bucket {sample.bucket}, the settings give {bucket}")
    if identity.flip and sample.flipped is None:
        raise BadLatentError("has no latents of the mirrored image, which cache.flip requires")
    if has_moments != (identity.posterior == "moments"):
        raise BadLatentError(f"{'holds' if has_moments else 'lacks'} moments, cache.posterior is {identity.posterior}")
    if sample.dtype != identity.dtype:
        raise BadLatentError(f"holds {sample.dtype}, cache.dtype is {identity.dtype}")
    try:
        size = read_image_size(image) if image.suffix != ".npz" and image.is_file() else sample.original_size
    except BadImageError as error:
        raise BadLatentError(str(error)) from None
    if size != sample.original_size:
        raise BadLatentError(f"was made from an image of {sample.original_size} px, which now has {size}")


def _build_entry(
    key: str,
    file: str,
    content: bytes,
    sample: LatentSample,
    image: Path,
    identity: Identity,
    placement: Placement,
) -> ManifestEntry:
    status = image.stat() if image.is_file() and image.suffix != ".npz" else None
    return ManifestEntry(
        key=key,
        file=file,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        bucket=sample.bucket,
        original_size=sample.original_size,
        resized=placement.resized,
        crop=placement.crop,
        identity=identity.name,
        source_path=str(image),
        source_bytes=status.st_size if status else 0,
        source_mtime_ns=status.st_mtime_ns if status else 0,
        source_sha256=hash_file(image) if status else "",
        adopted=True,
        flipped=sample.flipped is not None,
    )
