"""Distances between two sets of images, as pure functions of their features: FID, KID and CMMD.

Symbols: n and m images, D numbers of an image's features, R resamples. All is computed in fp64. A resample is given by
counts: how often each image is in it. The features of an image are not repeated, so that no measure pairs an image
with its own copy.
"""

from collections.abc import Callable

import torch

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # [n, D], [m, D] → [n, m]

BLOCK = 1024  # rows of a kernel matrix that are held at once
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
KID_DEGREE = 3


def compute_fid(
    x: torch.Tensor, y: torch.Tensor, x_counts: torch.Tensor | None = None, y_counts: torch.Tensor | None = None
) -> float:
    """Return the Fréchet distance of two Gaussians with the features' means and covariances (arXiv 1706.08500).

    |mean x - mean y|² + tr(Cx + Cy - 2·sqrt(Cx·Cy)). With Cx = AᵀA and Cy = BᵀB the last trace is the sum of the
    singular values of A·Bᵀ, which is exact for singular covariances too: no small number has to be added to them.

    Args:
        x, y: [n, D] and [m, D] features.
        x_counts, y_counts: [n] and [m]; None for once each.
    """
    x_mean, x_root = _take_moments(x.double(), x_counts)
    y_mean, y_root = _take_moments(y.double(), y_counts)
    overlap = torch.linalg.svdvals(x_root @ y_root.T).sum()
    distance = (x_mean - y_mean).square().sum() + x_root.square().sum() + y_root.square().sum() - 2 * overlap
    return float(distance)


def _take_moments(x: torch.Tensor, counts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean [D] and a root A [min(n, D), D] of the unbiased covariance AᵀA."""
    weights = torch.ones(len(x), dtype=x.dtype, device=x.device) if counts is None else counts.to(x)
    total = weights.sum()
    mean = weights @ x / total
    is_used = weights > 0
    rows = (x[is_used] - mean) * (weights[is_used] / (total - 1)).sqrt()[:, None]
    return mean, torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def compute_kid(
    x: torch.Tensor, y: torch.Tensor, x_counts: torch.Tensor | None = None, y_counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the unbiased squared MMD with the kernel (x·y / D + 1)³, [R] (arXiv 1801.01401).

    Its mean over sets of images is 0 for two sets of one distribution, so single values can be negative.

    Args:
        x, y: [n, D] and [m, D] features.
        x_counts, y_counts: [R, n] and [R, m]; None for once each, R = 1.
    """
    return _compute_mmd(x, y, x_counts, y_counts, _polynomial_kernel, is_unbiased=True)


def compute_cmmd(
    x: torch.Tensor, y: torch.Tensor, x_counts: torch.Tensor | None = None, y_counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Return 1000 times the squared MMD with a Gaussian kernel of sigma 10, [R] (arXiv 2401.09603).

    As in the authors' program, features are scaled to length 1 and pairs of an image with itself count, so the value
    is never negative.

    Args:
        x, y: [n, D] and [m, D] CLIP embeddings.
        x_counts, y_counts: [R, n] and [R, m]; None for once each, R = 1.
    """
    x, y = (torch.nn.functional.normalize(values.double(), dim=1) for values in (x, y))
    return CMMD_SCALE * _compute_mmd(x, y, x_counts, y_counts, _gaussian_kernel, is_unbiased=False)


def _compute_mmd(
    x: torch.Tensor,
    y: torch.Tensor,
    x_counts: torch.Tensor | None,
    y_counts: torch.Tensor | None,
    kernel: Kernel,
    is_unbiased: bool,
) -> torch.Tensor:
    x, y = x.double(), y.double()
    x_weights, y_weights = (
        torch.ones(1, len(values), dtype=values.dtype, device=values.device) if counts is None else counts.to(values)
        for values, counts in ((x, x_counts), (y, y_counts))
    )
    within = [
        _average_kernel(kernel, values, values, weights, weights, without_diagonal=is_unbiased)
        for values, weights in ((x, x_weights), (y, y_weights))
    ]
    return sum(within) - 2 * _average_kernel(kernel, x, y, x_weights, y_weights, without_diagonal=False)


def _average_kernel(
    kernel: Kernel,
    x: torch.Tensor,
    y: torch.Tensor,
    x_weights: torch.Tensor,
    y_weights: torch.Tensor,
    without_diagonal: bool,
) -> torch.Tensor:
    """Return the weighted mean of the kernel over all pairs, [R], or over all pairs of different images of one set."""
    total = torch.zeros(len(x_weights), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), BLOCK):
        rows, weights = x[start : start + BLOCK], x_weights[:, start : start + BLOCK]
        matrix = kernel(rows, y)
        if without_diagonal:
            places = torch.arange(len(rows), device=x.device)
            matrix[places, places + start] = 0
        total += ((weights @ matrix) * y_weights).sum(1)
    pairs = x_weights.sum(1) * y_weights.sum(1)
    if without_diagonal:
        pairs = pairs - x_weights.square().sum(1)
    return total / pairs


def _polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** KID_DEGREE


def _gaussian_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.T)
    return torch.exp(squares / (-2 * CMMD_SIGMA**2))
