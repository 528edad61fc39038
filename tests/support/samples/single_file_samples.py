"""Samples for the tests of single files: a tiny SDXL, and sparse safetensors files."""

import json
import math

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_trainer.cache.models.single_file_check import load_component_configs
from sdxl_trainer.cache.models.single_file_names import build_name_table

LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"
POSITION_IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
FULL = load_component_configs()
# All widths differ as far as SDXL allows it, so that swapped axes and names are found.
TINY = {
    "unet": {
        **FULL["unet"],
        "block_out_channels": [16, 32, 48],
        "attention_head_dim": [2, 4, 6],
        "norm_num_groups": 8,
        "transformer_layers_per_block": [1, 2, 3],
        "cross_attention_dim": 24 + 40,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 56 + 6 * 8,
        "sample_size": 8,
    },
    "vae": {
        **FULL["vae"],
        "block_out_channels": [8, 16, 24, 32],
        "norm_num_groups": 4,
        "sample_size": 32,
        "layers_per_block": 1,
    },
    "text_encoder": {
        **FULL["text_encoder"],
        "vocab_size": 100,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "projection_dim": 24,
    },
    "text_encoder_2": {
        **FULL["text_encoder_2"],
        "vocab_size": 100,
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "projection_dim": 56,
    },
}


def build_modules(configs, device):
    with torch.device(device):
        return {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"])),
        }


def build_tiny_modules():
    """Build the four tiny models with random weights, also in norms, whose ones and zeros would hide swapped names."""
    modules = build_modules(TINY, "cpu")
    generator = torch.Generator().manual_seed(0)
    for module in modules.values():
        for parameter in module.parameters():
            parameter.data.normal_(generator=generator)
    return modules


def write_fake(path, tensors, metadata=None):
    """Write a sparse safetensors file of tensors given as name → (dtype, shape)."""
    begin, entries = 0, {} if metadata is None else {"__metadata__": metadata}
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * {"F16": 2, "F32": 4, "I64": 8, "I8": 1}[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
    return path


def fake_tensors(configs):
    return {
        row.file_name: ("F16", row.file_shape)
        for component, config in configs.items()
        for row in build_name_table(component, config)
    }
