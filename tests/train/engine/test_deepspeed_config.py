"""DeepSpeed's settings: the default ZeRO stage and the JSON."""

import pytest
import torch

from sdxl_trainer.configs.load import build_config
from sdxl_trainer.train.engine.deepspeed_config import (
    BatchSizes,
    build_communication_settings,
    build_deepspeed_config,
    describe_deepspeed_config,
    resolve_zero_stage,
)
from sdxl_trainer.train.optim.optimizers import check_optimizer


@pytest.mark.parametrize(
    ("words", "ranks", "stage"),
    [
        ("", 8, 2),
        ("", 1, 1),  # stages 1 to 3 keep fp32 masters
        ("engine.precision=fp32", 1, 0),
        ("engine.precision=fp32", 2, 2),
        ("engine.precision=fp16", 1, 1),
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


def test_whole_tensors_and_shards_at_once_are_refused() -> None:
    config, _ = build_config({}, ["optim.name=adafactor", "engine.precision=fp16"])
    config, _ = resolve_zero_stage(config, 1)
    assert [problem.key for problem in check_optimizer(config.optim, config.engine)] == ["optim.name"]


def test_communication_by_ranks() -> None:
    config, _ = build_config({}, ["engine.zero_stage=2"])
    alone, several = (build_communication_settings(config.engine, ranks) for ranks in (1, 8))
    assert alone["reduce_bucket_size"] < several["reduce_bucket_size"]  # pyright: ignore
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    own = {"zero_optimization": {"reduce_bucket_size": 7}}
    engine = config.engine.model_copy(update={"deepspeed": own})
    settings = build_deepspeed_config(engine, BatchSizes(16, 2, 1), 1.0, optimizer)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7
    assert settings["zero_optimization"]["allgather_bucket_size"] == several["allgather_bucket_size"]
    assert describe_deepspeed_config(settings) == "ZeRO-2, reduce_bucket_size 7e+00, allgather_bucket_size 2e+08"
