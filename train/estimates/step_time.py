"""A model of a step's time on a known GPU, used before a run, at its end, and for docs/SCALE.md.

A step is a sum of parts that do not overlap. On the GPU, products take `FLOPs / (peak x efficiency)`. They do enough
arithmetic for each byte that their memory traffic takes less at SDXL's sizes, on every GPU of the table. Norms,
activations, additions and updates take `bytes / (bandwidth x efficiency)`.

The host starts every kernel. If it needs longer to start a micro step's kernels than the GPU to run them, the step
waits for it: the difference to `launches x LAUNCH_SECONDS` is the part `kernel launches`. Text encoders and updates,
which have many small kernels, take at least as long as the host needs for theirs. Sending gradients hides behind the
backward passes, and loading data behind the whole step, as far as these last.

**No GPU has confirmed this model yet.** `python benchmarks/gpu_day.py` records the estimate beside each measured step.
The coefficients come from:

| coefficient | origin |
|---|---|
| FLOPs | counted from the shapes of the weights, as `torch.utils.flop_counter` does (flops.py) |
| MOVED_FORWARD, MOVED_BACKWARD | counted on PyTorch's meta device for SDXL in bf16 (test_step_time.py) |
| REPEATED_BY_SELECTIVE, REPEATED_BY_FULL | counted there, and by `python benchmarks/activations.py` |
| *_LAUNCHES | counted on the CPU at SDXL's true topology, by `python benchmarks/launches.py` |
| bytes of an update | counted: the optimizer's state read and written, gradients read twice, weights written |
| bytes that are sent | counted by `python benchmarks/gradients.py` |
| SAMPLES_A_SECOND | measured on a CPU (docs/DATA_SPEED.md) |
| peaks, bandwidths, links, NETWORK_GBS | public (gpus.py; an adapter of 400 Gbit/s for each GPU) |
| *_EFFICIENCY, ATTENTION_BACKWARD, LAUNCH_SECONDS, HOST_*_GBS, what overlaps | assumed |

Not modelled: `engine.compile`, which fuses kernels; `engine.fp8`; kernels of LoRA adapters; arithmetic of optimizers;
latency of collectives; waits for slow ranks; validation, generated images and checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import WEIGHT_TYPES
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.text.tokens import WINDOW
from sdxl_trainer.train.engine.deepspeed_config import compute_batch_sizes, resolve_gradient_types
from sdxl_trainer.train.estimates.communication import count_sent_bytes
from sdxl_trainer.train.estimates.flops import (
    BACKWARD_PASSES,
    REPEATED_BY_FULL,
    FlopCount,
    ForwardCounts,
    count_forward,
    list_areas,
)
from sdxl_trainer.train.estimates.gpus import Gpu
from sdxl_trainer.train.estimates.memory import resolve_state_bytes
from sdxl_trainer.train.estimates.text_encoders import count_encoder_flops, count_encoder_weights
from sdxl_trainer.train.networks.trained_networks import ENCODERS, list_trained_encoders

# Shares of the peak in bf16, of the memory's bandwidth, and of NVLink's, PCIe's or the network's. All are assumed.
MATRIX_EFFICIENCY, CONVOLUTION_EFFICIENCY, ATTENTION_EFFICIENCY = 0.58, 0.46, 0.35
MEMORY_EFFICIENCY, LINK_EFFICIENCY = 0.7, 0.8
ATTENTION_BACKWARD = 2.5  # forward passes: flash attention computes the scores again
# Bytes that eager norms, activations, additions and biases move / bytes that products with weights write.
MOVED_FORWARD, MOVED_BACKWARD = 3.41, 6.45
REPEATED_BY_SELECTIVE = 0.47  # share of the forward pass's moved bytes that selective checkpointing moves again
TRAFFIC = "norms and activations"
VALUE_BYTES = 2  # of bf16 and fp16
# At ZeRO 2 in bf16 on one rank, as docs/BENCHMARKS.md has them. Of a micro step: the U-Net's passes, text encoders,
# and the objective, sums and hooks beside them; of an update with one moving average.
FORWARD_LAUNCHES, BACKWARD_LAUNCHES, TEXT_LAUNCHES, OTHER_LAUNCHES = 1998, 3804, 577, 271
UPDATE_LAUNCHES = 462
USUAL_WIDTH = 1280  # of the matrices in which weights are counted for an optimizer that factors them
LAUNCH_SECONDS = 6e-6  # assumed: the host's time for one operator of PyTorch
NETWORK_GBS = 50.0
HOST_LINK_GBS, HOST_MEMORY_GBS = 25.0, 50.0  # assumed: PCIe 4.0 x16, and a rank's share of the host's memory
SAMPLES_A_SECOND = 1644  # of one worker process
RANKS_OF_A_NODE = 8  # assumed where nothing is known


@dataclass(frozen=True)
class StepEstimate:
    """Estimated time of a step, by parts that do not overlap."""

    parts: Mapping[str, float]  # seconds

    @property
    def seconds(self) -> float:
        """The time of a step."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def largest_share(self) -> float:
        """Share of the largest part."""
        return self.parts[self.largest] / self.seconds


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of a GPU."""

    matrix_flops: float = 0.0
    convolution_flops: float = 0.0
    attention_flops: float = 0.0
    moved_bytes: float = 0.0

    def compute_seconds(self, gpu: Gpu) -> dict[str, float]:
        """Return the seconds of each kind of work."""
        return {
            "matrix products": self.matrix_flops / (gpu.peak_flops * MATRIX_EFFICIENCY),
            "convolution layers": self.convolution_flops / (gpu.peak_flops * CONVOLUTION_EFFICIENCY),
            "attention products": self.attention_flops / (gpu.peak_flops * ATTENTION_EFFICIENCY),
            TRAFFIC: self.moved_bytes / (gpu.memory_gbs * 1e9 * MEMORY_EFFICIENCY),
        }


def estimate_step(
    config: Config,
    source: ModelSource,
    world_size: int,
    gpu: Gpu,
    latent_areas: Mapping[int, int] | None = None,
    ranks_per_node: int = RANKS_OF_A_NODE,
) -> StepEstimate | None:
    """Estimate the time of a step.

    Args:
        config: with `engine.zero_stage` and `engine.gradient_checkpointing` chosen.
        gpu: of every rank.
        latent_areas: h x w of the latents → their number; None for squares of each of `data.resolution_px`.

    Returns:
        None for fp32, whose peak is not in the table, for a U-Net that is frozen in part or does not have SDXL's
        topology, and for a global batch that is too small for the ranks.
    """
    images, steps = config.train.micro_batch_size, compute_batch_sizes(config.train, world_size).accumulation_steps
    if WEIGHT_TYPES[config.engine.precision] == "fp32" or not trains_whole_unet(config) or not steps:
        return None
    try:
        forward = count_forward(source.read_config("unet"), config.data.max_tokens + 2)
        encoders = {name: source.read_config(name) for name in ENCODERS}
    except (OSError, ValueError, KeyError):
        return None
    image = average_image(forward, latent_areas or dict.fromkeys(list_areas(config.data), 1))
    micro = estimate_micro_step(config, image, images, gpu)
    text = estimate_text(config, encoders, images, gpu)
    if text:
        micro["text encoders"] = text
    launches = count_micro_step_launches(config) * LAUNCH_SECONDS
    waits = max(0.0, launches - sum(micro.values()))
    parts = {name: steps * seconds for name, seconds in {**micro, "kernel launches": waits}.items()}
    num_trained = 0 if config.lora.rank else forward.num_weights
    parts["weight update"] = estimate_update(config, world_size, num_trained, gpu)
    forward_seconds = steps * images * sum(image.compute_seconds(gpu).values())
    backward_seconds = steps * images * sum(count_backward(image, bool(config.lora.rank)).compute_seconds(gpu).values())
    link = gpu.link_gbs if world_size <= ranks_per_node else min(NETWORK_GBS, gpu.link_gbs)
    parts["communication of ranks"] = estimate_communication(
        config, world_size, num_trained, link, forward_seconds, backward_seconds
    )
    workers = max(1, config.data.num_workers)
    loading = steps * images / (SAMPLES_A_SECOND * workers)
    parts["wait for data"] = max(0.0, loading - sum(parts.values())) if config.data.num_workers else loading
    return StepEstimate({name: seconds for name, seconds in parts.items() if seconds})


def trains_whole_unet(config: Config) -> bool:
    """Return whether every weight or adapter of the U-Net is trained; else a backward pass takes fewer FLOPs."""
    return not (0 in (config.optim.block_lrs or ()) or any(group.lr == 0 for group in config.optim.groups))


def average_image(forward: ForwardCounts, latent_areas: Mapping[int, int]) -> Work:
    """Return the mean work of the forward pass of an image.

    Args:
        latent_areas: h x w of the latents → their number.
    """
    total = sum(latent_areas.values())

    def average(count: FlopCount) -> float:
        return sum(number * count.compute(area) for area, number in latent_areas.items()) / total

    return Work(
        matrix_flops=average(forward.matrix),
        convolution_flops=average(forward.convolution),
        attention_flops=average(forward.attention),
        moved_bytes=MOVED_FORWARD * VALUE_BYTES * average(forward.outputs),
    )


def estimate_micro_step(config: Config, image: Work, images: int, gpu: Gpu) -> dict[str, float]:
    """Estimate the U-Net's passes over a micro batch on the GPU, in seconds by kind of work.

    Args:
        image: work of the forward pass of an image.
    """
    forward = image.compute_seconds(gpu)
    backward = count_backward(image, bool(config.lora.rank)).compute_seconds(gpu)
    seconds = {kind: images * (forward[kind] + backward[kind]) for kind in forward}
    repeated = {"full": REPEATED_BY_FULL * sum(forward.values()), "selective": REPEATED_BY_SELECTIVE * forward[TRAFFIC]}
    if again := repeated.get(config.engine.gradient_checkpointing):
        seconds["gradient checkpointing"] = images * again
    return seconds


def count_backward(image: Work, is_adapter: bool) -> Work:
    """Return the work of the backward pass of an image.

    Args:
        image: work of its forward pass.
        is_adapter: the weights are frozen, and only gradients of the inputs are computed.
    """
    passes = BACKWARD_PASSES - is_adapter
    return Work(
        matrix_flops=passes * image.matrix_flops,
        convolution_flops=passes * image.convolution_flops,
        attention_flops=ATTENTION_BACKWARD * image.attention_flops,
        moved_bytes=MOVED_BACKWARD / MOVED_FORWARD * image.moved_bytes,
    )


def estimate_text(config: Config, encoders: Mapping[str, Mapping[str, Any]], images: int, gpu: Gpu) -> float:
    """Estimate the seconds of the text encoders in a micro step; 0 with cached text. Trained ones run backwards too."""
    if config.cache.text:
        return 0.0
    windows, trained = config.data.max_tokens // WINDOW, list_trained_encoders(config.optim)
    seconds = 0.0
    for name, encoder in encoders.items():
        passes = 3 if name in trained else 1
        flops = images * windows * count_encoder_flops(encoder)
        weights = VALUE_BYTES * count_encoder_weights(encoder)
        seconds += passes * max(
            flops / (gpu.peak_flops * MATRIX_EFFICIENCY), weights / (gpu.memory_gbs * 1e9 * MEMORY_EFFICIENCY)
        )
    return max(seconds, TEXT_LAUNCHES * LAUNCH_SECONDS)


def count_micro_step_launches(config: Config) -> int:
    """Count the kernels that the host starts in a micro step."""
    repeated = REPEATED_BY_FULL if config.engine.gradient_checkpointing == "full" else 0
    text = 0 if config.cache.text else TEXT_LAUNCHES
    return int((1 + repeated) * FORWARD_LAUNCHES) + BACKWARD_LAUNCHES + OTHER_LAUNCHES + text


def estimate_update(config: Config, world_size: int, num_trained: int, gpu: Gpu) -> float:
    """Estimate the seconds of an update: its memory traffic, on the host with `engine.offload_optimizer`."""
    as_matrix = [(num_trained // USUAL_WIDTH, USUAL_WIDTH)]
    state, launches = resolve_state_bytes(config, as_matrix, world_size), UPDATE_LAUNCHES * LAUNCH_SECONDS
    share = num_trained / state.optimizer_shares
    updated = 2 * (state.master + state.moments + state.averages) + 2 * state.gradient + state.weight
    if not config.engine.offload_optimizer:
        return max(launches, share * updated / (gpu.memory_gbs * 1e9 * MEMORY_EFFICIENCY))
    copied = state.gradient + state.weight
    return share * (copied / (HOST_LINK_GBS * 1e9) + updated / (HOST_MEMORY_GBS * 1e9))


def estimate_communication(
    config: Config, world_size: int, num_trained: int, link_gbs: float, forward_seconds: float, backward_seconds: float
) -> float:
    """Estimate the seconds in which ranks only send and receive.

    ZeRO 1 to 3 reduce gradients during the backward passes; ZeRO 1 only in the last one. ZeRO 3 fetches the weights of
    each pass while it runs.

    Args:
        forward_seconds: of the forward passes of all micro steps; `backward_seconds` likewise.
    """
    if world_size == 1:
        return 0.0
    stage, steps = config.engine.zero_stage or 0, compute_batch_sizes(config.train, world_size).accumulation_steps
    types = resolve_gradient_types(config.engine, world_size, steps, config.optim.name == "muon")
    sent = count_sent_bytes(stage, steps, types.communication, world_size, WEIGHT_TYPES[config.engine.precision])
    pace = num_trained * (world_size - 1) / world_size / (link_gbs * 1e9 * LINK_EFFICIENCY)
    hidden = {0: 0.0, 1: backward_seconds / steps}.get(stage, backward_seconds)
    if stage == 3:
        fetched = sent.gathered / 2 * pace  # for each of both passes
        return max(0.0, fetched - forward_seconds) + max(0.0, sent.reduced * pace + fetched - backward_seconds)
    return max(0.0, sent.reduced * pace - hidden) + sent.gathered * pace
