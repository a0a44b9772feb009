"""Gradient penalties: where to take the critic's gradient, and what to do with its norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gankernels._shard import per_sample
from gankernels.functional import _check_floating, gradient_norm_penalty, interpolate
from gankernels.ops.gradient_norm_penalty import KINDS

_METHODS = ("exact", "finite-difference")

# Critics whose penalty has been differentiated once without an error.
_proven: WeakSet[nn.Module] = WeakSet()


def gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor | None = None,
    *,
    kind: str = "wgan-gp",
    center: float = 1.0,
    method: str = "exact",
    critic_args: Sequence[object] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The penalty on the norm of a critic's gradient with respect to its input.

    ===========  ==============================================  ================================
    kind         gradient g taken at                             penalty, averaged over the batch
    ===========  ==============================================  ================================
    ``wgan-gp``  :math:`\alpha x + (1 - \alpha) \tilde x`        :math:`(|g| - c)^2`
    ``wgan-lp``  the same                                        :math:`\max(0, |g| - c)^2`
    ``dragan``   :math:`x + \tfrac12 \mathrm{std}(x)\, U(0, 1)`  :math:`(|g| - c)^2`
    ``r1``       :math:`x`                                       :math:`|g|^2`
    ``r2``       :math:`\tilde x`                                :math:`|g|^2`
    ===========  ==============================================  ================================

    with real samples :math:`x`, generated ones :math:`\tilde x`, :math:`\alpha \sim U(0, 1)` drawn
    once per sample, and the norm over all dimensions of a sample. Multiply the result by the usual
    weight (10 for ``wgan-gp``; :math:`\gamma / 2` for ``r1``), add it to the critic's loss and call
    ``backward()``.

    Args:
        critic: a module or function from ``(N, ...)`` to ``(N,)``, ``(N, 1)`` or a map of patches
            ``(N, 1, h, w)``; what it returns is summed, so the samples' gradients must not mix
            unless that is meant (batch normalisation mixes them).
        real: ``(N, ...)``, floating-point. Not differentiated through.
        fake: of the same shape; only ``dragan`` and ``r1`` do without. Not differentiated through.
        kind: one of the above.
        center: the norm c that is asked for.
        method: ``"exact"`` differentiates the gradient, which needs every layer of the critic to be
            twice differentiable and costs a second-order graph. ``"finite-difference"`` gets the
            same parameter gradient from two more evaluations of the critic, at
            :math:`x \pm h v` along the direction v in which the penalty grows: no second-order
            graph, so compiled critics and layers without a second derivative work. The value is
            exact; h moves the furthest sample by the cube root of the dtype's rounding error,
            relative to the samples' norm. The gradient's error, as measured on critics with smooth
            activations, is 5e-5 relative in float32 and 1e-10 in float64. A piecewise linear critic
            (LeakyReLU) has kinks that the exact second derivative passes over in silence; where the
            step crosses some, as in float32 it does, the two gradients of one batch differ by as
            much as their own size, while in float64 they agree. Buffers such as running statistics
            see three evaluations instead of one; random layers draw the same numbers in all three.
            In neither method is there a gradient with respect to ``real`` and ``fake``.
        critic_args: further positional arguments of the critic, such as labels.
        generator: of the random numbers, on the device of ``real``; by default the device's own.

    Returns:
        A scalar in float32 (float64 for float64): the mean over the batch, without weight or
        factor 1/2.

    Raises:
        TypeError: where ``real`` or ``fake`` is no floating-point tensor.
        ValueError: where they differ in shape, or ``kind`` or ``method`` is none of the above.
        RuntimeError: where the critic does not depend on its input, or, with ``"exact"``, has a
            layer that cannot be differentiated twice; the message names the layer. (A module's
            first penalty is differentiated on the spot to find out.)

    Under autocast the critic runs as autocast says and the norm is taken in float32. Finite
    differences leave autocast for their two evaluations, and are of no use with a critic that is of
    half precision itself: the differences drown in its rounding. Frozen parameters stay without
    gradients. Under torch.no_grad() and torch.inference_mode() there is the value alone, without a
    second-order graph. A gradient of zero contributes a derivative of zero.

    References: Gulrajani et al., 2017, arXiv:1704.00028 (wgan-gp); Petzka et al., 2018,
    arXiv:1709.08894 (wgan-lp); Kodali et al., 2017, arXiv:1705.07215 (dragan); Mescheder et al.,
    2018, arXiv:1801.04406 (r1, r2).
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; accepted are {', '.join(map(repr, KINDS))}")
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; accepted are {', '.join(map(repr, _METHODS))}")
    wanted = torch.is_grad_enabled()  # or the value alone?
    with _recording():
        with torch.no_grad():
            x = _ordinary(_points(real, fake, kind, generator))
        x = x.detach().requires_grad_()
        critic_args = tree_map(_ordinary, tuple(critic_args))
        if wanted and method == "finite-difference":
            return _finite_difference(critic, x, kind, center, critic_args)
        unproven = wanted and isinstance(critic, nn.Module) and critic not in _proven
        gradient = _gradient(critic, x, critic_args, create_graph=wanted, thorough=unproven)
        penalty = gradient_norm_penalty(gradient, kind, center)
        if unproven:
            _prove(critic, penalty, x, critic_args)
    return penalty


def _recording() -> AbstractContextManager:
    """Lets autograd record, also where torch.inference_mode() has forbidden it."""
    forbidden = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if forbidden else torch.enable_grad()


def _ordinary(value: object) -> object:
    """A copy of a tensor that was made in inference mode, which autograd cannot save."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _points(
    real: Tensor, fake: Tensor | None, kind: str, generator: torch.Generator | None
) -> Tensor:
    """Where the gradient is taken."""
    _check_floating("real", real)
    if real.dim() == 0:
        raise ValueError("real is a scalar; a batch (N, ...) is needed")
    if kind == "r1":
        return real
    where = {"dtype": real.dtype, "device": real.device, "generator": generator}
    if kind == "dragan":
        noise = per_sample(lambda n: torch.rand(n, *real.shape[1:], **where), len(real))
        return real + 0.5 * real.std() * noise
    if fake is None:
        raise ValueError(f"fake is None, but kind {kind!r} needs generated samples")
    _check_floating("fake", fake)
    if fake.shape != real.shape:
        raise ValueError(
            f"fake has shape {tuple(fake.shape)}, but real has {tuple(real.shape)}: "
            "they must be the same"
        )
    fake = fake.to(real.dtype)  # under autocast a generator's output may be of half precision
    if kind == "r2":
        return fake
    alpha = per_sample(lambda n: torch.rand(n, **where), len(real))
    return interpolate(real, fake, alpha)


