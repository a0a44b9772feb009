"""A convolution from many channels to one, as a matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from gankernels.nn._rewrite import call_in_trace
from gankernels.nn.cpu._convolve import convolve
from gankernels.nn.cpu._eager import runs_on_cpu
from gankernels.nn.cpu._product import product


class ConvToOneChannel2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` to a single channel, with stride and dilation 1 and zero padding.

    oneDNN computes a block of output channels even if only one is needed. In float32 and float64
    and in the channels_last layout, this layer multiplies the input with every tap of the kernel in
    one matrix product, and adds up the products of each pixel. In half precision every product
    would be rounded before the sum, so PyTorch's convolution is used then, and also for kernels
    with more taps than a quarter of the input channels.

    Args:
        in_channels: the number of input channels.
        kernel_size: height and width of the kernel.
        padding: zeros around the input.
        bias: whether there is a bias.
        device: the device of the parameters.
        dtype: the dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        padding: int | tuple[int, int] | str = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, 1, kernel_size, padding=padding, bias=bias, device=device, dtype=dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if isinstance(input, Proxy):
                return call_in_trace(self, input)
            if runs_on_cpu(input) and self._fits(input):
                return self._by_product(input)
        return self._conv_forward(input, self.weight, self.bias)

    def _fits(self, x: Tensor) -> bool:
        return (
            self.suits(self)
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and x.is_contiguous(memory_format=torch.channels_last)
        )

    @staticmethod
    def suits(conv: nn.Conv2d) -> bool:
        """Whether the layer would compute this convolution as a product."""
        return (
            conv.out_channels == 1
            and 1 < conv.kernel_size[0] * conv.kernel_size[1] <= conv.in_channels // 4
            and conv.stride == conv.dilation == (1, 1)
            and conv.padding_mode == "zeros"
        )

    def _by_product(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        taps = self.weight[0].flatten(1).t()
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        products = product(rows, taps).view(n, height, width, len(taps)).permute(0, 3, 1, 2)
        meeting = torch.eye(len(taps), dtype=products.dtype).view(1, -1, *self.kernel_size)
        return convolve(F.conv2d, products, meeting, self.bias, padding=self.padding)
