"""Sums of gradients against fp64, bytes sent and memory, for each ZeRO stage and data type.

The ranks run benchmarks/gradients.py, which trains weights with known gradients.
"""

import json
import sys
from itertools import product

import pytest
import torch
from programs import ROOT, run_program

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.engine.deepspeed_config import CAN_SUM_IN_FP32, BatchSizes
from sdxl_trainer.train.engine.engine import Engine

sys.path.insert(0, str(ROOT / "benchmarks"))
from gradients import LARGEST_PEAK, RANKS, STAGES, STEPS, measure_sum  # noqa: E402
from scale import compute_sent_bytes  # noqa: E402

NUM_TENSORS = 30  # in the sums of several ranks; a step of ZeRO costs time by tensor


def measure(
    types: list[tuple[str, str]],
    peaks: list[tuple[int, int]],
    ranks: int,
    monkeypatch: pytest.MonkeyPatch,
    **more: int,
) -> dict[str, float]:
    """Return the figures of benchmarks/gradients.py for pairs of types (accumulation, communication), and for pairs of
    a stage and a number of micro steps."""
    settings = {"types": types, "peaks": peaks, **more}
    monkeypatch.setenv("BENCHMARK_SETTINGS", json.dumps(settings))
    printed = run_program("benchmarks/gradients.py", ranks=ranks)
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


def test_several_ranks_add_in_fp32_and_send_what_scale_md_says(monkeypatch: pytest.MonkeyPatch) -> None:
    types = [("auto", "auto"), ("fp32", "bf16"), ("bf16", "bf16")]
    figures = measure(types, [(stage, STEPS) for stage in STAGES], RANKS, monkeypatch, num_tensors=NUM_TENSORS)
    for stage in STAGES:
        exact, sent_low, all_low = (figures[f"error_ranks{RANKS}_zero{stage}_{one}_{other}"] for one, other in types)
        # Two ranks in bf16 are one rounding more; 4 micro steps in bf16 are several.
        assert exact < 1e-6 < 1e-3 < sent_low < all_low < 1e-2, stage
    for stage, (_, communication) in product(STAGES, types[:2]):
        name = f"ranks{RANKS}_zero{stage}_{'auto' if communication == 'auto' else 'fp32'}_{communication}"
        expected = compute_sent_bytes(stage, STEPS, communication.replace("auto", "fp32"), RANKS)
        # ZeRO 3 keeps some weights from the forward to the backward pass, so it gathers less than twice.
        assert figures[f"sent_{name}"] == pytest.approx(expected, rel=0.35 if stage == 3 else 0.01), name
        assert figures.get(f"bytes_{name}_reduce", 0) == pytest.approx(expected - 2 if stage in (1, 2) else 0, abs=0.01)
    # Weights 2, masters and moments 12, of which a rank has half, and the sums: whole, whole, half, half.
    peaks = {0: 22.1, 1: 12.6, 2: 10.8, 3: 11.8}
    for stage, limit in peaks.items():
        assert figures[f"peak_ranks{RANKS}_zero{stage}_steps{STEPS}"] < limit


def test_one_rank_takes_no_more_memory_without_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = measure([("auto", "auto"), ("bf16", "auto")], [(1, 1), (2, STEPS)], 1, monkeypatch)
    assert len(LARGEST_PEAK) == 2
    for name, limit in LARGEST_PEAK.items():
        assert figures[f"peak_{name}"] < limit
    for stage in STAGES:
        assert figures[f"error_ranks1_zero{stage}_auto_auto"] < 1e-6 < 1e-3
        assert figures[f"error_ranks1_zero{stage}_bf16_auto"] > 1e-3


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_sums_are_in_fp32_too(stage: int) -> None:
    init_ranks()
    exact, rounded = (measure_sum(stage, kind, "auto", offload_optimizer=True)[0] for kind in ("auto", "bf16"))
    assert exact < 1e-6 < 1e-3 < rounded


@pytest.mark.skipif(not CAN_SUM_IN_FP32, reason="this PyTorch has no grad_dtype")
def test_zero_0_adds_in_fp32_though_a_weight_has_no_gradient() -> None:
    """DeepSpeed makes a gradient in bf16 for it, which autograd refuses beside sums in fp32."""
    init_ranks()
    net = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    config = EngineConfig(zero_stage=0, precision="bf16")
    engine = Engine(net, torch.optim.SGD(net.parameters(), lr=0.1), config, BatchSizes(2, 1, 2), max_grad_norm=1.0)
    engine._engine.enable_backward_allreduce = True
    before = engine.weights.gather("1.weight")
    for _ in range(2):
        engine.backward(engine.model[0](torch.ones(1, 3, dtype=torch.bfloat16)).float().sum())
        engine.step()
    assert engine.weights.gather("1.weight").equal(before)
    assert engine.grad_norm() == pytest.approx(12**0.5, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_overlapped_reduction_gives_the_same_weights(stage: int) -> None:
    init_ranks()
    weights = []
    for overlap in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(64, 64)
        settings = {"zero_optimization": {"overlap_comm": overlap, "use_multi_rank_bucket_allreduce": False}}
        config = EngineConfig(zero_stage=stage, precision="bf16", deepspeed=settings)  # pyright: ignore
        engine = Engine(net, torch.optim.SGD(net.parameters(), lr=0.1), config, BatchSizes(2, 1, 2), max_grad_norm=0.0)
        for number in range(4):
            inputs = torch.randn(1, 64, generator=torch.Generator().manual_seed(number)).bfloat16()
            engine.backward(engine(inputs).float().square().sum())
            engine.step()
        weights.append(engine.weights.gather("weight"))
    assert weights[0].equal(weights[1])
