"""Cache text encoder outputs: check the settings, compute the identity of the outputs, and load the encoders."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow.compute as pc
import torch

from sdxl_trainer.cache.encode.encode_plan import DTYPE_BYTES, TextRequirement
from sdxl_trainer.cache.encode.pipeline import TextJob
from sdxl_trainer.cache.encode.text_encoder import CaptionEncoder, TextNetworks
from sdxl_trainer.cache.models.encoders import hash_weights, load_text_encoders, load_tokenizers
from sdxl_trainer.cache.models.source import ModelSource, resolve_model
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import CacheConfig, Config, DataConfig, ModelConfig
from sdxl_trainer.data.files import describe_file
from sdxl_trainer.data.formats.manifest import TextIdentity
from sdxl_trainer.data.formats.text_cache import (
    STATE_FILE,
    read_text_state,
    verify_text_state,
    write_text_state,
)
from sdxl_trainer.data.formats.text_outputs import BadTextError, pack_text
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.metadata.records import parse_record
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.text.cached_text import CachedText
from sdxl_trainer.data.text.captions import build_caption_settings, has_both_texts
from sdxl_trainer.data.text.strategy import StrategyError, load_strategy, supplies_captions
from sdxl_trainer.data.text.tokens import CaptionTokenizer
from sdxl_trainer.data.text.variants import CaptionVariants, is_choice_random, list_random_settings

MAX_CHECKED_SAMPLES = 10_000  # samples whose captions are compared with their cached text before a run


class TextShapes(NamedTuple):
    """Shapes of the arrays in `TextOutputs`."""

    hidden_1: tuple[int, ...]
    hidden_2: tuple[int, ...]
    pooled: tuple[int, ...]


def check_captioning(data: DataConfig, cache: CacheConfig, index: Index | None) -> Iterator[Problem]:
    """Yield a problem for each caption setting that cached text cannot support.

    Args:
        index: index of the records or latents, of which at most `MAX_CHECKED_SAMPLES` are searched for two texts.
    """
    if not cache.text:
        return
    caption = data.caption
    if cache.text_variants == 1 and (random_settings := _list_random_settings(data, index)):
        keys = ", ".join(f"data.caption.{name}" for name in random_settings)
        rule = f"would keep one random form of each caption, although {keys} makes a new one each time"
        cure = "set cache.text_variants to 2 or more, switch these settings off, or set cache.text: false"
        yield Problem("cache.text_variants", 1, rule, cure)
    if caption.token_warmup_steps:
        rule = "makes captions depend on the step, which is impossible with cached text"
        cure = "set it to 0, or cache.text: false"
        yield Problem("data.caption.token_warmup_steps", caption.token_warmup_steps, rule, cure)


def _list_random_settings(data: DataConfig, index: Index | None) -> list[str]:
    settings, both = data.caption, False
    if index is not None and is_choice_random(settings) and not supplies_captions(data.strategy):
        rows = select_evenly(len(index), MAX_CHECKED_SAMPLES).tolist()
        both = any(has_both_texts(orjson.loads(index.row(row)["record"]), settings.separator) for row in rows)
    return list_random_settings(settings, both)


def check_cached_text(config: Config, index: Index | None) -> Iterator[Problem]:
    """Yield a problem if the cache does not hold current text encoder outputs for all samples.

    Captions are compared for at most `MAX_CHECKED_SAMPLES` evenly spaced samples. Training checks every sample when it
    is read.

    Args:
        index: index of the latents; None checks only the settings.
    """
    problems = list(check_captioning(config.data, config.cache, index))
    if config.cache.on_missing == "encode":
        rule = "encodes latents without text, but cache.text needs text for all samples"
        problems.append(Problem("cache.on_missing", "encode", rule, "set it to skip or error, or cache.text: false"))
    yield from problems
    if problems or index is None:
        return
    folder = get_cache_folder(config)
    damage = verify_text_state(folder)
    if damage is None and not (folder / STATE_FILE).is_file():
        damage = f"{folder} holds no cached text"
    rule = damage or _describe_outdated(config, folder, index)
    if rule is not None:
        cure = "run bash launch/cache.sh with the same settings, or set cache.text: false"
        is_listed, is_in_shard = (index.arrow_column(name).is_valid().to_numpy() for name in ("sha256", "offset"))
        if (is_in_shard & ~is_listed).any():  # shards that are metadata: a job encodes nothing for them
            cure = "set cache.text: false, or cache.dir to the cache of these latents: its manifest must list them"
        yield Problem("cache.text", True, rule, cure)


def _describe_outdated(config: Config, folder: Path, index: Index) -> str | None:
    """Describe how many samples have no text, or text of other settings or captions; None if all text is current."""
    identity = compute_text_identity(config.model, config.data, config.cache.dtype, folder)
    names = pc.call_function("struct_field", [index.arrow_column("text")], pc.StructFieldOptions(["identity"]))
    num_missing = names.null_count
    num_outdated = len(names) - num_missing - names.to_pylist().count(identity.name)
    if num_missing or num_outdated:
        change = _describe_change(folder, identity)
        return f"of {len(index)} samples, {num_missing} have no cached text and {num_outdated} have text made {change}"
    text = CachedText(folder, build_caption_variants(config.data, config.cache.text_variants), config.run.seed)
    rows = select_evenly(len(index), MAX_CHECKED_SAMPLES).tolist()
    faults = [fault for row in rows if (fault := _describe_row_fault(text, index.row(row))) is not None]
    return f"is outdated in {len(faults)} of {len(rows)} checked samples, first {faults[0]}" if faults else None


def _describe_row_fault(text: CachedText, row: dict[str, Any]) -> str | None:
    try:
        text.verify(row, parse_record(row))
    except (BadTextError, StrategyError) as error:
        return f"{row['key']}: {error}"
    return None


def _describe_change(folder: Path, identity: TextIdentity) -> str:
    """Describe the settings of the cached text that differ from the current settings."""
    state = read_text_state(folder)
    if state is None or state.identity == identity:
        return "with other settings"
    known, wanted = asdict(state.identity), asdict(identity)
    return f"with {', '.join(f'{name} {known[name]}' for name in wanted if known[name] != wanted[name])}"


def build_caption_variants(data: DataConfig, num_variants: int) -> CaptionVariants:
    """Build the caption variants that the settings describe."""
    strategy = load_strategy(data.strategy) if data.strategy else None
    return CaptionVariants(build_caption_settings(data.caption), num_variants, strategy)


def compute_text_shapes(model: ModelConfig, max_tokens: int) -> TextShapes:
    """Compute the shapes of the text encoder outputs of one caption."""
    source = resolve_model(model)
    widths = [source.read_config(name)["hidden_size"] for name in ("text_encoder", "text_encoder_2")]
    # The start and end marks between windows are left out.
    length = max_tokens + 2
    projected = source.read_config("text_encoder_2")["projection_dim"]
    return TextShapes((length, widths[0]), (length, widths[1]), (projected,))


def build_text_requirement(
    model: ModelConfig, data: DataConfig, cache: CacheConfig, identity: TextIdentity
) -> TextRequirement:
    """Build the description of the text encoder outputs that the settings require."""
    num_values = sum(math.prod(shape) for shape in compute_text_shapes(model, data.max_tokens))
    return TextRequirement(
        variants=build_caption_variants(data, cache.text_variants),
        identity=identity,
        caption_bytes=num_values * DTYPE_BYTES[cache.dtype],
        in_shards=cache.format == "shards",
    )


def compute_text_identity(model: ModelConfig, data: DataConfig, dtype: str, folder: Path) -> TextIdentity:
    """Compute the identity of the text encoder outputs under these settings.

    The encoders are loaded and hashed, unless the cache in `folder` was made from the same unchanged files.
    """
    source = resolve_model(model)
    tokenizer, tokenizer_2 = (_hash_tokenizer(tokenizer) for tokenizer in load_tokenizers(source, model))
    known = read_text_state(folder)
    if known is not None and known.sources == list_text_encoder_files(source, model):
        encoder, encoder_2 = known.identity.encoder_sha256, known.identity.encoder_2_sha256
    else:
        encoder, encoder_2 = (hash_weights(encoder) for encoder in load_text_encoders(source, model))
    return TextIdentity(
        encoder_sha256=encoder,
        encoder_2_sha256=encoder_2,
        tokenizer_sha256=tokenizer,
        tokenizer_2_sha256=tokenizer_2,
        max_tokens=data.max_tokens,
        dtype=dtype,
        weighted=data.caption.weighted,
    )


def list_text_encoder_files(source: ModelSource, model: ModelConfig) -> list[Any]:
    """List what determines the encoders' weights: `model.text_projection`, and each file's size and mtime."""
    folders = [source.folder / name for name in ("text_encoder", "text_encoder_2")]
    files = [source.file] if source.file else [file for folder in folders for file in folder.glob("*.safetensors")]
    configs = [folder / "config.json" for folder in folders]
    return [model.text_projection, *(describe_file(file) for file in sorted([*files, *configs]))]


def load_text_job(
    model: ModelConfig, data: DataConfig, cache: CacheConfig, identity: TextIdentity, device: torch.device
) -> TextJob:
    """Load the text encoders onto their device and build the job that encodes captions with them."""
    source = resolve_model(model)
    encoders = load_text_encoders(source, model, device)
    networks = TextNetworks(encoders, load_tokenizers(source, model))
    variants = build_caption_variants(data, cache.text_variants)
    return TextJob(CaptionEncoder(networks, data.max_tokens, data.caption.weighted), variants, identity.name)


def save_text_state(folder: Path, identity: TextIdentity, job: TextJob, model: ModelConfig) -> None:
    """Write `text.json` and the outputs of the empty caption, which all samples share."""
    empty = pack_text(job.encoder.launch([""]).wait(), identity.dtype)
    write_text_state(folder, identity, list_text_encoder_files(resolve_model(model), model), empty)


def is_text_state_valid(folder: Path, identity: TextIdentity) -> bool:
    """Return whether `text.json` and the outputs of the empty caption are intact and have this identity."""
    state = read_text_state(folder)
    return state is not None and state.identity == identity and verify_text_state(folder) is None


def _hash_tokenizer(tokenizer: CaptionTokenizer) -> str:
    """Return the SHA-256 of a vocabulary, its merges and the padding. It does not depend on the file format."""
    model = orjson.loads(tokenizer.tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    words = [sorted(model["vocab"].items()), merges, tokenizer.pad_id]
    return hashlib.sha256(orjson.dumps(words)).hexdigest()
