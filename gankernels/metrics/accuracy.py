"""Whether samples are of the classes that they were made for."""

from __future__ import annotations

from gankernels.data import Image, Label
from gankernels.metrics._judge import ClassifierMetric, Samples


class Accuracy(ClassifierMetric):
    """The share of samples in which the classifier sees the class that was asked for, in [0, 1]."""

    needs = (Image, Label)
    lower_is_better = False
    labels = ClassifierMetric.labels | {
        "accuracy": ("class-conditional accuracy of the samples", "{:.2%}")
    }

    def score(self, samples: Samples) -> dict[str, float]:
        predicted = self.judge.predict(self.judge.features(samples))
        return {"accuracy": (predicted == samples["labels"]).double().mean().item()}
