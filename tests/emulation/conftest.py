import os
from pathlib import Path

import pytest

from . import build


@pytest.fixture(scope="session")
def emulated():
    """The kernels' bindings; another build of them where test_sanitizers has started pytest."""
    folder = os.environ.get("GANKERNELS_EMULATION")
    return build.load(Path(folder) if folder else build.build("plain"))
