"""Parameter groups: kohya's block numbers, patterns, weight decay, and parameters frozen by a learning rate of 0."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from programs import ROOT

from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups, map_layers_to_blocks, split_groups
from sdxl_trainer.train.networks.trained_networks import TrainedNetworks
from sdxl_trainer.train.optim.optimizers import MAX_GROUP_VALUES
from sdxl_trainer.train.tiny.build import CONFIG_FOLDER, build_tiny_text_encoders, build_tiny_unet

UNET_CONFIG = json.loads((CONFIG_FOLDER / "unet" / "config.json").read_text())


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    return build_tiny_unet()


def build(unet: torch.nn.Module, **settings) -> dict[str, tuple[float, float]]:
    """Map the name of each trained parameter to its (learning rate, weight decay)."""
    networks = TrainedNetworks(unet.requires_grad_(True))
    names = {id(parameter): name for name, parameter in networks.named_parameters()}
    groups = build_parameter_groups(networks, OptimConfig(lr=0.5, weight_decay=0.1, **settings), UNET_CONFIG)
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert all(group["lr_scale"] == group["lr"] / 0.5 for group in groups)
    assert found.keys() == {name for name, parameter in networks.named_parameters() if parameter.requires_grad}
    return found


def test_blocks_are_numbered_as_in_kohyas_scripts(unet):
    blocks = map_layers_to_blocks(UNET_CONFIG)
    # diffusers' names → block number, from the layout of the LDM U-Net.
    expected = {
        "time_embedding.linear_1": 0,
        "add_embedding.linear_2": 0,
        "conv_in": 1,
        "down_blocks.0.resnets.1.conv1": 3,
        "down_blocks.0.downsamplers.0.conv": 4,
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 5,
        "down_blocks.2.resnets.1.norm1": 9,
        "mid_block.resnets.0.conv1": 10,
        "mid_block.attentions.0.proj_in": 11,
        "mid_block.resnets.1.conv2": 12,
        "up_blocks.0.resnets.0.conv_shortcut": 13,
        "up_blocks.0.upsamplers.0.conv": 15,
        "up_blocks.2.resnets.2.time_emb_proj": 21,
        "conv_norm_out": 22,
        "conv_out": 22,
    }
    assert {name: blocks[f"unet.{name}"] for name in expected} == expected
    assert set(blocks.values()) == set(range(23))

    rates = [0.0 if block == 10 else 1 + block for block in range(23)]
    found = build(unet, block_lrs=rates)
    assert found["unet.conv_in.weight"] == (2.0, 0.1) and found["unet.conv_out.bias"] == (23.0, 0.0)
    assert not any(name.startswith("unet.mid_block.resnets.0.") for name in found)
    assert {rate for rate, _ in found.values()} == set(rates) - {0.0}


def test_biases_and_norms_do_not_decay(unet):
    found = build(unet)
    assert len(found) == len(list(unet.parameters()))
    assert {name for name, (_, decay) in found.items() if decay == 0} == {
        f"unet.{name}" for name, parameter in unet.named_parameters() if name.endswith("bias") or "norm" in name
    }


def test_the_first_matching_pattern_sets_a_parameter(unet):
    groups = [
        {"match": r"attn2\.to_k\.weight$", "lr": 0.25},
        {"match": r"\.attn2\.", "lr": 0},
        {"match": "norm", "weight_decay": 0.3},
    ]
    found = build(unet, groups=groups)
    cross = {name: setting for name, setting in found.items() if ".attn2." in name}
    assert cross and set(cross.values()) == {(0.25, 0.1)} and all("to_k" in name for name in cross)
    assert found["unet.conv_norm_out.weight"] == (0.5, 0.3)
    frozen = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    assert not frozen.to_q.weight.requires_grad and frozen.to_k.weight.requires_grad


def test_settings_that_train_nothing_are_refused(unet):
    with pytest.raises(UserInputError, match="optim.groups.1.match = 'atn'\n.*matches none of the"):
        build(unet, groups=[{"match": "attn", "lr": 0.1}, {"match": "atn", "lr": 0.1}])
    with pytest.raises(UserInputError, match="nothing is trained"):
        build(unet, groups=[{"match": "unet", "lr": 0}])


def test_text_encoders_have_their_own_rates(unet):
    encoders = build_tiny_text_encoders()
    networks = TrainedNetworks(unet.requires_grad_(True), **encoders)
    config = OptimConfig(lr=0.5, text_encoder_lr=0.1, text_encoder_2_lr=0.2)
    groups = build_parameter_groups(networks, config, UNET_CONFIG)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, rate in (("unet", 0.5), ("text_encoder", 0.1), ("text_encoder_2", 0.2)):
        assert {rates[id(p)] for p in getattr(networks, name).parameters()} == {rate}


def split_sizes(sizes: list[int], max_values: int) -> list[list[int]]:
    """Split one group of parameters of the given sizes, and return the sizes in each piece."""
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    pieces = split_groups([{"params": parameters}], max_values)
    assert [parameter for piece in pieces for parameter in piece["params"]] == parameters
    return [[parameter.numel() for parameter in piece["params"]] for piece in pieces]


@pytest.mark.parametrize(
    ("sizes", "pieces"),
    [
        ([3, 3, 4], [[3, 3, 4]]),
        ([3, 3, 4, 1], [[3, 3], [4, 1]]),  # equal pieces instead of 10 and 1
        ([5, 5, 5, 5, 5], [[5, 5], [5, 5], [5]]),
        ([6, 6, 6], [[6], [6], [6]]),
        ([2, 23, 2, 2], [[2], [23], [2, 2]]),  # 23 stays whole
        ([23], [[23]]),
    ],
)
def test_a_group_is_split_into_few_and_equal_pieces(sizes, pieces):
    assert split_sizes(sizes, 10) == pieces


def test_pieces_keep_the_settings_and_the_order_of_their_group():
    weights = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in (4, 4, 4, 1)]
    groups = [
        {"params": weights[:3], "lr": 0.1, "weight_decay": 0.2, "lr_scale": 1.0, "other": "kept"},
        {"params": weights[3:], "lr": 0.3, "weight_decay": 0.0, "lr_scale": 3.0},
    ]
    pieces = split_groups(groups, 8)
    assert [len(piece["params"]) for piece in pieces] == [2, 1, 1] and len(groups[0]["params"]) == 3
    assert [{**piece, "params": 0} for piece in pieces] == [{**groups[number], "params": 0} for number in (0, 0, 1)]
    assert pieces[1]["params"][0] is weights[2]


def test_sdxls_unet_has_ten_pieces_below_the_limit():
    config = json.loads((ROOT / "configs" / "sdxl" / "unet" / "config.json").read_text())
    with torch.device("meta"):
        networks = TrainedNetworks(UNet2DConditionModel.from_config(config))  # pyright: ignore
    groups = build_parameter_groups(networks, OptimConfig(), config)
    sizes = [sum(p.numel() for p in piece["params"]) for piece in split_groups(groups, MAX_GROUP_VALUES)]
    assert sum(sizes) == 2_567_463_684 and max(sizes) <= MAX_GROUP_VALUES
    decaying = sizes[:10]
    assert len(sizes) == 11 and max(decaying) - min(decaying) < 0.1 * max(decaying)
