"""The processes that `torchrun` starts to train one game together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gankernels.nn import MinibatchDiscrimination
from gankernels.nn.batch_norm_leaky_relu import _BatchNormActivation


class Ranks:
    """This process among those that train together; the only one unless torchrun started more.

    Every method that communicates must be called by all processes, and does nothing if there is
    only one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        several = dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several and device.type == "cuda":
            # NCCL gathers objects through the current device, which must differ between processes.
            torch.cuda.set_device(device)
        if several and not dist.is_initialized():
            if device.type == "cuda":
                dist.init_process_group("nccl", device_id=device)
            else:
                dist.init_process_group("gloo")
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and output."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Samples per process. Raises ValueError where a batch cannot be divided evenly."""
        if batch_size % self.size:
            raise ValueError(
                f"batch_size must be a multiple of the {self.size} processes, got {batch_size}"
            )
        return batch_size // self.size

    def own(self, rows: Tensor) -> Tensor:
        """This process's rows of a tensor with a row for every sample of the whole batch."""
        return rows if self.size == 1 else rows.chunk(self.size)[self.rank]

    def broadcast(self, module: nn.Module) -> None:
        """Send the first process's weights and buffers to all."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their means over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        if self.size == 1:
            return flag
        total = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(total)
        return bool(total.item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def synchronize(network: nn.Module) -> None:
    """Make layers with batch statistics use the batch of all processes."""
    for name, module in network.named_modules():
        if isinstance(module, (_BatchNormActivation, MinibatchDiscrimination)):
            module.sync = True
        elif isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            warnings.warn(
                f"{name} ({type(module).__name__}) normalizes with the statistics of each process; "
                "gankernels.fuse(network, lone=True) makes it a layer that can synchronize them",
                stacklevel=3,
            )
