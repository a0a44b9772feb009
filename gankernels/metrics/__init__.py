"""Metrics of the quality of samples.

Every module in this directory whose name has no leading underscore is a metric, and its name is
what `--set score=` and `gankernels evaluate --metrics` call it: a new metric is a new file, with no
edit elsewhere. Other packages add metrics by `register` or by an entry point of the group
`gankernels.metrics`. The built-in ones judge labeled images by a classifier trained on real images.
"""

from gankernels.metrics._cache import load_or_train_classifier
from gankernels.metrics._classifier import Classifier, features, train_classifier
from gankernels.metrics._evaluation import Evaluation, Sampler, check, parse, suitable
from gankernels.metrics._judge import ClassifierMetric, Judge
from gankernels.metrics._metric import Cache, Metric, Samples, get, name_of, names, register
from gankernels.metrics.diversity import within_class_diversity
from gankernels.metrics.frechet import frechet_distance

__all__ = [
    "Cache",
    "Classifier",
    "ClassifierMetric",
    "Evaluation",
    "Judge",
    "Metric",
    "Sampler",
    "Samples",
    "check",
    "features",
    "frechet_distance",
    "get",
    "load_or_train_classifier",
    "name_of",
    "names",
    "parse",
    "register",
    "suitable",
    "train_classifier",
    "within_class_diversity",
]
