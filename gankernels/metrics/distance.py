"""Distances between sets of features."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    ``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`` with the unbiased covariances A and B.

    The last trace is computed as the sum of singular values of ``R_a R_b^T``, where R is the
    triangular factor of the centred features and so ``A = R_a^T R_a``. No product of features is
    formed and no root taken of a rounded matrix, so nearly singular covariances lose no digits.

    Args:
        a, b: ``(N, F)`` and ``(M, F)``, N and M at least 2, of any floating point dtype; computed
            in float64 on the CPU.

    Raises:
        ValueError: other shapes, or features that are not finite.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 2 or len(x) < 2:
            raise ValueError(f"{name} must be (N, F) with N >= 2, got {tuple(x.shape)}")
        if not x.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have as many features, got {a.shape[1]} and {b.shape[1]}")
    a, b = a.double().cpu(), b.double().cpu()
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    trace = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (
        (a.mean(0) - b.mean(0)).square().sum()
        + root_a.square().sum()
        + root_b.square().sum()
        - 2 * trace
    )
    return max(distance.item(), 0.0)  # equal sets may come out at -1e-15


def _covariance_root(x: Tensor) -> Tensor:
    """R with ``R.T @ R`` the unbiased covariance of the rows of ``x``."""
    return torch.linalg.qr(x - x.mean(0), mode="r").R / (len(x) - 1) ** 0.5


def within_class_diversity(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean Euclidean distance between two different members of a class, for each class.

    Args:
        features: floating point ``(N, F)``.
        labels: int64 ``(N,)`` in [0, num_classes).

    Returns:
        float64 ``(num_classes,)`` on the CPU; NaN for a class with fewer than two members.
    """
    if features.dim() != 2 or labels.shape != (len(features),):
        raise ValueError(
            "features must be (N, F) and labels (N,), "
            f"got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    features, labels = features.double().cpu(), labels.cpu()
    result = torch.full((num_classes,), float("nan"), dtype=torch.float64)
    for label in range(num_classes):
        members = features[labels == label]
        count = len(members)
        if count > 1:
            # By rows, so that no matrix of all pairs is stored; without the matrix product of the
            # quick way, which cannot tell a collapsed class from distances of 1e-3.
            total = sum(
                torch.cdist(rows, members, compute_mode="donot_use_mm_for_euclid_dist").sum()
                for rows in members.split(256)
            )
            result[label] = total / (count * (count - 1))
    return result
