"""The accuracy of class-conditional samples."""

from __future__ import annotations

from gankernels.data import Image, Label
from gankernels.metrics._judge import ClassifierMetric, Samples


class Accuracy(ClassifierMetric):
    """The share of samples that the classifier assigns to the class given for them, in [0, 1]."""

    needs = (Image, Label)
    lower_is_better = False
    labels = ClassifierMetric.labels | {
        "accuracy": ("class-conditional accuracy of the samples", "{:.2%}")
    }

    def score(self, samples: Samples) -> dict[str, float]:
        predicted = self.judge.predict(self.judge.features(samples))
        return {"accuracy": (predicted == samples["labels"]).double().mean().item()}
