"""The networks of a run are loaded in the precision of training, and masters begin as the values of the file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.networks.trained_networks import read_trained_weights
from sdxl_trainer.train.run.networks import build_networks


class LargestFp32(TorchDispatchMode):
    """Records the most values of an fp32 tensor that an operator allocated, leaving out views and mapped files."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and not func.is_view:
            inputs = {item.untyped_storage().data_ptr() for item in args if isinstance(item, torch.Tensor)}
            if result.untyped_storage().data_ptr() not in inputs:
                self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_weights_never_exist_in_fp32(tiny_folder: Path, stage: int) -> None:
    """With adapters, the largest fp32 tensor is that of the adapters' masters."""
    words = [f"engine.zero_stage={stage}", "engine.precision=bf16", "lora.rank=1", "optim.text_encoder_2_lr=1e-3"]
    config, problems = load_config(tiny_folder / "tiny.yaml", words)
    assert problems == []
    with LargestFp32() as seen:
        engine, conditioner = build_networks(config, resolve_model(config.model), init_ranks())
    weights = [*engine.model.parameters(), *conditioner.encoders.encoder.parameters()]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    num_trained = sum(torch.Size(shape).numel() for shape in engine.weights.layout.shapes.values())
    assert 0 < seen.numel <= num_trained + 64  # the masters, padded, are one tensor


@pytest.mark.parametrize("stage", [1, 3])
def test_masters_are_the_values_of_the_file(tiny_folder: Path, stage: int) -> None:
    words = [f"engine.zero_stage={stage}", "engine.precision=bf16", "optim.text_encoder_lr=1e-3"]
    config, problems = load_config(tiny_folder / "tiny.yaml", words)
    assert problems == []
    source = resolve_model(config.model)
    engine, _ = build_networks(config, source, init_ranks())
    found = dict(read_trained_weights(engine.model, source, config.model.text_projection))
    assert list(sorted(found)) == sorted(engine.weights.trained_names)
    assert any(name.startswith("text_encoder.") for name in found)
    for name, weight in found.items():
        assert engine.weights.gather(name).equal(weight), name
    assert any(not weight.equal(weight.bfloat16().float()) for weight in found.values())
