"""fp8 linear layers: where they are refused, which layers they are, and the loss with them (emulated on a CPU)."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.networks import fp8_linears
from sdxl_trainer.train.networks.fp8_linears import check_fp8, find_fp8_fault
from sdxl_trainer.train.networks.trained_networks import load_unet
from sdxl_trainer.train.optim.optimizers import build_optimizer

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
NUM_STEPS, BATCH = 200, 4


def list_rules(uses_adapters: bool = False, **settings) -> list[str]:
    return [
        problem.rule for problem in check_fp8(EngineConfig.model_validate({"fp8": "linear", **settings}), uses_adapters)
    ]


def test_fp8_is_refused_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_linears.importlib.util, "find_spec", lambda name: None)
    assert not list(check_fp8(EngineConfig.model_validate({}), uses_adapters=True))
    assert list_rules() == ["needs an NVIDIA GPU", "needs torchao, which is not installed"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fp8_linears, "_find_oldest_gpu", lambda: ((8, 9), "NVIDIA GeForce RTX 4090"))
    rule = "needs compute capability 9.0 (NVIDIA Hopper or newer), and NVIDIA GeForce RTX 4090 has 8.9"
    assert list_rules()[0] == rule
    monkeypatch.setattr(fp8_linears, "_find_oldest_gpu", lambda: ((9, 0), "NVIDIA H100"))
    monkeypatch.setattr(fp8_linears.importlib.util, "find_spec", lambda name: name)
    assert list_rules() == [] and list_rules(precision="bf16_stochastic", zero_stage=1) == []
    assert list_rules(precision="fp32") == ["needs weights in bf16, and engine.precision is fp32"]
    assert list_rules(uses_adapters=True) == ["does not work with adapters (lora.rank)"]
    assert find_fp8_fault((12, 0), "x") == ""
    with pytest.raises(ValidationError, match="needs engine.zero_stage 0, 1 or 2"):
        EngineConfig.model_validate({"zero_stage": 3, "fp8": "linear"})
    assert [EngineConfig.model_validate({"fp8": value}).fp8 for value in (True, False)] == ["linear", "none"]


def predict(unet, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prediction and the noise of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    config = (unet.model if isinstance(unet, Engine) else unet).config
    noise = torch.randn(BATCH, 4, 16, 16, generator=generator)
    latents = torch.linspace(-1, 1, 16).expand_as(noise)
    hidden = torch.randn(BATCH, 7, config.cross_attention_dim, generator=generator)
    pooled = torch.ones(BATCH, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    conditions = {"text_embeds": pooled.bfloat16(), "time_ids": torch.ones(BATCH, 6)}
    x_t, timesteps = (0.7 * latents + 0.7 * noise).bfloat16(), torch.full((BATCH,), 500)
    prediction = unet(x_t, timesteps, hidden.bfloat16(), added_cond_kwargs=conditions).sample
    return prediction.float(), noise


@needs_torchao
def test_the_layers_of_transformer_blocks_multiply_in_fp8(tiny_folder: Path) -> None:
    """Names and weights stay, outputs and gradients change by the rounding, and captions' projections do not."""
    Float8Linear = importlib.import_module("torchao.float8.float8_linear").Float8Linear  # noqa: N806

    source, results, names = ModelSource(tiny_folder / "model"), [], []
    for fp8 in ("none", "linear"):
        unet = load_unet(source, EngineConfig.model_validate({"fp8": fp8}), dtype=torch.bfloat16)
        prediction, noise = predict(unet, 1)
        (prediction - noise).square().mean().backward()
        results.append((prediction, torch.cat([weight.grad.float().flatten() for weight in unet.parameters()])))
        names.append([name for name, _ in unet.named_parameters()])
        converted = [name for name, layer in unet.named_modules() if isinstance(layer, Float8Linear)]
        layers = [name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert names[0] == names[1]
    inside = [name for name in layers if ".transformer_blocks." in name]
    assert converted == [name for name in inside if not name.endswith(("attn2.to_k", "attn2.to_v"))] and converted
    for plain, rounded in zip(*results, strict=True):
        assert 0.001 < ((rounded - plain).norm() / plain.norm()).item() < 0.1


@pytest.mark.long
@needs_torchao
def test_the_loss_falls_as_in_bf16(tiny_folder: Path) -> None:
    """200 steps of the tiny U-Net under ZeRO 1 from equal weights end at losses within 3 % of each other."""
    init_ranks()
    source, losses = ModelSource(tiny_folder / "model"), []
    for fp8 in ("none", "linear"):
        config = EngineConfig.model_validate({"zero_stage": 1, "fp8": fp8})
        unet = load_unet(source, config, dtype=torch.bfloat16)
        groups = [{"params": list(unet.parameters()), "lr": 1e-3, "lr_scale": 1.0}]
        engine = Engine(
            unet,
            build_optimizer(groups, OptimConfig.model_validate({"lr": 1e-3}), config),
            config,
            BatchSizes(BATCH, BATCH, 1),
            1.0,
        )
        engine.set_lr(1e-3)
        losses.append([])
        for step in range(NUM_STEPS):
            prediction, noise = predict(engine, step)
            loss = (prediction - noise).square().mean()
            engine.backward(loss)
            engine.step()
            losses[-1].append(loss.item())
    first, last = (torch.tensor([run[part] for run in losses]).mean(1) for part in (slice(0, 5), slice(-50, None)))
    assert (last < 0.5 * first).all() and (last[1] / last[0]).item() == pytest.approx(1, abs=0.03)
