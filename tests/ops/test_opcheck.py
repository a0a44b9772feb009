"""torch.library.opcheck of every kernel that the passes of an op call, found by its record."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gankernels.ops.record import KERNEL_PASSES, Draw, records

from .oracle import LAYOUTS

pytestmark = pytest.mark.every_device

OPS = {name: op for name, op in records().items() if op.fused is not None}
WAYS = [(torch.float32, layout) for layout in ("contiguous", "channels_last", "sliced", "expanded")]
WAYS += [(dtype, "contiguous") for dtype in (torch.float64, torch.bfloat16, torch.float16)]


class Recorder(TorchDispatchMode):
    """Records the kernels that are called, with copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gankernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "layout"), WAYS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype, layout, device):
    op = OPS[name]
    for shape in op.samples[:2]:
        draw = Draw(dtype, device)
        x, *parameters = op.inputs(shape, draw)
        passes = op.kernel_passes(shape, draw, [LAYOUTS[layout](x), *parameters])
        with Recorder() as recorder:
            for what in KERNEL_PASSES:
                passes[what]()
        assert len({function for function, _ in recorder.calls}) == len(KERNEL_PASSES)
        for function, arguments in recorder.calls:
            torch.library.opcheck(function, arguments)


def test_every_forward_pass_has_a_reference():
    """The fuzzer compares with these; a kernel without one is compared with itself only."""
    without = {name for name, op in OPS.items() if op.kernel_reference is None}
    assert without == {"batch_norm_leaky_relu", "leaky_relu_batch_norm"}  # fuzz.py has theirs
