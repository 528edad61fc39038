"""Header checks: SDXL base is accepted, other kinds of model are named, damage is found."""

import re

import pytest
from samples.single_file_samples import FULL, POSITION_IDS, TINY, fake_tensors, write_fake

from sdxl_trainer.cache.models.single_file import read_single_file
from sdxl_trainer.cache.models.single_file_check import find_single_file_problems
from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, build_name_table
from sdxl_trainer.cache.models.source import check_model
from sdxl_trainer.configs.schema import ModelConfig


def test_the_full_size_header_is_recognised(tmp_path):
    tensors = {POSITION_IDS: ("I64", (1, 77)), **fake_tensors(FULL)}
    path = write_fake(tmp_path / "sdxl.safetensors", tensors)
    assert path.stat().st_size > 6_900_000_000
    assert find_single_file_problems(path) == []
    assert list(check_model(ModelConfig(path=str(path)))) == []  # without model.config, as everyone gives it


UNET = COMPONENT_PREFIXES["unet"]
FOREIGN_FILES = {
    "an SD1.5 model": {"cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,)},
    "an SD2 model": {"cond_stage_model.model.ln_final.bias": (1024,)},
    "a Flux model": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "an SD3 model": {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (4, 4)},
    "an SDXL refiner": {"conditioner.embedders.0.model.ln_final.bias": (1280,)},
    "a LoRA": {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 640)},
    "a ControlNet": {"control_model.time_embed.0.weight": (4, 4)},
    "weights in diffusers names": {"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)},
}


@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_other_kinds_of_model_are_named(tmp_path, kind):
    tensors = {name: ("F16", shape) for name, shape in FOREIGN_FILES[kind].items()}
    path = write_fake(tmp_path / "other.safetensors", tensors)
    problems = find_single_file_problems(path)
    assert problems[0].startswith(f"it looks like {kind}") and len(problems) > len(COMPONENT_PREFIXES)
    with pytest.raises(ValueError, match=f"cannot be read as SDXL unet: it looks like {kind}"):
        read_single_file(path, "unet", FULL["unet"])


def test_unets_of_other_families_without_text_encoders(tmp_path):
    for width, kind in ((768, "an SD1.5 model"), (1024, "an SD2 model"), (1280, "an SDXL refiner")):
        name = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        path = write_fake(tmp_path / "unet.safetensors", {name: ("F16", (320, width))})
        assert find_single_file_problems(path)[0].startswith(f"it looks like {kind}")


def test_inpainting_model(tmp_path):
    tensors = {**fake_tensors(TINY), f"{UNET}input_blocks.0.0.weight": ("F16", (16, 9, 3, 3))}
    path = write_fake(tmp_path / "inpaint.safetensors", tensors)
    with pytest.raises(ValueError, match=r"inpainting SDXL U-Net \(9 .*weight is \[16, 9, 3, 3\], not \[16, 4, 3, 3\]"):
        read_single_file(path, "unet", TINY["unet"])
    assert dict(read_single_file(path, "vae", TINY["vae"]))  # the VAE is SDXL's


def test_missing_unexpected_misshapen_and_quantised_tensors(tmp_path):
    tensors = fake_tensors(TINY)
    del tensors[f"{UNET}out.2.bias"]
    tensors[f"{UNET}out.3.bias"] = ("F16", (4,))
    tensors[f"{UNET}out.0.weight"] = ("F16", (17,))
    tensors[f"{UNET}time_embed.0.weight"] = ("I8", tensors[f"{UNET}time_embed.0.weight"][1])
    path = write_fake(tmp_path / "model.safetensors", tensors)
    problems = find_single_file_problems(path, TINY)
    assert problems == [
        f"unet: 1 of {len(build_name_table('unet', TINY['unet']))} names missing ({UNET}out.2.bias)",
        f"unet: 1 unknown names ({UNET}out.3.bias)",
        f"unet: 1 tensors with another shape ({UNET}out.0.weight is [17], not [16])",
        f"unet: 1 tensors with a type that cannot be trained ({UNET}time_embed.0.weight is I8)",
    ]
    with pytest.raises(ValueError) as error:
        read_single_file(path, "unet", TINY["unet"])
    assert all(problem in str(error.value) for problem in problems)
    wrong_config = {"unet": {**TINY["unet"], "class_embed_type": "timestep"}}
    assert find_single_file_problems(path, wrong_config) == [
        "unet config does not have SDXL's topology: class_embed_type is 'timestep'"
    ]
    no_vae = {name: entry for name, entry in fake_tensors(TINY).items() if not name.startswith("first_stage")}
    path = write_fake(tmp_path / "no_vae.safetensors", no_vae)
    assert find_single_file_problems(path, TINY) == [
        "vae: none of its tensors (no name begins with first_stage_model.)"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + b"\0" * 100, "is a pickled checkpoint"),
        (b"\xff" * 8 + b"{}", "is not a safetensors file or is cut short: it has 10 bytes"),
        ((4).to_bytes(8, "little") + b"{...", "its header cannot be read"),
        ((2).to_bytes(8, "little") + b"[]", "its header cannot be read"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "its header cannot be read"),
        ((2).to_bytes(8, "little") + b"{}more", "describes 10 bytes, the file has 14"),
    ],
)
def test_files_that_are_not_safetensors(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert len(find_single_file_problems(path)) == 1 and message in find_single_file_problems(path)[0]
    with pytest.raises(ValueError, match=re.escape(message)):
        read_single_file(path, "unet", FULL["unet"])


def test_damaged_and_absent_files(tmp_path):
    path = tmp_path / "model.safetensors"
    assert find_single_file_problems(path) == [f"{path} does not exist"]
    with pytest.raises(FileNotFoundError):
        read_single_file(path, "unet", FULL["unet"])
    assert "directory" in find_single_file_problems(tmp_path)[0].lower()
    write_fake(path, fake_tensors(TINY))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    assert "is damaged: its header describes" in find_single_file_problems(path, TINY)[0]
    text = b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,2]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    assert "offsets and shape of a do not match" in find_single_file_problems(path)[0]


def test_matrices_pass_for_one_by_one_convolutions(tmp_path):
    """Some tools store the VAE's attention as matrices; the reader accepts both."""
    tensors = fake_tensors({"vae": TINY["vae"]})
    name = "first_stage_model.decoder.mid.attn_1.q.weight"
    assert tensors[name][1] == (32, 32, 1, 1)
    path = write_fake(tmp_path / "vae.safetensors", {**tensors, name: ("F16", (32, 32))})
    assert find_single_file_problems(path, {"vae": TINY["vae"]}) == []
    found = dict(read_single_file(path, "vae", TINY["vae"]))
    assert found["decoder.mid_block.attentions.0.to_q.weight"].shape == (32, 32)
