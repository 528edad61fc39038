"""Device memory of training: estimated by arithmetic before a run, and measured in its first steps."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from loguru import logger

from sdxl_trainer.cache.models.single_file_names import build_name_table
from sdxl_trainer.cache.models.source import is_local, resolve_model
from sdxl_trainer.configs.engine import PURE_BF16, EngineConfig
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.train.engine.deepspeed_config import build_communication_settings

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16_kahan": 2, "bf16_stochastic": 2}
# Bytes of the copy that the optimizer updates: fp32 masters, or DeepSpeed's bf16 copy (with Kahan's compensation).
MASTER_BYTES = {"fp32": 4, "bf16": 4, "fp16": 4, "bf16_kahan": 4, "bf16_stochastic": 2}
# Values that an optimizer keeps for each weight. Other optimizers are assumed to keep two, as AdamW does.
NUM_MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5, "adafactor": 0.0, "lion": 1.0, "prodigy": 4.0, "muon": 1.0}
AVERAGE_BYTES = 4
TOO_LITTLE_MEMORY = "set engine.zero_stage: 3, engine.offload_optimizer: true or engine.precision: bf16_stochastic"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank's device, without activations: those depend on shapes and kernels and are measured instead."""

    weights: float
    gradients: float
    optimizer: float  # masters and moments
    averages: float
    buffers: float  # for communication of gradients and weights

    @property
    def total(self) -> float:
        """Sum of all parts, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ((field.name, getattr(self, field.name)) for field in fields(self))
        return " + ".join(f"{number / 1e9:.3g} {name}" for name, number in parts if number)


def count_unet_parameters(model: ModelConfig) -> int:
    """Count the U-Net's weights from its config; 0 for a model that is not on disk or does not have SDXL's topology."""
    if not is_local(model):
        return 0
    try:
        rows = build_name_table("unet", resolve_model(model).read_config("unet"))
    except (OSError, ValueError, KeyError):
        return 0  # check_model reports the problem
    return sum(math.prod(row.source_shape) * len(row.sources) for row in rows)


def estimate_memory(config: Config, num_weights: int, world_size: int) -> MemoryEstimate:
    """Estimate the memory of one rank for training a U-Net of `num_weights`, by ZeRO's arithmetic (arXiv 1910.02054).

    `engine.zero_stage` must be set (`resolve_zero_stage`). Frozen text encoders and adapters are left out.
    """
    engine, weight = config.engine, WEIGHT_BYTES[config.engine.precision]
    if config.lora.rank:
        # Adapters, their gradients and their optimizer state are small beside the frozen weights.
        return MemoryEstimate(weights=num_weights * weight, gradients=0, optimizer=0, averages=0, buffers=0)
    stage = engine.zero_stage or 0
    shares = {part: world_size if stage >= part else 1 for part in (1, 2, 3)}
    communication = build_communication_settings(engine, world_size) if stage else {}
    num_sent = min(float(str(communication.get("reduce_bucket_size", 0))), num_weights)
    # Bytes per weight on the device; offloading moves the optimizer's state and the averages to the host.
    optimizer = 0 if engine.offload_optimizer else count_optimizer_bytes(engine, config.optim.name)
    averages = 0 if engine.offload_optimizer else AVERAGE_BYTES * len(config.ema.decays)
    return MemoryEstimate(
        weights=0 if engine.offload_param else num_weights * weight / shares[3],
        gradients=num_weights * weight / shares[2],
        optimizer=num_weights * optimizer / shares[1],
        averages=num_weights * averages / shares[1],
        buffers=num_sent * weight * (2 if communication.get("overlap_comm") else 1),
    )


def count_optimizer_bytes(engine: EngineConfig, optimizer: str) -> float:
    """Count the bytes of masters and moments per trained weight.

    Args:
        optimizer: `optim.name`.
    """
    precision = engine.precision
    masters = 0 if precision == "fp32" and not engine.zero_stage else MASTER_BYTES[precision]
    return masters + NUM_MOMENTS.get(optimizer, 2.0) * (2 if precision in PURE_BF16 else 4)


def list_gpu_memory_bytes() -> list[int]:
    """Return the memory of each GPU in bytes."""
    return [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]


def log_memory_estimate(config: Config, world_size: int) -> None:
    """Log the memory of a rank without activations, and warn if a GPU has less."""
    if num_weights := count_unet_parameters(config.model):
        needed, gpus = estimate_memory(config, num_weights, world_size), list_gpu_memory_bytes()
        logger.info("memory of a rank: about {:.3g} GB without activations ({})", needed.total / 1e9, needed)
        if gpus and needed.total > min(gpus):
            logger.warning(
                "memory of a GPU: {:.3g} GB, too little for this run; {}", min(gpus) / 1e9, TOO_LITTLE_MEMORY
            )


class StepMemoryLogger:
    """Logs once, after the second step of a job, how much memory a step needs beyond what is held between steps.

    The first step is left out, because the optimizer allocates its state in it. Without a GPU the memory of the process
    is measured.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._num_steps = self._held = 0

    def note_step(self) -> None:
        """Count a finished step, and log after the second."""
        self._num_steps += 1
        if self._num_steps == 1:
            reset_peak_memory(self._device)
            self._held = measure_memory(self._device).held
        elif self._num_steps == 2:
            held_gb, peak_gb = self._held / 1e9, measure_memory(self._device).peak / 1e9
            logger.info(
                "memory: {:.3g} GB between steps and {:.3g} GB more during a step, for activations and gradients",
                held_gb,
                peak_gb - held_gb,
            )


class MemoryUse(NamedTuple):
    """Measured memory in bytes: of tensors on a GPU, or of this process without one."""

    held: int  # now
    peak: int  # since `reset_peak_memory`


def measure_memory(device: torch.device) -> MemoryUse:
    """Measure the memory in use."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest.strip()}
    return MemoryUse(int(kilobytes["VmRSS"]) * 1024, int(kilobytes["VmHWM"]) * 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
