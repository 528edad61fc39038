"""Name tables: the full-size model's names, the modules' own names, and diffusers' converters."""

import math
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils as judge
from samples.single_file_samples import FULL, LOGIT_SCALE, TINY, build_modules, fake_tensors

from sdxl_trainer.cache.models.single_file_names import (
    COMPONENT_PREFIXES,
    build_name_table,
    get_canonical_name,
    list_source_names,
)


@pytest.fixture(scope="module")
def modules():
    return {"full": build_modules(FULL, "meta"), "tiny": build_modules(TINY, "meta")}


def test_full_size_has_the_tensors_of_sdxl_base():
    rows = [row for component, config in FULL.items() for row in build_name_table(component, config)]
    assert len(rows) == len({row.file_name for row in rows}) == 2514
    assert sum(math.prod(row.file_shape) for row in rows) == 3_468_837_868
    assert [row.file_name for row in rows if row.carried] == [LOGIT_SCALE]
    shapes = {row.file_name: row.file_shape for row in rows}
    unet, vae, bigg = (COMPONENT_PREFIXES[name] for name in ("unet", "vae", "text_encoder_2"))
    # Shapes of the published model file.
    for name, shape in {
        f"{unet}label_emb.0.0.weight": (1280, 2816),
        f"{unet}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{unet}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        f"{unet}input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        f"{unet}middle_block.1.proj_in.weight": (1280, 1280),
        f"{unet}output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.3.0.skip_connection.weight": (640, 1920, 1, 1),
        f"{unet}output_blocks.8.0.in_layers.2.weight": (320, 640, 3, 3),
        f"{vae}encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        f"{vae}encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        f"{vae}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        f"{vae}decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        f"{bigg}transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        f"{bigg}positional_embedding": (77, 1280),
        f"{bigg}text_projection": (1280, 1280),
    }.items():
        assert shapes[name] == shape, name
    for kind, present in {"xl_base": True, "clip_sdxl": True, "open_clip_sdxl": True, "xl_refiner": False}.items():
        assert (judge.CHECKPOINT_KEY_NAMES[kind] in shapes) is present, kind


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_tables_are_bijections_onto_the_models(size, modules):
    configs = FULL if size == "full" else TINY
    for component, module in modules[size].items():
        expected = {
            get_canonical_name(component, name): tuple(tensor.shape) for name, tensor in module.state_dict().items()
        }
        rows = [row for row in build_name_table(component, configs[component]) if not row.carried]
        sources = [(name, row.source_shape) for row in rows for name in row.sources]
        assert len(sources) == len(dict(sources)) and dict(sources) == expected
        assert len({row.file_name for row in rows}) == len(rows)
        assert list_source_names(component, configs[component]) == [name for name, _ in sources]
        for row in rows:
            assert math.prod(row.file_shape) == len(row.sources) * math.prod(row.source_shape)


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_diffusers_converters_find_every_name(size, modules):
    configs = FULL if size == "full" else TINY
    checkpoint = {name: torch.empty(shape, device="meta") for name, (_, shape) in fake_tensors(configs).items()}
    converted = {
        "unet": judge.convert_ldm_unet_checkpoint(dict(checkpoint), configs["unet"]),
        "vae": judge.convert_ldm_vae_checkpoint(dict(checkpoint), configs["vae"]),
        "text_encoder": judge.convert_ldm_clip_checkpoint(dict(checkpoint)),
        "text_encoder_2": judge.convert_open_clip_checkpoint(
            modules[size]["text_encoder_2"], checkpoint, prefix=COMPONENT_PREFIXES["text_encoder_2"]
        ),
    }
    for component, module in modules[size].items():
        expected = {get_canonical_name(component, name): tensor.shape for name, tensor in module.state_dict().items()}
        assert {name: tensor.shape for name, tensor in converted[component].items()} == expected


def test_configs_with_one_number_for_all_blocks_and_convolutional_projections():
    config = {**TINY["unet"], "transformer_layers_per_block": 2, "layers_per_block": 1, "use_linear_projection": False}
    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(config)
    rows = build_name_table("unet", config)
    assert {row.sources[0]: row.file_shape for row in rows} == {
        name: tuple(tensor.shape) for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("unet", {"addition_embed_type": None}, "addition_embed_type is None"),
        ("unet", {"cross_attention_dim": None}, "cross_attention_dim is missing"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 3}, "block type 'AttnDownBlock2D'"),
        ("unet", {"transformer_layers_per_block": [1, 2]}, "not one number per block"),
        ("unet", {"up_block_types": ["UpBlock2D"]}, "are of different lengths"),
        ("vae", {"block_out_channels": None}, "block_out_channels is missing"),
        ("clip", {}, "must be one of unet"),
    ],
)
def test_configs_of_another_topology_are_refused(component, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_name_table(component, {**TINY.get(component, {}), **change})
