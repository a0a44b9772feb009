"""The classifier of the real images, which several metrics judge by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from gankernels.data import Data, Field, Image, ImageData
from gankernels.metrics._cache import load_or_train_classifier
from gankernels.metrics._classifier import features
from gankernels.metrics._metric import Cache, Metric, Samples, name_of

__all__ = ["ClassifierMetric", "Judge", "Samples"]


class Judge:
    """A classifier trained on labeled images.

    Attributes:
        data: the real images.
        real: their features, `(N, F)`.
        accuracy: the share of held-out real images that it recognizes, in [0, 1].
    """

    def __init__(self, data: ImageData, cache: Cache) -> None:
        self.data = data
        self.classifier, self.accuracy = load_or_train_classifier(
            data, cache.folder, device=cache.device, progress=cache.progress
        )
        self.real = features(self.classifier, data.images)
        self._last: tuple[Tensor, Tensor] | None = None

    def features(self, samples: Samples) -> Tensor:
        """The features of the samples, `(n, F)`, computed once for all metrics."""
        images = samples["images"]
        if self._last is None or self._last[0] is not images:
            self._last = images, features(self.classifier, images)
        return self._last[1]

    def predict(self, found: Tensor) -> Tensor:
        """The classes that the classifier predicts from features."""
        head = self.classifier.head
        return head(found.to(head.weight.device)).argmax(1).cpu()


class ClassifierMetric(Metric):
    """A metric that judges by a classifier trained on the real images, its attribute `judge`."""

    needs: ClassVar[tuple[type[Field], ...]] = (Image,)
    labels: ClassVar[dict[str, tuple[str, str]]] = {
        "classifier_accuracy": ("classifier's accuracy on held-out real images", "{:.2%}")
    }

    @classmethod
    def check(cls, data: Data, column: str, given: Sequence[str]) -> None:
        super().check(data, column, given)
        if not isinstance(data, ImageData):
            raise ValueError(
                f"data for the metric {name_of(cls)!r} must be labeled images in memory, got {data}"
            )
        if len(data) < 2:
            raise ValueError(
                f"data for the metric {name_of(cls)!r} must have at least 2 images, got {len(data)}"
            )

    @property
    def facts(self) -> dict[str, float]:
        return {"classifier_accuracy": self.judge.accuracy}

    def prepare(self, data: Data, cache: Cache) -> None:
        assert isinstance(data, ImageData)  # checked
        self.judge: Judge = cache.once("classifier", lambda: Judge(data, cache))
