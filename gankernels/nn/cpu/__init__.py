"""Layers that compute what torch.nn's do, faster on a CPU.

Each is a subclass of PyTorch's layer with the same state_dict. Results differ by rounding, for
:class:`BitDropout` by random numbers. On other devices, and under ``torch.func``,
``torch.compile``, ``torch.export`` and TorchScript, they run PyTorch's own operations.
:func:`gankernels.fuse` with ``cpu=True`` puts them into an existing network.
"""

from gankernels.nn.cpu.conv_to_one import ConvToOneChannel2d
from gankernels.nn.cpu.dropout import BitDropout
from gankernels.nn.cpu.linear import OneDNNLinear
from gankernels.nn.cpu.upsample_conv import UpsampleConv2d

__all__ = ["BitDropout", "ConvToOneChannel2d", "OneDNNLinear", "UpsampleConv2d"]
