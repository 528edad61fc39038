"""Power-function averages of the weights, and sums of them that have another length (arXiv 2312.02696, section 3).

After t updates such an average is the integral of p(τ) · weights(τ) over 0 … t, where weights(τ) are those after update
ceil(τ), and p(τ) = (γ + 1) · τ^γ / t^(γ + 1) is its profile. Its length is the profile's standard deviation as a share
of t. Profiles are shares of time: they need no weights, so this module knows numbers alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Profile(NamedTuple):
    """The profile of an average."""

    updates: int  # t, from 1
    length: float

    @property
    def gamma(self) -> float:
        """The exponent γ."""
        return compute_gamma(self.length)


class Fit(NamedTuple):
    """A sum of averages that is close to another average."""

    coefficients: np.ndarray  # [N] float64; their sum is 1
    residual: float  # norm of the profiles' difference, as a share of the wanted profile's

    @property
    def rounding(self) -> float:
        """Factor by which independent rounding errors of the averages grow in the sum."""
        return float(np.linalg.norm(self.coefficients))


def compute_gamma(length: float) -> float:
    """Return γ ≥ 0 of a length up to 1/sqrt(12): the largest root of the paper's equation.

    length² = (γ + 1) / ((γ + 2)² · (γ + 3)) is γ³ + 7γ² + (16 - length⁻²) · γ + 12 - length⁻² = 0.
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def compute_power_decay(updates: int, gamma: float) -> float:
    """Return the decay of an average at its update number `updates` (from 1): (1 - 1/t)^(γ + 1).

    The first is 0: the average is then the weights after that update, and those before it never count. With it, the
    average is the integral above exactly, not only in the limit of small steps.
    """
    return (1 - 1 / updates) ** (gamma + 1)


def multiply_profiles(first: Sequence[Profile], second: Sequence[Profile]) -> np.ndarray:
    """Return the integrals of the products of profiles, [first, second] float64."""
    (t_a, gamma_a), (t_b, gamma_b) = (
        (np.array([float(p.updates) for p in profiles]), np.array([p.gamma for p in profiles]))
        for profiles in (first, second)
    )
    t_a, gamma_a = t_a[:, None], gamma_a[:, None]
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def fit_profile(known: Sequence[Profile], wanted: Profile) -> Fit:
    """Return the sum of averages whose profile is nearest to another one, by least squares.

    The coefficients add up to 1, as in the paper, so that weights that stand still stay exact. That is a condition of
    the least squares here, and not a division afterwards, which leaves a larger residual.

    Args:
        known: profiles that differ.
    """
    products, with_wanted = multiply_profiles(known, known), multiply_profiles(known, [wanted])[:, 0]
    square = float(multiply_profiles([wanted], [wanted])[0, 0])
    # Profiles of norm 1 and a condition of norm 1 keep the equations well scaled.
    norms = np.sqrt(np.diag(products))
    condition = 1 / norms
    scale = np.linalg.norm(condition)
    number = len(known)
    equations = np.zeros((number + 1, number + 1))
    equations[:number, :number] = products / np.outer(norms, norms)
    equations[:number, number] = equations[number, :number] = condition / scale
    solved = np.linalg.solve(equations, np.append(with_wanted / norms, 1 / scale))
    coefficients = solved[:number] / norms
    error = square - 2 * with_wanted @ coefficients + coefficients @ products @ coefficients
    return Fit(coefficients, float(np.sqrt(max(0.0, error) / square)))
