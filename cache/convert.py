"""Caches in other forms, without the VAE: npz files to shards, shards to npz files, and adopting what others wrote."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sdxl_trainer.cache.items import ITEM_ERRORS, check_item, check_item_text, read_item, read_item_text
from sdxl_trainer.cache.pipeline import choose_text_file
from sdxl_trainer.cache.sinks import NpzSink, Sink
from sdxl_trainer.cache.verify import check_shards
from sdxl_trainer.data.bucket import BucketRule, Placement, Size, list_buckets, place_image
from sdxl_trainer.data.files import hash_file
from sdxl_trainer.data.index import Index
from sdxl_trainer.data.latents import BadLatentError, LatentSample, find_latent_file, parse_latents
from sdxl_trainer.data.manifest import Entry, Identity, ManifestWriter
from sdxl_trainer.data.transforms import BadImageError, read_image_size


def repack(
    folder: Path,
    entries: Mapping[str, Entry],
    sink: Sink,
    manifest: ManifestWriter,
    name_file: Callable[[Entry], str],
    get_record: Callable[[str], bytes],
) -> tuple[int, dict[str, str]]:
    """Copy every item's bytes into another form and list it there; then the old files may go (`remove_replaced`).

    Items already in the form that the sink makes are left. Bytes are checked against the manifest on the way, and one
    that fails is left where it is and returned: key → reason.

    Args:
        name_file: where an item's npz file goes.
        get_record: the JSON that goes beside a key's latents in a shard.
    """
    done, bad = 0, {}
    to_files = isinstance(sink, NpzSink)
    for key, entry in sorted(entries.items(), key=lambda pair: (pair[1].bucket, pair[1].file, pair[1].offset or 0)):
        if (entry.offset is None) == to_files:
            continue
        try:
            _, content = read_item(folder, entry)
            text = read_item_text(folder, entry)
        except ITEM_ERRORS as error:
            bad[key] = f"{entry.file}: {error}"
            continue
        target = _name_files(entry, name_file(entry)) if to_files else entry
        record = b"{}" if to_files else get_record(key)
        manifest.append(sink.store(target, bytes(content), record, None if text is None else bytes(text)))
        done += 1
    sink.close()
    return done, bad


def tidy_shards(folder: Path, entries: Mapping[str, Entry], sink: Sink, manifest: ManifestWriter) -> list[str]:
    """Copy what counts of shards that are not as they should be into new ones, and delete the old ones: those with
    samples that have been encoded again elsewhere, or with a damaged end. Returns their names.

    One that holds an item which cannot be read is left as it is.
    """
    uneven = set(check_shards(folder, entries.values()))
    listed: dict[str, list[Entry]] = {file: [] for file in uneven}
    for entry in entries.values():
        if entry.file in uneven:
            listed[entry.file].append(entry)
    for file, held in listed.items():
        if any(check_item(folder, entry) or check_item_text(folder, entry) for entry in held):
            uneven.remove(file)
            continue
        for entry in sorted(held, key=lambda entry: entry.offset or 0):
            record, content = read_item(folder, entry)
            beside = entry.text is not None and entry.text.offset is not None
            text = read_item_text(folder, entry) if beside else None
            manifest.append(sink.store(entry, bytes(content), bytes(record), None if text is None else bytes(text)))
    sink.close()
    for file in uneven:
        (folder / file).unlink()
    return sorted(uneven)


def remove_replaced(folder: Path, before: Mapping[str, Entry], after: Mapping[str, Entry]) -> int:
    """Delete the files of `before` that no entry of `after` needs any more. Returns how many went.

    Adopted files stay: they belong to the program that made them.
    """
    ours = [entry for entry in before.values() if not entry.adopted or entry.offset is not None]
    needed = {file for entry in after.values() for file in _list_entry_files(entry)}
    replaced = {file for entry in ours for file in _list_entry_files(entry)} - needed
    for file in replaced:
        (folder / file).unlink(missing_ok=True)
    return len(replaced)


def _list_entry_files(entry: Entry) -> list[str]:
    return [entry.file] if entry.text is None else [entry.file, entry.text.file]


def _name_files(entry: Entry, file: str) -> Entry:
    """An entry whose latents will be at `file`, and its text beside them."""
    text = None if entry.text is None else replace(entry.text, file=choose_text_file(file))
    return replace(entry, file=file, text=text)


def adopt_files(folder: Path, index: Index, known: Mapping[str, Entry], identity: Identity, rule: BucketRule
                ) -> Iterator[tuple[str, Entry | str]]:  # fmt: skip
    """Latent files of other programs that lie beside the pictures or in the cache folder, as entries of our manifest.

    Yields (key, entry), or (key, reason) for a file that does not fit the settings. Which VAE made a file cannot be
    told from it: adopting means vouching that it was the configured one.
    """
    buckets = list_buckets(rule)
    for row in range(len(index)):
        record = index.row(row)
        key, image = record["key"], Path(record["image_path"])
        if key in known:
            continue
        path = find_latent_file(image, folder)
        if path is None:
            continue
        try:
            content = path.read_bytes()
            placement = _check_fit(parse_latents(content), image, identity, rule, buckets)
        except (OSError, BadLatentError) as error:
            yield key, f"{path}: {error}"
            continue
        yield key, _build_entry(key, path, folder, content, image, identity, placement.crop_ltrb, placement.resized)


def _check_fit(
    sample: LatentSample, image: Path, identity: Identity, rule: BucketRule, buckets: list[Size]
) -> Placement:
    """How the picture of latents must have been placed.

    Raises:
        BadLatentError: they are not what these settings would make of the picture.
    """
    placement = place_image(sample.original_size, rule, buckets)
    wanted = (identity.flip, identity.posterior == "moments")
    found = (sample.flipped is not None, sample.std is not None)
    if placement.bucket != sample.bucket:
        raise BadLatentError(f"was made for bucket {sample.bucket}, the settings give {placement.bucket}")
    if wanted[0] and not found[0]:
        raise BadLatentError("has no latents of the mirrored picture, which cache.flip asks for")
    if wanted[1] != found[1]:
        raise BadLatentError(f"{'holds' if found[1] else 'lacks'} moments, cache.posterior is {identity.posterior}")
    if sample.dtype != identity.dtype:
        raise BadLatentError(f"holds {sample.dtype}, cache.dtype is {identity.dtype}")
    try:
        size = read_image_size(image) if image.suffix != ".npz" and image.is_file() else sample.original_size
    except BadImageError as error:
        raise BadLatentError(str(error)) from None
    if size != sample.original_size:
        raise BadLatentError(f"was made of a picture of {sample.original_size} px, which has {size} now")
    return placement


def _build_entry(key: str, path: Path, folder: Path, content: bytes, image: Path, identity: Identity,
                 crop: tuple[int, int, int, int], resized: tuple[int, int]) -> Entry:  # fmt: skip
    sample = parse_latents(content)
    inside = path.is_relative_to(folder)
    status = image.stat() if image.is_file() and image.suffix != path.suffix else None
    return Entry(
        key=key, file=str(path.relative_to(folder) if inside else path.absolute()), bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(), bucket=sample.bucket, original_size=sample.original_size,
        resized=resized, crop=crop, identity=identity.name, source_path=str(image),
        source_bytes=status.st_size if status else 0, source_mtime_ns=status.st_mtime_ns if status else 0,
        source_sha256=hash_file(image) if status else "", adopted=True, flipped=sample.flipped is not None,
    )  # fmt: skip
