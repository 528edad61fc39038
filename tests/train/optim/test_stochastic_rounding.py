"""Stochastic rounding: correct on average, in optimizers that otherwise equal the plain ones."""

import shutil
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.metrics
from optimi import Lion

from sdxl_trainer.train.optim import stochastic_rounding as stochastic
from sdxl_trainer.train.optim.wide_updates import subtract


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def round_values(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    (noise, *_) = stochastic.draw_halves(len(values), 0, (seed, 2 * seed + 1), values)
    return stochastic.round_stochastically(values, noise)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_is_correct_on_average(sign: int) -> None:
    """Values between 1 and its successor 1 + 2^-7: at a quarter, a half, and 2^-16 of the way."""
    count = 2**20
    for share in (0.25, 0.5, 2.0**-16):
        values = torch.full((count,), sign * (1 + share * 2**-7))
        rounded = round_values(values)
        assert rounded.dtype == torch.bfloat16
        upper = rounded == sign * (1 + 2**-7)
        assert (upper | (rounded == sign)).all()
        deviation = (share * (1 - share) / count) ** 0.5
        assert upper.double().mean().item() == pytest.approx(share, abs=4 * deviation)


def test_the_mean_of_many_roundings_is_the_value_at_any_size() -> None:
    values = torch.randn(1000, generator=make_generator(1)) * 10.0 ** torch.linspace(-30, 30, 1000)
    rounded = [round_values(values, seed).double() for seed in range(400)]
    error = (torch.stack(rounded).mean(0) - values) / values.abs()  # at most 2^-8·0.5/20 of a deviation
    assert error.abs().max() < 1.5e-3 and error.mean().abs() < 2e-5
    exact = values.bfloat16().float()
    assert round_values(exact).float().equal(exact)
    nothing = torch.tensor([0.0, -0.0, torch.inf])
    assert round_values(nothing).tolist() == nothing.tolist()


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_updates_are_those_of_the_plain_optimizers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding, and in chunks, the numbers equal those of PyTorch's AdamW and optimi's Lion."""
    monkeypatch.setattr(stochastic, "round_stochastically", lambda values, noise: values)
    monkeypatch.setattr(stochastic, "CHUNK", 7)
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.02}
    plain = {"AdamW": torch.optim.AdamW, "Lion": lambda *args, **kwargs: Lion(*args, **kwargs, kahan_sum=False)}[name]
    weights = []
    for kind in (getattr(stochastic, name), plain):
        weight = torch.nn.Parameter(torch.randn(4, 5, generator=make_generator(2)))
        optimizer = kind([weight], **settings)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            weight.grad = torch.randn(4, 5, generator=make_generator(3 + step))
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)


def test_small_updates_add_up_and_the_second_moment_falls() -> None:
    """1000 steps of 1/400 of the rounding error of a weight of 1; a gradient that was large is forgotten."""
    weight = torch.nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    optimizer = stochastic.AdamW([weight], lr=1e-5, weight_decay=0.0)
    for step in range(1000):
        weight.grad = torch.full_like(weight, 1.0 if step < 2 else 2.0**-6)
        optimizer.step()
    state = optimizer.state[weight]
    assert {value.dtype for value in state.values() if isinstance(value, torch.Tensor)} == {torch.bfloat16}
    exact = torch.nn.Parameter(torch.ones(1))
    plain = torch.optim.AdamW([exact], lr=1e-5, weight_decay=0.0)
    for step in range(1000):
        exact.grad = torch.full_like(exact, 1.0 if step < 2 else 2.0**-6)
        plain.step()
    moved, expected = 1 - weight.detach().float().mean(), 1 - exact.detach()
    assert moved.item() == pytest.approx(expected.item(), rel=0.1)
    second = plain.state[exact]["exp_avg_sq"].item()
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(second, rel=0.02)


def test_seeds_and_steps_draw_different_numbers() -> None:
    def update(seed: int, steps: int = 1) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
        optimizer = stochastic.Lion([weight], lr=1e-3, weight_decay=0.0, seed=seed)
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach()

    assert update(1).equal(update(1)) and not update(1).equal(update(2))
    changed = [1 - update(1), update(1) - update(1, steps=2)]
    assert not (changed[0] > 0).equal(changed[1] > 0)


def test_random_halves_are_uniform_and_unrelated() -> None:
    """Means and variances of 2^18 numbers below 2^16, and their correlation over positions, tensors and keys."""
    like, count = torch.zeros(0), 2**18
    halves = [half.double() for half in stochastic.draw_halves(count, 0, (3, 11), like)]
    others = [half.double() for half in stochastic.draw_halves(count, 0, (4, 12), like)]
    for half in halves:
        assert half.min() >= 0 and half.max() <= 2**16 - 1 and half.mean().item() == pytest.approx(2**15, rel=0.005)
        assert half.std().item() == pytest.approx(2**16 / 12**0.5, rel=0.005)
    moved = [half.roll(1) for half in halves]
    correlations = torch.corrcoef(torch.stack([*halves, *others, *moved])) - torch.eye(9)
    assert correlations.abs().max() < 5 / count**0.5
    parts = [stochastic.draw_halves(1000, start, (3, 11), like)[2] for start in (0, 1000)]
    assert torch.cat(parts).equal(stochastic.draw_halves(2000, 0, (3, 11), like)[2])


def test_tensors_draw_different_numbers() -> None:
    weights = [torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = stochastic.Lion(weights, lr=1e-3, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not weights[0].equal(weights[1])


class RoundedChange:
    """What Adafactor rounds: a weight times the share that is kept, minus a change in fp32."""

    MOMENTS = ()
    compute = staticmethod(subtract)

    @staticmethod
    def list_scalars(group: dict[str, Any], step: int) -> list[float]:
        """List the share that is kept."""
        return [1 - group["lr"] * group["weight_decay"]]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which inductor needs on a CPU")
@pytest.mark.parametrize("name", ["AdamW", "Lion", "Adafactor"])
def test_a_compiled_update_is_one_kernel_for_all_sizes_and_rates(name: str) -> None:
    kind = RoundedChange if name == "Adafactor" else getattr(stochastic, name)
    group = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02}
    torch._inductor.metrics.reset()
    torch._dynamo.utils.counters.clear()
    update = stochastic.compile_update()
    for step, count in enumerate((5000, 7001, 64), start=1):
        gradient = torch.randn(count, generator=make_generator(step)).bfloat16()
        stored = [torch.rand(count, generator=make_generator(7)).bfloat16() for _ in range(1 + len(kind.MOMENTS))]
        compiled = [values.clone() for values in stored]
        scalars = kind.list_scalars({"lr": 0.1 / step, **group}, step)
        stochastic.update_rounded(kind.compute, gradient, stored, scalars, 0, (step, 77))
        numbers = torch.tensor(scalars).unbind()
        update(kind.compute, gradient, compiled, numbers, 0, torch.tensor([step, 77], dtype=torch.int32).unbind())
        for values, expected in zip(compiled, stored, strict=True):
            assert (values != expected).double().mean() < 1e-3  # where the last bit in fp32 differs, the carry may
    assert torch._inductor.metrics.generated_kernel_count == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
