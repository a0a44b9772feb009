"""The kernels' tests again, built with AddressSanitizer and UndefinedBehaviorSanitizer.

The sanitizers must be loaded before Python, so these tests run in a separate process.
"""

import os
import re
import subprocess
import sys

import pytest

from . import build

TESTS = build.HERE.parent


@pytest.fixture(scope="module")
def environment():
    folder = build.build("sanitized", sanitize=True)
    libraries = [
        subprocess.run(
            [*build.COMPILER, f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the latter for the exceptions that are caught
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks
        "GANKERNELS_EMULATION": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def test_kernels_are_clean(environment):
    tests = [build.HERE / f"test_{unit.stem}.py" for unit in sorted(build.CUDA.glob("*.cu"))]
    # -s: or a sanitizer's report is lost with the process.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    command += ["--confcutdir", build.HERE, *tests]  # not the conftest.py of all tests
    result = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-8000:]
    assert "runtime error" not in output
    (passed,) = re.findall(r"(\d+) passed", output)
    assert int(passed) > 500


@pytest.mark.parametrize(
    ("kernel", "threads", "report"),
    [
        ("write_after_end", 64, "AddressSanitizer: use-after-poison"),
        ("read_after_end", 64, "AddressSanitizer: use-after-poison"),
        ("static_shared_after_end", 64, r"runtime error: index 64 out of bounds for type 'float"),
        ("misaligned_load", 1, r"runtime error: .*misaligned address"),
    ],
)
def test_sanitizers_see(environment, kernel, threads, report):
    script = f"""
import numpy as np
from emulation import build
emulated = build.load(build.BUILD / "sanitized")
x, y = np.zeros((2, 64), dtype=np.float32)
emulated.self_test({kernel!r}, {{"in": x}}, {{"out": y}}, threads={threads})
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(report, result.stderr), result.stderr[-4000:]
    assert "self_test.cu" in result.stderr
