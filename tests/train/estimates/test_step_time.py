"""The model of a step's time: what it counts is what PyTorch counts, and its parts follow settings and hardware."""

import json
import re
from collections import Counter
from typing import Any

import pytest
import torch
from programs import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates import step_time
from sdxl_trainer.train.estimates.flops import REPEATED_BY_FULL, count_forward, count_training_flops
from sdxl_trainer.train.estimates.gpus import GPUS
from sdxl_trainer.train.estimates.networks import FlashAttention
from sdxl_trainer.train.estimates.step_time import StepEstimate, estimate_step

SDXL = ModelSource(ROOT / "configs" / "sdxl")
H100 = GPUS["NVIDIA H100 80GB HBM3"]
MATRIX, CONVOLUTION, ATTENTION = "matrix products", "convolution layers", "attention products"
UPDATE, SENDING = "weight update", "communication of ranks"
PRODUCTS = {"mm", "addmm", "bmm", "convolution", "convolution_backward"}
NO_KERNEL = {"empty", "empty_like", "detach", "zeros", "_unsafe_view", "alias"}
OF_SELECTIVE = {"native_group_norm", "silu", "gelu", "mul"}  # mul is the gate's alone


class MovedBytes(TorchDispatchMode):
    """Bytes that operators other than products read and write, by name, and the bytes that products write."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in NO_KERNEL or "flash_attention" in name:
            return output
        sizes = [item.nbytes for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        written = sum(item.nbytes for item in tree_leaves(output) if isinstance(item, torch.Tensor))
        if name not in PRODUCTS:
            # A norm reads its input for the moments, and again.
            self.moved[name] += sum(sizes) + written + (sizes[0] if "norm" in name else 0)
        elif name == "convolution":  # its bias is added by a kernel of its own
            self.moved["bias"] += 2 * written
        self.written += written if name in ("mm", "addmm", "convolution") else 0
        return output


def test_moved_bytes_are_those_of_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    # DeepSpeed's ZeRO 3 replaces the function for the whole process, and other tests run it.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    config, dtype = json.loads((ROOT / "configs/sdxl/unet/config.json").read_text()), torch.bfloat16
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
        unet = unet.to(dtype)
        conditions = {"text_embeds": torch.zeros(1, 1280, dtype=dtype), "time_ids": torch.zeros(1, 6, dtype=dtype)}
        text, latents = torch.zeros(1, 77, 2048, dtype=dtype), torch.zeros(1, 4, 128, 128, dtype=dtype)
        with FlashAttention(), MovedBytes() as forward:
            loss = unet(latents, torch.zeros(1), text, added_cond_kwargs=conditions).sample.float().square().mean()
        with MovedBytes() as backward:
            loss.backward()
    assert forward.written == 2 * count_forward(config, 77).outputs.compute(128 * 128)
    assert forward.moved.total() / forward.written == pytest.approx(step_time.MOVED_FORWARD, rel=0.01)
    assert backward.moved.total() / forward.written == pytest.approx(step_time.MOVED_BACKWARD, rel=0.01)
    again = sum(forward.moved[name] for name in OF_SELECTIVE)
    assert again / forward.moved.total() == pytest.approx(step_time.REPEATED_BY_SELECTIVE, abs=0.01)


def test_launches_are_those_that_the_document_has_counted() -> None:
    page = (ROOT / "docs" / "BENCHMARKS.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| 2, bf16, 1 |"))
    assert re.findall(r"\| (\d+) (?=\|)", row) == [str(step_time.OTHER_LAUNCHES), str(step_time.UPDATE_LAUNCHES)]
    passes = f"{step_time.FORWARD_LAUNCHES:,} kernels in bf16 and its backward pass {step_time.BACKWARD_LAUNCHES:,}"
    text = f"the frozen text encoders start {step_time.TEXT_LAUNCHES}"
    assert f"starts {passes}; {text}" in " ".join(page.split())


def estimate(*words: str, ranks: int = 1, gpu: Any = H100, areas: dict[int, int] | None = None) -> StepEstimate | None:
    """Four images a rank, cached text, no accumulation, unless the words say otherwise."""
    fixed = ["engine.gradient_checkpointing=off", "cache.text=true", "engine.precision=bf16", "data.num_workers=2"]
    fixed += [f"train.global_batch_size={4 * ranks}", "train.micro_batch_size=4"]
    config, problems = build_config({}, [*fixed, *words])
    assert problems == []
    return estimate_step(resolve_zero_stage(config, ranks)[0], SDXL, ranks, gpu, areas)


def get_parts(*words: str, ranks: int = 1, gpu: Any = H100, areas: dict[int, int] | None = None) -> dict[str, float]:
    found = estimate(*words, ranks=ranks, gpu=gpu, areas=areas)
    assert found is not None
    return dict(found.parts)


def test_parts_of_a_step_by_arithmetic() -> None:
    """SDXL's products for an image cost 20.28 TFLOP, and a weight's update moves 30 bytes."""
    parts = get_parts()
    assert set(parts) == {
        MATRIX,
        CONVOLUTION,
        ATTENTION,
        "norms and activations",
        UPDATE,
    }
    peak = 989.5e12
    flops = (parts[MATRIX] * 0.58 + parts[CONVOLUTION] * 0.46 + parts[ATTENTION] * 0.35 * 3 / 3.5) * peak
    assert flops == pytest.approx(4 * count_training_flops(SDXL.read_config("unet"), 77).compute(128 * 128))
    written = 2 * count_forward(SDXL.read_config("unet"), 77).outputs.compute(128 * 128)
    assert parts["norms and activations"] == pytest.approx(4 * (3.41 + 6.45) * written / (3.35e12 * 0.7))
    # Master and two moments of 4 bytes are read and written, the gradient of 2 read twice, the weight of 2 written.
    assert parts[UPDATE] == pytest.approx(2_567_463_684 * 30 / (3.35e12 * 0.7))


def test_settings_change_the_parts_that_they_are_about() -> None:
    plain = get_parts()
    full = get_parts("engine.gradient_checkpointing=full")
    forward = [plain[MATRIX] / 3, plain[CONVOLUTION] / 3, plain[ATTENTION] / 3.5]
    forward.append(plain["norms and activations"] * 3.41 / (3.41 + 6.45))
    assert full.pop("gradient checkpointing") == pytest.approx(0.77 * sum(forward)) and full == plain
    selective = get_parts("engine.gradient_checkpointing=selective")
    assert selective.pop("gradient checkpointing") == pytest.approx(0.47 * forward[-1]) and selective == plain
    # FLOPs again of a forward pass of 6.76 TFLOP (docs/PRECISION.md).
    assert REPEATED_BY_FULL == pytest.approx(5.21 / 6.76, rel=0.01)
    text = get_parts("cache.text=false")
    # 111.2 GFLOP an image take less time than the host needs for the kernels.
    assert text.pop("text encoders") == 577 * 6e-6 and text == plain
    long = get_parts(
        "cache.text=false", "data.max_tokens=225", "train.micro_batch_size=16", "train.global_batch_size=16"
    )
    assert long["text encoders"] == pytest.approx(48 * 111.2e9 / (989.5e12 * 0.58), rel=0.001)
    twice = get_parts("train.global_batch_size=8")  # sums of gradients are in fp32
    assert twice[ATTENTION] == 2 * plain[ATTENTION]
    assert twice[UPDATE] == pytest.approx(plain[UPDATE] * 34 / 30)
    adapters = get_parts("lora.rank=8")
    assert adapters[MATRIX] == pytest.approx(2 / 3 * plain[MATRIX])
    assert adapters[ATTENTION] == plain[ATTENTION] and adapters[UPDATE] < 0.1 * plain[UPDATE]
    offloaded = get_parts("engine.offload_optimizer=true")
    assert offloaded[UPDATE] > 10 * plain[UPDATE]
    alone = get_parts("data.num_workers=0")
    assert alone["wait for data"] == 4 / step_time.SAMPLES_A_SECOND


def test_small_steps_wait_for_the_host() -> None:
    parts = get_parts("train.micro_batch_size=1", "train.global_batch_size=1", "data.resolution_px=512")
    launches = step_time.FORWARD_LAUNCHES + step_time.BACKWARD_LAUNCHES + step_time.OTHER_LAUNCHES
    update = parts.pop(UPDATE)
    assert sum(parts.values()) == pytest.approx(launches * step_time.LAUNCH_SECONDS) and update > 0
    assert "kernel launches" in parts


def test_sending_hides_behind_the_backward_pass() -> None:
    node, network = (get_parts(ranks=ranks)[SENDING] for ranks in (8, 64))
    # ZeRO 2: gradients hide; after the update bf16 weights are gathered, by NVLink or by adapters of 50 GB/s.
    assert node == pytest.approx(2_567_463_684 * 2 * 7 / 8 / (450e9 * 0.8))
    backward = network - 2_567_463_684 * 2 * 63 / 64 / (50e9 * 0.8)
    assert 0 < backward < 2_567_463_684 * 4 * 63 / 64 / (50e9 * 0.8)  # a part of the gradients is left
    several = get_parts("train.global_batch_size=1024", ranks=64)[SENDING]
    # ZeRO 2 reduces gradients in each micro step, ZeRO 1 in the last.
    assert several == pytest.approx(4 * backward + 2_567_463_684 * 2 * 63 / 64 / (50e9 * 0.8))
    zero_1 = get_parts("train.global_batch_size=1024", "engine.zero_stage=1", ranks=64)[SENDING]
    assert zero_1 == pytest.approx(network)


def test_buckets_count_by_their_number() -> None:
    small, large = get_parts(areas={4096: 1}), get_parts(areas={16384: 1})
    mixed = get_parts(areas={4096: 3, 16384: 1})
    assert mixed[ATTENTION] == pytest.approx((3 * small[ATTENTION] + large[ATTENTION]) / 4)
    squares = get_parts("data.resolution_px=[512,1024]")
    assert squares[ATTENTION] == pytest.approx((small[ATTENTION] + large[ATTENTION]) / 2)


@pytest.mark.parametrize(
    "words", [["engine.precision=fp32"], ["optim.groups=[{match: x, lr: 0}]"], ["train.micro_batch_size=8"]]
)
def test_what_the_model_does_not_know_has_no_estimate(words: list[str]) -> None:
    assert estimate(*words) is None


def test_the_largest_part() -> None:
    found = StepEstimate({UPDATE: 0.1, ATTENTION: 0.3})
    assert (found.seconds, found.largest, found.largest_share) == (pytest.approx(0.4), ATTENTION, pytest.approx(0.75))
