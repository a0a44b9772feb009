"""Trains the classifier of a data set once, and keeps it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch

from gankernels import _archive as archive
from gankernels._files import write_atomically
from gankernels._paths import expand
from gankernels.data import ImageData
from gankernels.metrics._classifier import Classifier, train_classifier

_logger = logging.getLogger(__name__)

# Part of the file's name. Change it with the architecture or the training, so that an old
# classifier is never mistaken for one that the present code would train.
_RECIPE = 1


def load_or_train_classifier(
    data: ImageData,
    cache_dir: str | Path,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> tuple[Classifier, float]:
    """As :func:`train_classifier`, but kept in ``cache_dir`` and read from there the next time.

    The file is found by a hash of pixels, labels and class names, so changed data are never
    judged by an old classifier. It is written atomically and read with ``weights_only``. If it
    cannot be read, the classifier is trained again; if it cannot be written, there is a warning.
    """
    key = hashlib.sha256(f"{_RECIPE} {seed} {data.digest()}".encode()).hexdigest()[:16]
    path = expand(cache_dir) / f"classifier-{key}.pt"
    if path.is_file():
        try:
            classifier = _load(path, data)
            return classifier.to(device), classifier.held_out_accuracy.item()
        except Exception as error:  # a torn file can make torch.load raise nearly anything
            _logger.warning("%s cannot be read (%s); training the classifier again", path, error)
    classifier, accuracy = train_classifier(data, seed=seed, device=device, progress=progress)
    try:
        if path.is_file() or not path.exists():  # never replace anything but a file
            _save(classifier, path)
    except OSError as error:
        _logger.warning("the classifier could not be kept: %s", error)
    return classifier, accuracy


def _load(path: Path, data: ImageData) -> Classifier:
    classifier = Classifier(data.channels, data.size, data.num_classes)
    state = archive.load(path)
    archive.conform(state, classifier.state_dict(), "state")
    classifier.load_state_dict(state)
    return classifier.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def _save(classifier: Classifier, path: Path) -> None:
    state = {name: value.cpu() for name, value in classifier.state_dict().items()}
    write_atomically(path, lambda file: torch.save(state, file))
