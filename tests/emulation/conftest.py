import os

import pytest

from . import build


@pytest.fixture(scope="session")
def emulated():
    """The kernels' bindings; `sanitized` where a test has started pytest again to run under it."""
    variant = os.environ.get("GANKERNELS_EMULATION", "plain")
    return build.load(build.build(variant, sanitize=variant == "sanitized"))
