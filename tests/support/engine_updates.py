"""A step whose loss or gradient is not finite leaves the engine unchanged; test_non_finite.py runs this on two ranks.

For each ZeRO stage and precision, masters begin as the unrounded weights. Three steps, of which the second one is
spoilt on the last rank, end in the weights of a run without that step. Prints one line for each case and exits with
status 1 if one is wrong.
"""

import math
import sys
from itertools import product

import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.launch.distributed import Ranks, close_ranks, init_ranks
from sdxl_trainer.launch.program import end_program
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.run.non_finite import propagate_non_finite

ACCUMULATION_STEPS = 2
SPOILT = {
    "fine": lambda prediction: prediction.mean(),
    "loss": lambda prediction: (prediction - math.inf).abs().mean(),  # infinite, with a gradient of 1
    "gradient": lambda prediction: (0 * prediction).square().sum().sqrt(),  # 0, with a gradient of 0/0
}


def train(stage: int, precision: str, steps: list[str], ranks: Ranks) -> tuple[torch.Tensor, list[bool], list[float]]:
    """Train `steps`, keys of SPOILT; return all weights, whether each step updated them, and the gradients' norms."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    begun = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    batch = BatchSizes(ranks.world_size * ACCUMULATION_STEPS, 1, ACCUMULATION_STEPS)
    engine = Engine(model, optimizer, EngineConfig(zero_stage=stage, precision=precision), batch, max_grad_norm=0.5)
    for name, weight in begun.items():
        assert engine.weights.gather(name).equal(weight), f"the master of {name} was rounded"
    updated, norms = [], []
    for number, kind in enumerate(steps):
        for micro_step in range(ACCUMULATION_STEPS):
            generator = torch.Generator().manual_seed(2 * ranks.rank + micro_step)
            prediction = engine(torch.randn(1, 4, generator=generator).to(ranks.device, engine.dtype)).float()
            spoil = number == 1 and micro_step == 0 and ranks.rank == ranks.world_size - 1
            engine.backward(propagate_non_finite(SPOILT[kind if spoil else "fine"](prediction)))
            applied = engine.step()
        updated.append(applied)
        norms.append(engine.grad_norm())
    assert engine.completed_steps == len(steps)
    weights = torch.cat([engine.weights.gather(name).flatten() for name, _ in model.named_parameters()])
    return weights, updated, norms


def main() -> int:
    """Run all cases."""
    ranks, wrong = init_ranks(), 0
    for stage, precision in product(range(4), ("fp32", "bf16")):
        expected, updated, norms = train(stage, precision, ["fine", "fine"], ranks)
        fine = updated == [True, True] and min(norms) > 0.5
        for kind in ("loss", "gradient"):
            weights, updated, norms = train(stage, precision, ["fine", kind, "fine"], ranks)
            fine = updated == [True, False, True] and weights.equal(expected) and not math.isfinite(norms[1]) and fine
            wrong += not fine
            if ranks.is_main:
                sys.stdout.write(f"ZeRO-{stage} {precision} {kind}: {'ok' if fine else f'WRONG {updated} {norms}'}\n")
    close_ranks()
    return int(wrong > 0)


if __name__ == "__main__":
    end_program(main())
