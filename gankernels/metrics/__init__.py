"""How good samples are: a classifier trained on the real images, and distances in its features."""

from gankernels.metrics.cache import load_or_train_classifier
from gankernels.metrics.classifier import Classifier, features, train_classifier
from gankernels.metrics.distance import frechet_distance, within_class_diversity
from gankernels.metrics.scores import Scores, evaluate

__all__ = [
    "Classifier",
    "Scores",
    "evaluate",
    "features",
    "frechet_distance",
    "load_or_train_classifier",
    "train_classifier",
    "within_class_diversity",
]
