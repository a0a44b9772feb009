"""What passes between processes that train together, and its derivatives.

The losses of all processes are one sum, as for torch.nn.SyncBatchNorm: a gradient is that of the
sum, with respect to the tensor of this process. The collectives of a derivative are issued whatever
gradients are asked for, so that all processes issue the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from gankernels.ops.autograd import differentiable


def check_group(process_group: object) -> None:
    """Raises the error for what is no process group. A rank outside of one has a stand-in."""
    if process_group is None:
        return
    if dist.is_available():
        outside = dist.GroupMember.NON_GROUP_MEMBER
        stands_in = isinstance(process_group, type(outside)) and process_group == outside
        if isinstance(process_group, dist.ProcessGroup) or stands_in:
            return
    raise TypeError(
        f"process_group is a {type(process_group).__name__}; accepted are None, for all "
        "processes, and what torch.distributed.new_group returns"
    )


def group_of_several(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group that a layer works with: None where this process is by itself."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    return group if dist.get_world_size(group) > 1 else None


def stack_of_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(processes, *x.shape), x being of one shape in all of them. Has no derivative."""
    result = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(result.unbind(0)), x.contiguous(), group)
    return result


# ---- the sum over processes, in each of them: its derivative is the same sum of gradients


def _sum(x, group):
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def _sum_context(ctx, inputs, outputs) -> None:
    ctx.group = inputs[1]


def _sum_backward(ctx, grad):
    return sum_of_all(grad, ctx.group), None


sum_of_all = differentiable("sum_of_all", _sum, _sum_context, _sum_backward, compilable=False)


# ---- the rows of all processes, and one's own rows among them
#
# What all processes compute alike from rows_of_all() and give to own_rows() is differentiated as if
# one process had the whole batch: gradients in between are complete in each of them. So each of the
# two is the other's derivative, and no gradients need be added up.


def row_counts(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    """How many rows each process has. While a CUDA graph is captured the host cannot wait for an
    answer: then all have the same."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_row_counts)(x, group)
    return _row_counts(x, group)


def _row_counts(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return [x.shape[0]] * dist.get_world_size(group)
    own = torch.tensor([x.shape[0]], device=x.device)
    return stack_of_all(own, group).flatten().tolist()


def _rows_of_all(x, counts, group):
    longest = max(counts)
    if x.shape[0] < longest:
        x = torch.cat((x, x.new_zeros((longest - x.shape[0], *x.shape[1:]))))
    rows = stack_of_all(x, group)
    if min(counts) == longest:
        return rows.flatten(0, 1)
    return torch.cat([part[:n] for part, n in zip(rows, counts, strict=True)])


def _own_rows(x, counts, group):
    rank = dist.get_rank(group)
    return x.narrow(0, sum(counts[:rank]), counts[rank])


def _rows_context(ctx, inputs, outputs) -> None:
    ctx.options = inputs[1:]


rows_of_all = differentiable(
    "rows_of_all",
    _rows_of_all,
    _rows_context,
    lambda ctx, grad: (own_rows(grad, *ctx.options), None, None),
    compilable=False,
)
own_rows = differentiable(
    "own_rows",
    _own_rows,
    _rows_context,
    lambda ctx, grad: (rows_of_all(grad, *ctx.options), None, None),
    compilable=False,
)
