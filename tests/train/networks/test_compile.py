"""torch.compile of the U-Net: one graph for each kind of block serves all buckets, and nothing else changes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from programs import read_losses, run_program

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.engine import deepspeed_config
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes, check_engine, find_c_compiler
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.compilation import compile_unet, describe_kind, list_blocks
from sdxl_trainer.train.networks.empty_networks import build_empty_networks
from sdxl_trainer.train.networks.trained_networks import configure_unet
from sdxl_trainer.train.optim.optimizers import build_optimizer
from sdxl_trainer.train.tiny.build import build_tiny_unet

CONFIGS = Path(__file__).parents[3] / "configs"
LATENT_SIZES = [
    *[(16, 16), (16, 24), (24, 16), (8, 32), (20, 12), (32, 8)],
    *[(4, 4), (12, 20), (6, 10), (10, 6), (8, 8), (4, 16)],
]
needs_compiler = pytest.mark.skipif(find_c_compiler() is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def build_small_unet(seed: int = 0) -> Any:
    """Build a U-Net of two levels of equal width: two kinds of residual blocks, and one of transformer blocks."""
    from diffusers import UNet2DConditionModel

    levels = {
        "block_out_channels": [32, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 2],
        "transformer_layers_per_block": [1, 1],
    }
    config = ModelSource(CONFIGS / "tiny").read_config("unet")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet: Any = UNet2DConditionModel.from_config({**config, **levels})
    return unet.train()


def predict(unet: Any, height: int, width: int) -> torch.Tensor:
    """Return the prediction for random latents of this size."""
    config, generator = unet.config, torch.Generator().manual_seed(height * 100 + width)
    pooled = torch.ones(2, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    x_t = torch.randn(2, 4, height, width, generator=generator).to(unet.dtype)
    hidden = torch.randn(2, 7, config.cross_attention_dim, generator=generator).to(unet.dtype)
    conditions = {"text_embeds": pooled.to(unet.dtype), "time_ids": torch.ones(2, 6)}
    return unet(x_t, torch.tensor([3, 700]), hidden, added_cond_kwargs=conditions).sample


def compute_gradients(unet: Any, height: int, width: int) -> torch.Tensor:
    """Return the loss and all gradients."""
    unet.zero_grad()
    loss = predict(unet, height, width).float().square().mean()
    loss.backward()
    gradients = [weight.grad.flatten() for weight in unet.parameters() if weight.grad is not None]
    return torch.cat([loss.detach()[None], *gradients])


def assert_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Compare the losses, and the gradients by their norm."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert (found - expected).norm() <= tolerance * expected.norm()


@needs_compiler
@pytest.mark.parametrize(
    ("backend", "num_kinds"), [("aot_eager", 3), pytest.param("inductor", 1, marks=pytest.mark.long)]
)
def test_one_graph_for_each_kind_serves_all_buckets(backend: str, num_kinds: int) -> None:
    """Blocks of every second bucket are checkpointed, which needs no graphs of its own.

    For a CPU, inductor compiles transformer blocks alone.
    """
    plain, unet = build_small_unet(), build_small_unet()
    compilation = compile_unet(unet, "regional", backend)
    assert compilation is not None
    for number, (height, width) in enumerate(LATENT_SIZES):
        for network in (plain, unet):
            (network.enable_gradient_checkpointing if number % 2 else network.disable_gradient_checkpointing)()
        assert_equal(compute_gradients(unet, height, width), compute_gradients(plain, height, width))
        assert compilation.num_graphs == len(compilation.expected) == num_kinds
    with torch.no_grad():
        assert torch.equal(predict(unet, 16, 16), predict(plain, 16, 16))
    assert compilation.num_graphs == num_kinds and compilation.seconds > 0


def test_sdxl_has_fourteen_kinds_of_blocks() -> None:
    blocks = list_blocks(build_empty_networks(ModelSource(CONFIGS / "sdxl"), []).unet)
    kinds = {describe_kind(block) for block in blocks}
    assert (len(blocks), len(kinds)) == (87, 14)
    assert sum(kind[0].__name__ == "ResnetBlock2D" for kind in kinds) == 12


def test_adapters_and_checkpointing() -> None:
    """Inputs before the first adapter need no gradient, and memory formats differ; both need graphs of their own."""
    plain, unet = build_small_unet(), build_small_unet()
    for network, compiled in ((plain, "none"), (unet, "regional")):
        configure_unet(network, EngineConfig(gradient_checkpointing="full", compile=compiled, channels_last=True))
        add_adapters({"unet": network}, LoraConfig(rank=4))
        generator = torch.Generator().manual_seed(1)
        for weight in network.parameters():
            if weight.requires_grad:
                weight.data.normal_(0, 0.1, generator=generator)
    compilation = compile_unet(unet, "regional", backend="aot_eager")
    for height, width in LATENT_SIZES[:4]:
        assert_equal(compute_gradients(unet, height, width), compute_gradients(plain, height, width))
    assert compilation is not None
    assert compilation.num_graphs == len(compilation.expected) == 5


@pytest.mark.parametrize("stage", [2])
def test_engine_and_averages(stage: int) -> None:
    """Steps under DeepSpeed, and a prediction with averaged weights, which are put in the place of the others."""
    init_ranks()
    results = []
    for choice in ("none", "regional"):
        config = EngineConfig(zero_stage=stage, precision="bf16")
        unet = torch.nn.Module.to(build_small_unet(), torch.bfloat16)
        optimizer = build_optimizer([{"params": list(unet.parameters()), "lr_scale": 1.0}], OptimConfig(), config)
        compilation = compile_unet(unet, choice, backend="aot_eager")
        engine = Engine(Predicting(unet), optimizer, config, BatchSizes(2, 2, 1), 1.0, EmaConfig(decays=[0.5]))
        losses = []
        for height, width in LATENT_SIZES[:3]:
            engine.set_lr(1e-3)
            loss = engine(height, width).float().square().mean()
            engine.backward(loss)
            assert engine.step()
            losses.append(loss.item())
        with engine.weights.use_average(engine.weights.average_names[0]), torch.no_grad():
            losses.append(engine.model(16, 16).float().square().mean().item())
        results.append(losses)
        assert compilation is None or compilation.num_graphs == 3
    assert results[1] == pytest.approx(results[0], rel=0.01)
    assert len(set(results[0])) == 4


class Predicting(torch.nn.Module):
    """A U-Net that predicts for random latents of a size."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, height: int, width: int) -> torch.Tensor:
        return predict(self.unet, height, width)


