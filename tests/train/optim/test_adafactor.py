"""Adafactor with stochastic rounding: the numbers of transformers' Adafactor, in 2 bytes a weight."""

import pytest
import torch
from transformers.optimization import Adafactor as PlainAdafactor

from sdxl_trainer.train.optim.adafactor import Adafactor

SHAPES = [(6, 10), (8, 4, 3, 3), (7,), (5, 3, 1, 1)]
RECIPE = {"relative_step": False, "scale_parameter": False, "warmup_init": False}


def build_weights(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, weights: list, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(10 + step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_in_fp32_are_those_of_transformers(weight_decay: float) -> None:
    weights, plain = build_weights(), build_weights()
    train(Adafactor(weights, lr=0.02, weight_decay=weight_decay), weights, range(5))
    train(PlainAdafactor(plain, lr=0.02, weight_decay=weight_decay, **RECIPE), plain, range(5))
    for weight, expected in zip(weights, plain, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


def test_convolutions_can_be_factored_as_matrices() -> None:
    weights, plain = build_weights(shapes=[(8, 4, 3, 3)]), build_weights(shapes=[(8, 4, 3, 3)])
    matrix = torch.nn.Parameter(plain[0].detach().reshape(8, 36))
    optimizer, expected = (
        Adafactor(weights, lr=0.02, factor_convolutions=True),
        PlainAdafactor([matrix], 0.02, **RECIPE),
    )
    for step in range(3):
        weights[0].grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
        matrix.grad = weights[0].grad.reshape(8, 36)
        optimizer.step()
        expected.step()
    torch.testing.assert_close(weights[0].reshape(8, 36), matrix, rtol=1e-6, atol=1e-7)
    assert optimizer.state[weights[0]]["exp_avg_sq_row"].shape == (8,)


def test_bf16_is_rounded_at_random_and_resumes_exactly() -> None:
    """Changes of 1/400 of bf16's steps add up, and a resume draws the same numbers with the same factors."""
    weights = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))]
    optimizer = Adafactor(weights, lr=2.0**-17)
    for _ in range(256):
        weights[0].grad = torch.ones_like(weights[0])
        optimizer.step()
    assert (1 - weights[0].float().mean()).item() == pytest.approx(256 * 2.0**-17, rel=0.1)
    whole, first, resumed = (build_weights(torch.bfloat16) for _ in range(3))
    train(Adafactor(whole, lr=0.02, seed=5), whole, range(5))
    optimizer = Adafactor(first, lr=0.02, seed=5)
    train(optimizer, first, range(2))
    again = Adafactor(resumed, lr=0.02, seed=5)
    again.load_state_dict(optimizer.state_dict())
    for weight, saved in zip(resumed, first, strict=True):
        weight.data.copy_(saved)
    assert again.state[resumed[0]]["exp_avg_sq_row"].dtype == torch.float32
    train(again, resumed, range(2, 5))
    assert all(weight.equal(expected) for weight, expected in zip(resumed, whole, strict=True))
