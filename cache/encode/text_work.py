"""Which text encoder outputs the settings ask for, and the networks that make them, loaded only where there is work."""

import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import pyarrow.compute as pc
import torch

from sdxl_trainer.cache.encode.pipeline import TextJob
from sdxl_trainer.cache.encode.text_encoder import TextEncoder, TextNetworks
from sdxl_trainer.cache.encode.work_list import DTYPE_BYTES, TextPlan
from sdxl_trainer.cache.models.encoders import hash_weights, load_text_encoders, load_tokenizers
from sdxl_trainer.cache.models.source import ModelSource, resolve_model
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.data.formats.manifest import TextIdentity
from sdxl_trainer.data.formats.text_cache import (
    STATE_FILE,
    describe_file,
    read_text_state,
    verify_text_state,
    write_text_state,
)
from sdxl_trainer.data.formats.text_outputs import BadTextError, pack_text
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.metadata.records import parse_record
from sdxl_trainer.data.text.cached_text import CachedText
from sdxl_trainer.data.text.captions import CaptionSettings
from sdxl_trainer.data.text.strategy import StrategyError, load_strategy
from sdxl_trainer.data.text.tokens import CaptionTokenizer
from sdxl_trainer.data.text.variants import CaptionVariants, list_random

NUM_TRIED = 10_000  # samples whose captions are looked at before a run


def check_captioning(config: Config) -> list[Problem]:
    """Settings that contradict cached text."""
    caption, cache, problems = config.data.caption, config.cache, []
    if not cache.text:
        return []
    random = list_random(build_caption_settings(config))
    if random and cache.text_variants == 1:
        named = ", ".join(f"data.caption.{name}" for name in random)
        rule = f"would freeze every caption at one draw, and {named} asks for a new one each time"
        cure = "set cache.text_variants to 2 or more, turn that off, or set cache.text: false"
        problems.append(Problem("cache.text_variants", 1, rule, cure))
    if caption.token_warmup_steps:
        rule = "makes captions depend on the step, which cached text cannot"
        cure = "set it to 0, or cache.text: false"
        problems.append(Problem("data.caption.token_warmup_steps", caption.token_warmup_steps, rule, cure))
    return problems


def check_cached_text(config: Config, index: Index | None) -> list[Problem]:
    """Whether all that training wants of cached text is there and true. Captions are looked at of a spread of samples;
    the others as they are read.

    Args:
        index: of the latents.
    """
    problems = check_captioning(config)
    if config.cache.on_missing == "encode":
        rule = "makes latents without text, and cache.text wants text for all"
        problems.append(Problem("cache.on_missing", "encode", rule, "set it to skip or error, or cache.text: false"))
    if problems or index is None:
        return problems
    folder = get_cache_folder(config)
    damage = verify_text_state(folder) or (
        None if (folder / STATE_FILE).is_file() else f"{folder} holds no cached text"
    )
    rule = damage or _describe_stale(config, folder, index)
    cure = "run bash launch/cache.sh with the same settings, or set cache.text: false"
    return [Problem("cache.text", True, rule, cure)] if rule else []


