"""Fréchet distance to the real images (Heusel et al. 2017, arXiv:1706.08500)."""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels.metrics._judge import ClassifierMetric, Samples


class Frechet(ClassifierMetric):
    """The Fréchet distance to the real images in the features of the classifier.

    In squared units of these features: comparable only under the same classifier.
    """

    relative = True
    labels = ClassifierMetric.labels | {
        "frechet": ("Fréchet distance (classifier features)", "{:.3f}"),
        "untrained_frechet": ("Fréchet distance of an untrained generator", "{:.3f}"),
        "frechet_ratio": ("ratio of the two", "{:.4f}"),
    }

    def score(self, samples: Samples) -> dict[str, float]:
        return {"frechet": frechet_distance(self.judge.features(samples), self.judge.real)}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    ``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`` with the unbiased covariances A and B.

    The last trace is computed as the sum of singular values of ``R_a R_b^T``, where R is the
    triangular factor of the centered features, so that ``A = R_a^T R_a``. No product of features is
    formed and no root of a rounded matrix is taken, so nearly singular covariances lose no digits.

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
