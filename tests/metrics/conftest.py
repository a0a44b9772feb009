"""The real digits and a classifier of them, trained once for all tests."""

import pytest

from gankernels.data import load
from gankernels.metrics import train_classifier


@pytest.fixture(scope="session")
def digits():
    return load("digits", size=28)


@pytest.fixture(scope="session")
def trained(digits):
    """(classifier, held-out accuracy)."""
    return train_classifier(digits)
