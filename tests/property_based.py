"""Hypothesis; if it is not installed, replacements with which its tests are skipped."""

from unittest.mock import MagicMock

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    HealthCheck = st = MagicMock()

    def given(*_, **__):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*_, **__):
        return lambda test: test


__all__ = ["HealthCheck", "given", "settings", "st"]
