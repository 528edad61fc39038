"""What training takes of a device's memory, by arithmetic before it begins, and measured once it runs."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from loguru import logger

from sdxl_trainer.cache.models.single_file_names import build_name_table
from sdxl_trainer.cache.models.source import is_local, resolve_model
from sdxl_trainer.configs.engine import PURE_BF16
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.engine.deepspeed_config import build_communication_settings

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16_kahan": 2, "bf16_stochastic": 2}
# What an update works on instead of the weight: fp32 masters, or DeepSpeed's copy in bf16 (with Kahan's carry).
MASTER_BYTES = {"fp32": 4, "bf16": 4, "fp16": 4, "bf16_kahan": 4, "bf16_stochastic": 2}
# Values that an optimizer keeps for each weight; one of another name is taken to keep two, as AdamW does.
NUM_MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5, "adafactor": 0.0, "lion": 1.0, "prodigy": 4.0, "muon": 1.0}
AVERAGE_BYTES = 4
TOO_LITTLE_MEMORY = "set engine.zero_stage: 3, engine.offload_optimizer: true or engine.precision: bf16_stochastic"


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device, without activations, which depend on shapes and kernels and are measured."""

    weights: float
    gradients: float
    optimizer: float  # masters and moments
    averages: float
    buffers: float  # through which gradients and weights are sent

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ((field.name, getattr(self, field.name)) for field in fields(self))
        return " + ".join(f"{number / 1e9:.3g} {name}" for name, number in parts if number)


def count_unet_parameters(config: Config) -> int:
    """Weights of the U-Net, by its config; 0 where there is no local one of SDXL's kind."""
    if not is_local(config.model):
        return 0
    try:
        rows = build_name_table("unet", resolve_model(config.model).read_config("unet"))
    except (OSError, ValueError, KeyError):
        return 0  # the settings' part has said what is wrong
    return sum(math.prod(row.source_shape) * len(row.sources) for row in rows)


def estimate_memory(config: Config, num_weights: int, world_size: int) -> Memory:
    """What a U-Net of so many weights takes of each rank, by ZeRO's arithmetic (arXiv 1910.02054).

    `engine.zero_stage` must be set (`resolve_zero_stage`). Frozen text encoders and adapters are left out.
    """
    engine, weight = config.engine, WEIGHT_BYTES[config.engine.precision]
    if config.lora.rank:
        return Memory(num_weights * weight, 0, 0, 0, 0)  # adapters, and all that belongs to them, are small beside it
    stage = engine.zero_stage or 0
    shares = {part: world_size if stage >= part else 1 for part in (1, 2, 3)}
    buckets = build_communication_settings(engine, world_size) if stage else {}
    bucket = min(float(str(buckets.get("reduce_bucket_size", 0))), num_weights)
    return Memory(
        weights=0 if engine.offload_param else num_weights * weight / shares[3],
        gradients=num_weights * weight / shares[2],
        optimizer=0 if engine.offload_optimizer else num_weights * count_optimizer_bytes(config) / shares[1],
        averages=0 if engine.offload_optimizer else num_weights * AVERAGE_BYTES * len(config.ema.decays) / shares[1],
        buffers=bucket * weight * (2 if buckets.get("overlap_comm") else 1),
    )


def count_optimizer_bytes(config: Config) -> float:
    """Bytes of masters and moments for each weight that is trained."""
    precision = config.engine.precision
    masters = 0 if precision == "fp32" and not config.engine.zero_stage else MASTER_BYTES[precision]
    return masters + NUM_MOMENTS.get(config.optim.name, 2.0) * (2 if precision in PURE_BF16 else 4)


def compute_checkpoint_bytes(config: Config, num_weights: int) -> int:
    """About the bytes of a checkpoint."""
    if config.lora.rank:
        return 0  # adapters are small
    each = WEIGHT_BYTES[config.engine.precision] + count_optimizer_bytes(config)
    return int(num_weights * (each + AVERAGE_BYTES * len(config.ema.decays)))


def list_gpu_memory_bytes() -> list[int]:
    """Memory of each GPU."""
    return [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]


def log_memory_estimate(config: Config, world_size: int) -> None:
    """Tell what a rank will hold besides activations, and warn if that is more than a GPU has."""
    if num_weights := count_unet_parameters(config):
        needed, gpus = estimate_memory(config, num_weights, world_size), list_gpu_memory_bytes()
        logger.info("memory of a rank: about {:.3g} GB ({}), besides activations", needed.total / 1e9, needed)
        if gpus and needed.total > min(gpus):
            logger.warning("a GPU has {:.3g} GB: it will not fit; {}", min(gpus) / 1e9, TOO_LITTLE_MEMORY)


class StepMemoryLogger:
    """Measures once, in the second step of a job, what a step takes besides what is there between steps.

    In the first one the optimizer makes its state. Without a GPU it is the memory of the process that is looked at.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._num_steps = self._held = 0

    def note_step(self) -> None:
        """A step has ended."""
        self._num_steps += 1
        if self._num_steps == 1:
            reset_peak_memory(self._device)
            self._held, _ = measure_memory(self._device)
        elif self._num_steps == 2:
            _, peak = measure_memory(self._device)
            held, peak_gb = self._held / 1e9, peak / 1e9
            logger.info(
                "memory: {:.3g} GB between steps, and {:.3g} more within one, for activations and gradients",
                held,
                peak_gb - held,
            )


def measure_memory(device: torch.device) -> tuple[int, int]:
    """(bytes held now, most since `reset_peak_memory`): of a GPU in tensors, or of this process without one."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest.strip()}
    return int(kilobytes["VmRSS"]) * 1024, int(kilobytes["VmHWM"]) * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Begin to look for the most from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