def _gradient(
    critic: Callable[..., Tensor],
    x: Tensor,
    critic_args: Sequence[object],
    *,
    create_graph: bool = False,
    thorough: bool = False,
) -> Tensor:
    """The critic's gradient. A ``thorough`` one records every layer's part in it, even those that
    keep it to themselves where no gradient of their output is asked for (once_differentiable)."""
    out = critic(x, *critic_args)
    if not isinstance(out, Tensor):
        raise TypeError(f"critic returned a {type(out).__name__}; a Tensor is needed")
    gradient = None
    if out.requires_grad:
        # That of the sum, without the sum.
        ones = torch.ones_like(out, requires_grad=thorough)
        (gradient,) = torch.autograd.grad(
            out, x, ones, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise RuntimeError(
            "critic's output does not depend on its input: there is no gradient to penalise "
            "(was it detached, or computed under torch.no_grad()?)"
        )
    return gradient


# ---- finite differences ------------------------------------------------------------------------


def _finite_difference(
    critic: Callable[..., Tensor],
    x: Tensor,
    kind: str,
    center: float,
    critic_args: Sequence[object],
) -> Tensor:
    """The penalty, with a parameter gradient from differences.

    With g the gradient of the critic's sum F(x; theta) and v = dP/dg, taken as constant, the
    penalty's gradient is dP/dtheta = d/dtheta <v, grad_x F> = d/dtheta lim (F(x + hv) - F(x - hv))
    / 2h: a first derivative of two evaluations.
    """
    with _repeatable_randomness(x.device) as again:
        gradient = _gradient(critic, x, critic_args).requires_grad_()
        penalty = gradient_norm_penalty(gradient, kind, center)
        (direction,) = torch.autograd.grad(penalty, gradient)
        with torch.no_grad():
            # A unit of h moves the furthest sample by the batch's typical norm.
            wide = torch.promote_types(x.dtype, torch.float32)
            reach = _norms(direction.to(wide)).max()
            size = _norms(x.to(wide)).mean().clamp(min=1.0)
            h = torch.finfo(x.dtype).eps ** (1 / 3) * size / reach.clamp(min=1e-30)
            step = direction.to(wide) * h
            ahead, behind = (x + step).to(x.dtype), (x - step).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            again()
            forward = critic(ahead, *critic_args).to(wide).sum()
            again()
            backward = critic(behind, *critic_args).to(wide).sum()
    surrogate = torch.where(reach > 0, (forward - backward) / (2 * h), 0.0)
    return penalty.detach() + (surrogate - surrogate.detach())


def _norms(x: Tensor) -> Tensor:
    """Of every sample."""
    return x.flatten(1).norm(dim=1) if x.dim() > 1 else x.abs()


@contextmanager
def _repeatable_randomness(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yields a function that puts the random number generators back to where they were here."""
    cpu = torch.get_rng_state()
    on_cuda = device.type == "cuda"
    cuda = torch.cuda.get_rng_state(device) if on_cuda else None

    def again() -> None:
        torch.set_rng_state(cpu)
        if on_cuda:
            torch.cuda.set_rng_state(cuda, device)

    yield again


# ---- which layer is to blame -------------------------------------------------------------------


def _prove(critic: nn.Module, penalty: Tensor, x: Tensor, critic_args: Sequence[object]) -> None:
    """Differentiates a critic's first penalty, to name the layer if that cannot be done."""
    try:
        _differentiate(penalty)
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"the critic cannot be differentiated twice: {_blame(critic, x, critic_args)}. "
            'Replace the layer, or use method="finite-difference". '
            f"PyTorch says: {error}"
        ) from error
    _proven.add(critic)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _differentiate(result: Tensor) -> None:
    """Goes back through all of the graph, keeps it, and leaves every ``.grad`` as it is.

    once_differentiable puts its error in front of a leaf of its own, so that a derivative with
    respect to parameters alone would pass by it and be silently wrong.
    """
    leaves, seen, pending = [], {None}, [result.grad_fn]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch._C._functions.AccumulateGrad):
            leaves.append(node.variable)
        pending += [following for following, _ in node.next_functions]
    torch.autograd.grad(result, leaves, retain_graph=True, allow_unused=True)


