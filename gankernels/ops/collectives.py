"""Differentiable collectives.

The losses of all processes are one sum, as for torch.nn.SyncBatchNorm: a gradient is that of the
sum, with respect to the tensor of this process. A derivative runs its collectives whatever
gradients are asked for, so that all processes run the same ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from gankernels.ops.autograd import Result, differentiable


def check_group(process_group: object) -> None:
    """Raises TypeError unless this is a process group, None, or the placeholder that a rank outside
    of a new group gets."""
    if process_group is None:
        return
    if dist.is_available():
        outside = dist.GroupMember.NON_GROUP_MEMBER
        placeholder = isinstance(process_group, type(outside)) and process_group == outside
        if isinstance(process_group, dist.ProcessGroup) or placeholder:
            return
    raise TypeError(
        "process_group must be a result of torch.distributed.new_group, or None for all processes, "
        f"got {type(process_group).__name__}"
    )


def group_of_several(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group of a layer: None if this process is the only one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    return group if dist.get_world_size(group) > 1 else None


def stack_of_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(processes, *x.shape), for an x with the same shape in all of them. Not differentiable."""
    result = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(result.unbind(0)), x.contiguous(), group)
    return result


# ---- the sum over processes, in each of them. Its derivative is the same sum, of gradients.


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def _sum_context(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    ctx.group = inputs[1]


def _sum_backward(ctx: Any, grad: Tensor) -> Result:
    return sum_of_all(grad, ctx.group), None


sum_of_all = differentiable("sum_of_all", _sum, _sum_context, _sum_backward, compilable=False)


# ---- the rows of all processes, and the rows of this one among them
#
# What every process computes from rows_of_all() and passes to own_rows() is differentiated as if
# one process had the whole batch: gradients in between are complete in each of them. Therefore each
# of the two functions is the derivative of the other, and no gradients are added up.


def row_counts(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    """The number of rows of each process. While a CUDA graph is captured, the host cannot wait for
    the answer: all processes must then have equally many."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_row_counts)(x, group)
    return _row_counts(x, group)


def _row_counts(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return [x.shape[0]] * dist.get_world_size(group)
    own = torch.tensor([x.shape[0]], device=x.device)
    return stack_of_all(own, group).flatten().tolist()


def _rows_of_all(x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    longest = max(counts)
    if x.shape[0] < longest:
        x = torch.cat((x, x.new_zeros((longest - x.shape[0], *x.shape[1:]))))
    rows = stack_of_all(x, group)
    if min(counts) == longest:
        return rows.flatten(0, 1)
    return torch.cat([part[:n] for part, n in zip(rows, counts, strict=True)])


def _own_rows(x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    rank = dist.get_rank(group)
    return x.narrow(0, sum(counts[:rank]), counts[rank])


def _rows_context(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    ctx.options = inputs[1:]


def _rows_backward(ctx: Any, grad: Tensor) -> Result:
    return own_rows(grad, *ctx.options), None, None


def _own_rows_backward(ctx: Any, grad: Tensor) -> Result:
    return rows_of_all(grad, *ctx.options), None, None


rows_of_all = differentiable(
    "rows_of_all", _rows_of_all, _rows_context, _rows_backward, compilable=False
)
own_rows = differentiable(
    "own_rows", _own_rows, _rows_context, _own_rows_backward, compilable=False
)
