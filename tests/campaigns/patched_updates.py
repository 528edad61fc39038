"""Training with and without train/engine/kernel_patches.py gives equal weights; test_kernel_patches.py runs this.

Prints a line for each case, and exits with status 1 if one is wrong. Buckets are so small that each case fills several,
and one weight is larger than a bucket.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.launch.distributed import Ranks, close_ranks, init_ranks
from sdxl_trainer.launch.program import end_program
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine

STEPS, BUCKET = 3, 60
ENGINE = "sdxl_trainer.train.engine.engine"
SHARE = "sdxl_trainer.train.engine.gradient_sums.WAITING_SHARE"


class Case(NamedTuple):
    """Settings that are compared."""

    stage: int
    precision: str
    accumulation_dtype: str = "auto"
    accumulation_steps: int = 2
    max_grad_norm: float = 0.05  # smaller than the norm of all steps
    overlap: bool = False


CASES = (
    *(Case(stage, precision) for stage in (0, 1, 2) for precision in ("fp32", "bf16")),
    *(Case(stage, "bf16", "bf16", 1) for stage in (0, 1, 2)),
    *(Case(1, "bf16", "fp32", 1), Case(2, "bf16", "bf16"), Case(2, "bf16", max_grad_norm=0.0)),
    *(Case(stage, precision, overlap=True) for stage in (1, 2) for precision in ("fp32", "bf16")),
)


class Trained(NamedTuple):
    """Result of a short training."""

    weights: torch.Tensor
    norms: list[float]


def train(case: Case, ranks: Ranks, patched: bool) -> Trained:
    """Train a small network, and return all its weights and the norm of each step's gradients."""
    torch.manual_seed(0)
    sizes = [(4, 10), (10, 3), (3, 25), (25, 2)]
    model = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters(), "weight_decay": 0.1}]
    zero = {"reduce_bucket_size": BUCKET, "overlap_comm": case.overlap}
    config = EngineConfig(
        zero_stage=case.stage,
        precision=case.precision,  # pyright: ignore
        accumulation_dtype=case.accumulation_dtype,  # pyright: ignore
        deepspeed={"zero_optimization": zero},
    )
    batch = BatchSizes(ranks.world_size * case.accumulation_steps, 1, case.accumulation_steps)
    plain = {"start_fewer_kernels": lambda *_: None, "add_up_at_zero_0": let_autograd_add}
    with nullcontext() if patched else mock.patch.multiple(ENGINE, **plain):
        engine = Engine(model, torch.optim.AdamW(groups, lr=0.1), config, batch, case.max_grad_norm)
    norms = []
    for step in range(STEPS):
        for inputs in draw_inputs(case, ranks, step):
            engine.backward(engine(inputs.to(engine.dtype)).float().square().mean())
            engine.step()
        norms.append(engine.grad_norm())
    names = [name for name, _ in model.named_parameters()]
    return Trained(torch.cat([engine.weights.gather(name).flatten() for name in names]), norms)


def let_autograd_add(engine: Any, dtype: torch.dtype) -> None:
    """Let PyTorch add each gradient up by itself."""
    for weight in engine.module.parameters():
        weight.grad_dtype = dtype


def draw_inputs(case: Case, ranks: Ranks, step: int) -> Iterator[torch.Tensor]:
    """Draw the inputs of this rank's micro steps."""
    for micro_step in range(case.accumulation_steps):
        generator = torch.Generator().manual_seed(100 * step + 10 * micro_step + ranks.rank)
        yield torch.randn(2, 4, generator=generator)


def list_gradients(weights: Sequence[torch.nn.Parameter]) -> tuple[list[torch.Tensor], dict]:
    """Return the gradients of weights, and no gradients of experts."""
    return [weight.grad for weight in weights if weight.grad is not None], {}


def compute_exact_norm(gradients: Sequence[torch.Tensor], **_: object) -> float:
    """Return the norm of all gradients, computed in fp64."""
    return torch.cat([gradient.double().flatten() for gradient in gradients]).norm().item()


def compare(case: Case, ranks: Ranks) -> str:
    """Return what differs between training with and without the patches, or an empty string."""
    with mock.patch(SHARE, 1 / 8):
        patched = train(case, ranks, patched=True)
    # Gradients are clipped by their norm, which DeepSpeed computes in fp32 at ZeRO 0, of gradients in bf16.
    exact = {"get_weight_norm": compute_exact_norm, "split_params_grads_into_shared_and_expert_params": list_gradients}
    with mock.patch.multiple("deepspeed.runtime.fp16.unfused_optimizer", **exact):
        plain = train(case, ranks, patched=False)
    if not patched.weights.equal(plain.weights):
        return f"weights differ by up to {(patched.weights - plain.weights).abs().max():g}"
    pairs = list(zip(patched.norms, plain.norms, strict=True))
    if any(abs(one - other) > 1e-6 * other for one, other in pairs):
        return f"norms differ: {pairs}"
    return "" if min(plain.norms) > 0.05 else f"norms are too small to be clipped: {plain.norms}"


def main() -> int:
    """Compare all cases."""
    ranks, wrong = init_ranks(), 0
    for case in CASES:
        difference = compare(case, ranks)
        wrong += difference != ""
        if ranks.is_main:
            sys.stdout.write(f"{case}: {difference or 'ok'}\n")
    close_ranks()
    return int(wrong > 0)


if __name__ == "__main__":
    end_program(main())
