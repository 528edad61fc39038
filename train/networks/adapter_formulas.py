"""Formulas of adapters: the change that the tensors of a layer stand for, and a difference as a product of low rank.

Pure functions of tensors by the names that they have in files of kohya's scripts and LyCORIS, without the layer's name:

| kind | tensors | change ΔW of the weight [out, in] or [out, in, kh, kw], times alpha/rank |
|---|---|---|
| LoRA | lora_up.weight [out, r], lora_down.weight [r, in] | up · down |
| LoHa | hada_w1_a, hada_w2_a [out, r], hada_w1_b, hada_w2_b [r, in] | (w1_a · w1_b) ⊙ (w2_a · w2_b) |
| LoKr | lokr_w1 or lokr_w1_a · lokr_w1_b, lokr_w2 or lokr_w2_a · lokr_w2_b | kron(w1, w2) |

With `dora_scale`, a norm for each output row [out, 1], the weight becomes dora_scale · (W + ΔW) / ‖W + ΔW‖. A third
matrix for the kernel of a convolution (lora_mid.weight, hada_t1, hada_t2, lokr_t2: Tucker decomposition) is read too.

Sources: arXiv 2106.09685 (LoRA), 2108.06098 (FedPara, LoHa), 2212.10650 (KronA, LoKr), 2402.09353 (DoRA), 2309.14859
(LyCORIS).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

Parts = Mapping[str, torch.Tensor]
DOWN, MID, UP, ALPHA, DORA_SCALE = "lora_down.weight", "lora_mid.weight", "lora_up.weight", "alpha", "dora_scale"
PART_NAMES = (
    *(DOWN, MID, UP, ALPHA, DORA_SCALE),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)


def merge_adapter(weight: torch.Tensor, parts: Parts, strength: float = 1.0) -> torch.Tensor:
    """Return a layer's weight with an adapter in it, in fp32.

    Args:
        weight: [out, in] or [out, in, kh, kw].
        parts: the adapter's tensors by their names in the file.
        strength: 0 leaves the weight, 1 adds the whole change.
    """
    base = weight.float()
    change = compute_scale(parts) * compute_product(parts).reshape(base.shape)
    if DORA_SCALE not in parts:
        return base + strength * change
    merged = base + change
    norms = parts[DORA_SCALE].float()
    # Early files of LyCORIS have a norm for each input, [1, in].
    kept = 0 if norms.shape[0] == base.shape[0] else 1
    shape = [size if axis == kept else 1 for axis, size in enumerate(base.shape)]
    axes = [axis for axis in range(base.dim()) if axis != kept]
    merged *= norms.reshape(shape) / torch.linalg.vector_norm(merged, dim=axes, keepdim=True)
    return merged if strength == 1 else base + strength * (merged - base)


def compute_product(parts: Parts) -> torch.Tensor:
    """Return the change of a layer without its scale, in fp32: [out, in · kh · kw] or [out, in, kh, kw].

    Raises:
        KeyError: a tensor of the adapter is missing.
        RuntimeError: shapes do not fit each other.
    """
    parts = {name: tensor.float() for name, tensor in parts.items()}
    if DOWN in parts or UP in parts:
        up, down = parts[UP].flatten(1), parts[DOWN].flatten(1)
        return torch.einsum("o r, r s h w, s i -> o i h w", up, parts[MID], down) if MID in parts else up @ down
    if "hada_w1_a" in parts:
        return _multiply(parts, "hada_w1", "hada_t1").mul_(_multiply(parts, "hada_w2", "hada_t2"))
    first = parts["lokr_w1"] if "lokr_w1" in parts else _multiply(parts, "lokr_w1")
    second = parts["lokr_w2"] if "lokr_w2" in parts else _multiply(parts, "lokr_w2", "lokr_t2")
    first = first.reshape(*first.shape, *(1,) * (second.dim() - first.dim()))
    return torch.kron(first, second.contiguous())  # it makes views of its arguments


def compute_scale(parts: Parts) -> float:
    """Return the factor of a layer's change: alpha/rank, or 1 without an alpha or without a rank."""
    low_rank = next((parts[name] for name in (DOWN, "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if name in parts), None)
    if low_rank is None or ALPHA not in parts:
        return 1.0
    return float(parts[ALPHA]) / low_rank.shape[0]


def _multiply(parts: Parts, name: str, tucker: str = "") -> torch.Tensor:
    """Return the product of a pair of matrices, or with a third one [r, r, kh, kw] of those three."""
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    if tucker not in parts:
        return left @ right
    return torch.einsum("r s h w, r o, s i -> o i h w", parts[tucker], left, right)


class LowRank(NamedTuple):
    """A product of low rank, and the part of the whole that it holds."""

    up: torch.Tensor  # [out, r], or [out, r, 1, 1] of a convolution
    down: torch.Tensor  # [r, in], or [r, in, kh, kw]
    squared_norm: float  # of up · down


def approximate(difference: torch.Tensor, rank: int) -> LowRank:
    """Return the product of this rank that is closest to a difference of weights, in fp32.

    It is that of the largest singular values. The singular vectors of the smaller side are the eigenvectors of the
    difference times its transpose, in fp64. The other side is a projection on them, so that small singular values cost
    no precision.

    Args:
        difference: [out, in] or [out, in, kh, kw].
        rank: at most; the smaller side of the matrix limits it.
    """
    matrix = difference.flatten(1).double()
    is_wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    values, vectors = values[-rank:].flip(0).clamp_min(0), vectors[:, -rank:].flip(1)
    # Both sides get the square root of the singular values, so that neither leaves the range of fp16.
    roots = values.pow(0.25)
    safe_roots = torch.where(roots > 0, roots, torch.ones_like(roots))
    if is_wide:
        up, down = vectors * roots, (vectors.T @ matrix) / safe_roots[:, None]
    else:
        up, down = (matrix @ vectors) / safe_roots, roots[:, None] * vectors.T
    kernel = difference.shape[2:]
    return LowRank(
        up=up.float().reshape(*up.shape, *(1,) * len(kernel)),
        down=down.float().reshape(-1, *difference.shape[1:]),
        squared_norm=float(values.sum()),
    )