def _blame(critic: nn.Module, x: Tensor, critic_args: Sequence[object]) -> str:
    """Describes the first layer that has no second derivative."""
    for name, module in critic.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl:
            return (
                f"{f'layer {name!r}' if name else 'it'} is a module compiled by torch.compile "
                "(compile the whole step, with torch.func.grad in it, instead)"
            )
    culprits: list[str] = []

    def try_alone(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            if not culprits and not _twice_differentiable(module, args, kwargs):
                culprits.append(f"layer {name!r}, {module}")

        return hook

    handles = []
    try:
        for name, module in critic.named_modules():
            if module._modules.keys() <= {"parametrizations"}:
                # As nn.Module does it: a fused layer would take the hook for someone else's.
                register = nn.Module.register_forward_hook
                handles.append(register(module, try_alone(name), with_kwargs=True))
        critic(x, *critic_args)
    except Exception:  # the search is a help: what failed is the penalty, and that is told anyway
        if not culprits:
            return "which of its layers is to blame could not be found out"
    finally:
        for handle in handles:
            handle.remove()
    return culprits[0] if culprits else "something outside its layers, in a forward method"


def _twice_differentiable(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Runs the layer's forward once more by itself, without its hooks, and differentiates it twice.
    Its buffers, attributes and gradients stay as they are."""
    leaves: list[Tensor] = []

    def own(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a layer that works in place may not do so on a leaf

    args, kwargs = tree_map(own, (args, kwargs))
    kept = dict(vars(module))
    module._buffers = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    try:
        output = module.forward(*args, **kwargs)
    finally:
        vars(module).clear()
        vars(module).update(kept)
    outputs = [o for o in tree_leaves(output) if isinstance(o, Tensor) and o.requires_grad]
    if not leaves or not outputs:
        return True
    ones = [torch.ones_like(o, requires_grad=True) for o in outputs]
    try:
        first = torch.autograd.grad(outputs, leaves, ones, create_graph=True, allow_unused=True)
        first = [f.square().sum() for f in first if f is not None and f.requires_grad]
        if first:
            _differentiate(torch.stack(first).sum())
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise
        return False
    return True
