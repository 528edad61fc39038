"""The cost of text encoders that run in each step: FLOPs as torch counts them, bytes as the cache stores them."""

import json
from typing import Any

import pytest
import torch
from programs import ROOT
from torch.utils.flop_counter import FlopCounterMode

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import build_config, load_config
from sdxl_trainer.train.estimates.memory_table import MemoryLimits, MemoryLine, MemoryTable
from sdxl_trainer.train.estimates.text_encoders import (
    compute_caption_bytes,
    count_encoder_flops,
    describe_text_encoders,
    has_random_captions,
)
from sdxl_trainer.train.networks.empty_networks import build_empty_encoder
from sdxl_trainer.train.networks.trained_networks import ENCODERS

SDXL = ModelSource(ROOT / "configs" / "sdxl")
ENCODER_BYTES = MemoryLine(component="frozen text encoders", device=1.64e9)
TABLE = MemoryTable(lines=(ENCODER_BYTES,), limits=MemoryLimits(device=None, host=None), micro_batch_size=1)


@pytest.mark.parametrize("name", ENCODERS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    encoder: Any = build_empty_encoder(SDXL, name)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, 77, dtype=torch.int64))
    settings = SDXL.read_config(name)
    pooled = 2 * settings["hidden_size"] * settings["projection_dim"] if name == "text_encoder_2" else 0
    assert count_encoder_flops(settings) + pooled == counter.get_total_flops()


@pytest.mark.parametrize(("num_windows", "expected"), [(1, 635_904), (3, 1_864_704)])
def test_stored_bytes_of_a_caption(num_windows: int, expected: int) -> None:
    """(77 or 227 positions x (768 + 1280) + 1280) x 4 bytes."""
    encoders = [SDXL.read_config(name) for name in ENCODERS]
    assert compute_caption_bytes(encoders, num_windows, 4) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # 111 GFLOP of 20.28 TFLOP + 111 GFLOP
        ("", "0.5% of the step's FLOPs and 1.64 GB; cache.text: true saves both and stores 0.64 MB an image"),
        ("cache.dtype=float16", "saves both and stores 0.32 MB an image"),
        ("data.max_tokens=225", "1.6% of the step's FLOPs"),
        ("engine.gradient_checkpointing=full data.max_tokens=225", "1.3% of the step's FLOPs"),
        ("lora.rank=4 data.max_tokens=225", "2.4% of the step's FLOPs"),
        ("data.caption.shuffle=true", "Captions are random: with cache.text_variants: 8 it stores 5.1 MB an image"),
        ("data.caption.wildcards=true cache.text_variants=16", "with cache.text_variants: 16 it stores 10 MB an image"),
        ("data.caption.dropout_rate=0.1", "saves both and stores 0.64 MB an image"),  # needs no variants
        ("cache.text=true", ""),
        ("data.caption.token_warmup_steps=10", ""),  # refuses cached text
        ("optim.text_encoder_lr=1e-6", ""),
    ],
)
def test_the_cost_and_what_storing_takes(words: str, expected: str) -> None:
    config, problems = build_config({}, ["engine.gradient_checkpointing=off", *words.split()])
    assert problems == []
    found = describe_text_encoders(config, SDXL, TABLE)
    assert expected in found and bool(expected) == bool(found), found


def test_presets_store_text_with_variants_where_captions_are_random() -> None:
    presets = {path.stem: load_config(path)[0] for path in sorted((ROOT / "configs").glob("sdxl_*.yaml"))}
    variants = {name: config.cache.text_variants for name, config in presets.items() if config.cache.text}
    whole = ("sdxl_full", "sdxl_vpred_ztsnr", "sdxl_flow", "sdxl_flux_vae")
    plain = ("sdxl_12gb", "sdxl_24gb", "sdxl_lowmem_offload", *whole)
    assert variants == {"sdxl_lora": 16, **dict.fromkeys(plain, 1)}
    assert [name for name in variants if has_random_captions(presets[name])] == ["sdxl_lora"]
    # The comments name the bytes that an image takes.
    encoders = [json.loads((ROOT / "configs/sdxl" / name / "config.json").read_text()) for name in ENCODERS]
    for name, comment in {
        **dict.fromkeys(whole, "1.9 MB"),
        "sdxl_lora": "10 MB",
    }.items():
        config = presets[name]
        stored = config.cache.text_variants * compute_caption_bytes(encoders, config.data.max_tokens // 75, 4)
        assert f"{stored / 1e6:.2g} MB" == comment
        assert f"{comment} an image" in (ROOT / "configs" / f"{name}.yaml").read_text()