def _describe_stale(config: Config, folder: Path, index: Index) -> str | None:
    """How many samples have no text or text of other settings or captions, or None if all is well."""
    identity = identify_text(config, folder)
    made = pc.call_function("struct_field", [index.arrow_column("text")], pc.StructFieldOptions(["identity"]))
    missing = made.null_count
    stale = len(made) - missing - made.to_pylist().count(identity.name)
    if missing or stale:
        how = _describe_change(folder, identity)
        return f"of {len(index)} samples {missing} have no cached text and {stale} have text that was made {how}"
    text = CachedText(folder, build_variants(config), config.run.seed)
    rows = sorted({place * len(index) // NUM_TRIED for place in range(NUM_TRIED)})
    wrong = [reason for reason in (_describe_row(text, index.row(row)) for row in rows) if reason]
    return f"{len(wrong)} of {len(rows)} samples tried do not fit, the first being {wrong[0]}" if wrong else None


def _describe_row(text: CachedText, row: dict[str, Any]) -> str | None:
    try:
        text.check(row, parse_record(row))
    except (BadTextError, StrategyError) as error:
        return f"{row['key']}: {error}"
    return None


def _describe_change(folder: Path, identity: TextIdentity) -> str:
    """In what the cache's text was made otherwise."""
    state = read_text_state(folder)
    if state is None or state.identity == identity:
        return "otherwise"
    known, wanted = asdict(state.identity), asdict(identity)
    return f"with {', '.join(f'{name} {known[name]}' for name in wanted if known[name] != wanted[name])}"


def build_caption_settings(config: Config) -> CaptionSettings:
    """The caption pipeline's settings."""
    return CaptionSettings(**config.data.caption.model_dump())


def build_variants(config: Config) -> CaptionVariants:
    """What shapes the captions that are cached."""
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    return CaptionVariants(build_caption_settings(config), config.cache.text_variants, strategy)


def list_text_shapes(config: Config) -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays that the encoders make of a caption, as in data/formats/text_outputs.py."""
    source = resolve_model(config.model)
    widths = [source.read_config(name)["hidden_size"] for name in ("text_encoder", "text_encoder_2")]
    length = config.data.max_tokens + 2  # of all windows, whose inner beginnings and ends are left out
    return (length, widths[0]), (length, widths[1]), (source.read_config("text_encoder_2")["projection_dim"],)


def plan_text(config: Config, identity: TextIdentity) -> TextPlan:
    """The outputs that are wanted, and what they take."""
    values = sum(math.prod(shape) for shape in list_text_shapes(config))
    caption_bytes = values * DTYPE_BYTES[config.cache.dtype]
    return TextPlan(build_variants(config), identity, caption_bytes, in_shards=config.cache.format == "shards")


def identify_text(config: Config, folder: Path) -> TextIdentity:
    """What decides the outputs under these settings. Weights are hashed, which takes loading them, unless the cache at
    `folder` was made from the very same files."""
    source, model = resolve_model(config.model), config.model
    tokenizers = [_hash_tokenizer(tokenizer) for tokenizer in load_tokenizers(source, model)]
    known = read_text_state(folder)
    if known is not None and known.sources == list_text_sources(source, model):
        encoders = [known.identity.encoder_sha256, known.identity.encoder_2_sha256]
    else:
        encoders = [hash_weights(encoder) for encoder in load_text_encoders(source, model)]
    return TextIdentity(*encoders, *tokenizers, max_tokens=config.data.max_tokens, dtype=config.cache.dtype)


def list_text_sources(source: ModelSource, model: ModelConfig) -> list[Any]:
    """What decides the encoders' weights, told without reading them."""
    folders = [source.folder / name for name in ("text_encoder", "text_encoder_2")]
    files = [source.file] if source.file else [file for folder in folders for file in folder.glob("*.safetensors")]
    configs = [folder / "config.json" for folder in folders]
    return [model.text_projection, *(describe_file(file) for file in sorted([*files, *configs]))]


def start_text(config: Config, identity: TextIdentity, folder: Path, device: torch.device, write: bool) -> TextJob:
    """The encoders on their device, ready to work. With `write`, what all outputs have in common is written anew."""
    source = resolve_model(config.model)
    encoder, encoder_2 = (encoder.to(device) for encoder in load_text_encoders(source, config.model))
    networks = TextNetworks(encoder, encoder_2, *load_tokenizers(source, config.model))
    job = TextJob(TextEncoder(networks, config.data.max_tokens), build_variants(config), identity.name)
    if write:
        empty = pack_text(job.encoder.launch([""]).wait(), config.cache.dtype)
        write_text_state(folder, identity, list_text_sources(source, config.model), empty)
    return job


def is_text_state_current(folder: Path, identity: TextIdentity) -> bool:
    """Whether `text.json` and the empty caption's outputs are there, whole, and of this identity."""
    state = read_text_state(folder)
    return state is not None and state.identity == identity and verify_text_state(folder) is None


def _hash_tokenizer(tokenizer: CaptionTokenizer) -> str:
    """SHA-256 of a vocabulary, its merges and the padding: the same whatever file they came from."""
    model = orjson.loads(tokenizer.tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    words = [sorted(model["vocab"].items()), merges, tokenizer.pad_id]
    return hashlib.sha256(orjson.dumps(words)).hexdigest()
