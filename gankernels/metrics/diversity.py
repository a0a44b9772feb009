"""The diversity of samples within a class."""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels.data import Image, Label
from gankernels.metrics._judge import ClassifierMetric, Samples


class Diversity(ClassifierMetric):
    """The mean over classes of the pairwise feature distance within the class, relative to real.

    1 is as diverse as the real images, 0 is one image per class. There is no score unless a class
    has two different images among the real ones and among the samples.
    """

    needs = (Image, Label)
    lower_is_better = False
    labels = ClassifierMetric.labels | {
        "diversity": ("within-class diversity relative to real", "{:.1%}")
    }

    def score(self, samples: Samples) -> dict[str, float]:
        data, fake = self.judge.data, self.judge.features(samples)
        ratios = within_class_diversity(
            fake, samples["labels"], data.num_classes
        ) / within_class_diversity(self.judge.real, data.labels, data.num_classes)
        ratios = ratios[ratios.isfinite()]
        return {"diversity": ratios.mean().item()} if len(ratios) else {}


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
            # By rows, so that no matrix of all pairs is stored. The faster form with a matrix
            # product cannot distinguish a collapsed class from distances of 1e-3.
            total = sum(
                torch.cdist(rows, members, compute_mode="donot_use_mm_for_euclid_dist").sum()
                for rows in members.split(256)
            )
            result[label] = total / (count * (count - 1))
    return result
