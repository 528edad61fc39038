"""DeepSpeed's settings: the default ZeRO stage and the JSON."""

import pytest
import torch

from sdxl_trainer.configs.load import build_config
from sdxl_trainer.train.engine import deepspeed_config
from sdxl_trainer.train.engine.deepspeed_config import (
    BatchSizes,
    build_communication_settings,
    build_deepspeed_config,
    check_engine,
    describe_deepspeed_config,
    resolve_gradient_types,
    resolve_zero_stage,
)
from sdxl_trainer.train.optim.optimizers import check_optimizer


@pytest.mark.parametrize(
    ("words", "ranks", "stage"),
    [
        ("", 8, 2),
        ("", 1, 2),  # accumulates in fp32
        ("train.global_batch_size=1", 1, 1),  # stages 1 to 3 keep fp32 masters
        ("engine.accumulation_dtype=bf16", 1, 1),
        ("engine.precision=fp32", 1, 0),
        ("engine.precision=fp32", 2, 2),
        ("engine.precision=fp16", 1, 2),
        ("engine.precision=bf16_kahan train.global_batch_size=1", 1, 1),
        ("optim.name=muon optim.max_grad_norm=0", 1, 1),
        ("optim.name=adafactor", 8, 0),
        ("optim.name=torch.optim.Adafactor", 8, 0),
        ("engine.offload_optimizer=true", 1, 2),
        ("engine.offload_optimizer=true engine.offload_param=true", 4, 3),
        ("engine.zero_stage=3", 1, 3),
    ],
)
def test_stage_by_ranks(words: str, ranks: int, stage: int) -> None:
    config, problems = build_config({}, words.split())
    assert problems == []
    settled, chosen = resolve_zero_stage(config, ranks)
    assert settled.engine.zero_stage == stage
    assert chosen == "" if "zero_stage" in words else chosen.startswith(f"{stage}, chosen because ")
    assert list(check_optimizer(settled.optim, settled.engine)) == []


@pytest.mark.parametrize(
    ("words", "ranks", "steps", "expected"),
    [
        ("", 1, 1, ("bf16", "bf16")),  # nothing is added
        ("", 1, 4, ("fp32", "bf16")),
        ("engine.zero_stage=1", 1, 4, ("fp32", "fp32")),  # otherwise the sum would be rounded
        ("engine.zero_stage=0", 1, 1, ("fp32", "bf16")),
        ("", 2, 1, ("fp32", "fp32")),
        ("engine.communication_dtype=bf16", 2, 4, ("fp32", "bf16")),
        ("engine.accumulation_dtype=bf16", 2, 4, ("bf16", "fp32")),
        ("engine.precision=fp16", 2, 1, ("fp32", "fp32")),
        ("engine.precision=bf16_kahan", 1, 1, ("bf16", "bf16")),
        ("engine.precision=fp32", 1, 4, ("fp32", "fp32")),
        ("engine.precision=fp32 engine.communication_dtype=bf16", 2, 1, ("fp32", "bf16")),
    ],
)
def test_gradient_types_by_what_is_added(words: str, ranks: int, steps: int, expected: tuple[str, str]) -> None:
    config, problems = build_config({}, words.split())
    assert problems == [] and resolve_gradient_types(config.engine, ranks, steps) == expected


def test_muon_and_an_old_pytorch_add_in_the_type_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = build_config({}, ["optim.name=muon", "engine.accumulation_dtype=fp32", "optim.max_grad_norm=0"])
    assert resolve_gradient_types(build_config({}, [])[0].engine, 2, 4, is_muon=True) == ("bf16", "fp32")
    assert [problem.key for problem in check_engine(config.engine, config.optim)] == ["engine.accumulation_dtype"]
    monkeypatch.setattr(deepspeed_config, "CAN_SUM_IN_FP32", False)
    config, _ = build_config({}, ["optim.name=adafactor", "engine.zero_stage=0"])
    assert resolve_gradient_types(config.engine, 1, 4).accumulation == "bf16"
    assert list(check_engine(config.engine, config.optim)) == []
    config, _ = build_config({}, ["engine.zero_stage=0", "engine.accumulation_dtype=fp32"])
    (problem,) = check_engine(config.engine, config.optim)
    assert problem.key == "engine.accumulation_dtype" and "torch 2.10" in problem.cure


def test_whole_tensors_and_shards_at_once_are_refused() -> None:
    config, _ = build_config({}, ["optim.name=adafactor", "engine.precision=fp16"])
    config, _ = resolve_zero_stage(config, 1)
    assert [problem.key for problem in check_optimizer(config.optim, config.engine)] == ["optim.name"]


def test_communication_by_ranks() -> None:
    config, _ = build_config({}, ["engine.zero_stage=2"])
    alone, several = (build_communication_settings(config.engine, ranks) for ranks in (1, 8))
    assert several["use_multi_rank_bucket_allreduce"] is False
    assert "use_multi_rank_bucket_allreduce" not in build_communication_settings(config.engine, 128)
    assert alone["reduce_bucket_size"] < several["reduce_bucket_size"]  # pyright: ignore
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    own = {"zero_optimization": {"reduce_bucket_size": 7}}
    engine = config.engine.model_copy(update={"deepspeed": own})
    settings = build_deepspeed_config(engine, BatchSizes(16, 2, 1), 1.0, optimizer)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7
    assert settings["zero_optimization"]["allgather_bucket_size"] == several["allgather_bucket_size"]
    assert describe_deepspeed_config(settings) == "ZeRO-2, reduce_bucket_size 7e+00, allgather_bucket_size 2e+08"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["engine.precision=bf16_stochastic", "optim.name=adafactor"], "engine.precision"),
        (["engine.precision=bf16_stochastic", "optim.name=lion"], "engine.precision"),
        (["engine.precision=bf16_kahan"], "optim.name"),
        (["engine.precision=bf16_kahan", "optim.kwargs={foreach: true}"], None),
        (["engine.precision=bf16_kahan", "optim.name=adafactor"], None),
        (["optim.name=lion"], "optim.name"),
        (["optim.name=lion", "optim.kwargs={triton: false}"], None),
        (["optim.name=lion", "optim.kwargs={triton: true, foreach: true}"], "optim.name"),
        (["optim.name=lion", "engine.offload_optimizer=true"], None),  # DeepSpeed's
        (["optim.name=optimi.Adan"], "optim.name"),
        (["engine.precision=fp32", "optim.name=stable_adamw"], "optim.name"),
        (["optim.name=muon"], "optim.name"),
        (["optim.name=adamw"], None),
    ],
)
def test_kernels_of_triton_need_a_compiler(monkeypatch, words: list[str], key: str | None) -> None:
    config, problems = build_config({}, words)
    settings = config.engine, config.optim
    assert problems == []
    keys = [key] if key else []
    monkeypatch.setattr(deepspeed_config, "find_c_compiler", lambda: None)
    found = list(deepspeed_config.check_triton(*settings))
    assert [problem.key for problem in found] == keys and all("g++" in problem.cure for problem in found)
    monkeypatch.setattr(deepspeed_config, "find_c_compiler", lambda: "/usr/bin/gcc")
    assert list(deepspeed_config.check_triton(*settings)) == []