def test_more_graphs_than_expected_are_logged() -> None:
    """A block whose weights are frozen later needs a graph of its own."""
    from loguru import logger

    messages: list[str] = []
    handler = logger.add(lambda message: messages.append(message.record["message"]))
    unet = build_small_unet()
    compilation = compile_unet(unet, "regional", backend="eager")
    assert compilation is not None
    predict(unet, 8, 8)
    compilation.log_progress()
    compilation.log_progress()
    for weight in list_blocks(unet)[0].parameters():
        weight.requires_grad_(False)
    predict(unet, 8, 8)
    compilation.log_progress()
    logger.remove(handler)
    assert [re.split("[,;]", message)[0] for message in messages] == [
        "engine.compile: the first step compiles 3 kinds of blocks",
        "engine.compile: 3 graphs are compiled",
        "engine.compile: 4 graphs are compiled",
        "engine.compile: only 3 graphs were expected",
    ]


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, choice in ((True, "full"), (False, "none"), ("regional", "regional")):
        config, problems = build_config({"engine": {"compile": value}})
        assert problems == [] and config.engine.compile == choice
    _, problems = build_config({"engine": {"compile": "regional", "zero_stage": 3}})
    assert [problem.key for problem in problems] == ["engine.compile"]
    monkeypatch.setattr(deepspeed_config.shutil, "which", lambda _: None)
    found = [problem.key for problem in check_engine(EngineConfig(compile="regional"), OptimConfig())]
    assert found == ["engine.compile"] and list(check_engine(EngineConfig(), OptimConfig())) == []


@pytest.mark.long
def test_three_graphs_of_the_whole_network_serve_all_buckets() -> None:
    unet = build_tiny_unet().train()
    compilation = compile_unet(unet, "full", backend="eager")
    assert compilation is not None
    numbers = []
    for height, width in [(16, 16), (16, 24), (24, 16), (8, 32), (20, 12)]:
        predict(unet, height, width)
        numbers.append(compilation.num_graphs)
    assert numbers == [1, 2, 3, 3, 3]


@pytest.mark.long
@needs_compiler
def test_a_compiled_run_has_the_same_losses(one_rank: Path, cached_folder: Path) -> None:
    words = ["run.name=compiled", "train.max_steps=4", "sample.prompts=[]", "engine.compile=regional"]
    run_program("train/main.py", "--cfg", cached_folder / "tiny.yaml", *words)
    part = cached_folder / "runs" / "compiled"
    assert read_losses(part) == pytest.approx(read_losses(one_rank)[:4], rel=1e-4)
    log = (part / "logs" / "train.log").read_text()
    assert "graphs are compiled, in" in log and "were expected" not in log
