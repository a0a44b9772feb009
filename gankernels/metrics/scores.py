"""Score a generator against real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gankernels.data import ImageData, to_uint8
from gankernels.metrics.classifier import Classifier, features
from gankernels.metrics.distance import frechet_distance, within_class_diversity

#: ``sample_fn(labels, n, generator)``: ``n`` images in [-1, 1], ``(n, C, S, S)``, of the given
#: labels ``(n,)`` or, where they are None, of whatever the game draws; all randomness from the
#: generator, which is on the CPU.
SampleFn = Callable[[Tensor | None, int, torch.Generator], Tensor]

MAX_SAMPLES = 10_000
_BATCH_SIZE = 256


@dataclass(frozen=True)
class Scores:
    """What :func:`evaluate` found.

    Attributes:
        accuracy: share of samples that the classifier takes for what they were asked to be, in
            [0, 1]; None for an unconditional game.
        frechet: Fréchet distance to the real images in the classifier's features, in squared
            units of these features: comparable only under the same classifier.
        diversity_ratio: mean over classes of the pairwise feature distance within the class,
            samples over real; 1 is as diverse as real, 0 is one image per class. None for an
            unconditional game.
        n: number of samples.
        classifier_accuracy: the classifier's own, on held-out real images, in [0, 1].
    """

    accuracy: float | None
    frechet: float
    diversity_ratio: float | None
    n: int
    classifier_accuracy: float


def evaluate(
    sample_fn: SampleFn,
    data: ImageData,
    classifier: Classifier,
    *,
    n: int | None = None,
    conditional: bool,
    seed: int = 0,
    real_features: Tensor | None = None,
) -> Scores:
    """Score samples against all of ``data``, in features of ``classifier``.

    Samples are rounded to uint8 as if saved, and those of a conditional game are asked for in the
    class proportions of ``data``.

    Args:
        sample_fn: see :data:`SampleFn`; called for up to 256 images at a time.
        n: number of samples, at least 2; as many as there are real ones, at most 10,000, if None.
        conditional: whether ``sample_fn`` takes labels.
        seed: of the generator that ``sample_fn`` and the order of labels draw from.
        real_features: ``features(classifier, data.images)`` where it is at hand already.

    Raises:
        ValueError: ``n`` is too small, or samples have the wrong shape or are not finite.
    """
    n = min(len(data), MAX_SAMPLES) if n is None else n
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    rng = torch.Generator().manual_seed(seed)
    labels = _proportional_labels(data, n, rng) if conditional else None
    fake = torch.cat(
        [
            features(
                classifier,
                _sample(sample_fn, labels, slice(start, min(start + _BATCH_SIZE, n)), rng),
            )
            for start in range(0, n, _BATCH_SIZE)
        ]
    )
    real = features(classifier, data.images) if real_features is None else real_features

    accuracy = diversity_ratio = None
    if labels is not None:
        predicted = classifier.head(fake.to(classifier.head.weight.device)).argmax(1).cpu()
        accuracy = (predicted == labels).double().mean().item()
        ratios = within_class_diversity(fake, labels, data.num_classes) / within_class_diversity(
            real, data.labels, data.num_classes
        )
        # No ratio for a class with fewer than two images on a side, or of identical real ones.
        ratios = ratios[ratios.isfinite()]
        diversity_ratio = ratios.mean().item() if len(ratios) else None
    return Scores(
        accuracy=accuracy,
        frechet=frechet_distance(fake, real),
        diversity_ratio=diversity_ratio,
        n=n,
        classifier_accuracy=classifier.held_out_accuracy.item(),
    )


def _proportional_labels(data: ImageData, n: int, rng: torch.Generator) -> Tensor:
    """``n`` labels as frequent as in ``data``, exactly so where n is a multiple of its length."""
    evenly_spaced = torch.arange(n) * len(data) // n
    labels = data.labels.cpu().sort().values[evenly_spaced]
    return labels[torch.randperm(n, generator=rng)]


def _sample(
    sample_fn: SampleFn, labels: Tensor | None, part: slice, rng: torch.Generator
) -> Tensor:
    count = part.stop - part.start
    images = sample_fn(None if labels is None else labels[part], count, rng)
    if len(images) != count:
        raise ValueError(f"sample_fn returned {len(images)} images where {count} were asked for")
    if not images.isfinite().all():
        raise ValueError("samples hold values that are not finite: the generator has diverged")
    return to_uint8(images)
