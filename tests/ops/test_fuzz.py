"""A thousand random calls of all functions; `make fuzz` runs fuzz.py for longer."""

import json
import os
from pathlib import Path

CALLS = int(os.environ.get("GANKERNELS_FUZZ_CALLS", "2400"))


def test_no_call_ends_the_process(python):
    fuzz = Path(__file__).parent / "fuzz.py"
    result = python(fuzz, "--calls", CALLS, "--public", CALLS // 4, check=False)
    report = json.loads(result.stdout)
    for part in report.values():
        assert part["signals"] == []
        assert part["wrong"] == []
        assert part["accepted"] + part["refused"] == part["calls"]
    # All ops are reached, with arguments that they take and with some that they do not.
    ops = report["ops"]["counts"]
    names = {key.split()[0] for key in ops}
    assert len(names) >= 15
    for name in names - {"cpu_capability"}:
        assert ops.get(f"{name} accepted", 0) > 0
        assert ops.get(f"{name} refused", 0) > 0
