"""Gradient penalties: where to take the critic's gradient, and how to penalize its norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from gankernels._shard import per_sample
from gankernels.functional.gradient_norm_penalty import gradient_norm_penalty, interpolate
from gankernels.ops.checks import check_choice, check_floating, check_same_shape
from gankernels.ops.gradient_norm_penalty import KINDS

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
AccumulateGrad = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
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
            unless that is intended (batch normalization mixes them).
        real: ``(N, ...)``, floating-point. Not differentiated through.
        fake: of the same shape; not needed for ``dragan`` and ``r1``. Not differentiated through.
        kind: one of the above.
        center: the target norm c.
        method: ``"exact"`` differentiates the gradient, which needs every layer of the critic to be
            twice differentiable and costs a second-order graph. ``"finite-difference"`` gets the
            same parameter gradient from two more evaluations of the critic, at
            :math:`x \pm h v` along the direction v in which the penalty grows: no second-order
            graph, so compiled critics and layers without a second derivative work. The value is
            exact; h moves the furthest sample by the cube root of the dtype's rounding error,
            relative to the samples' norm. The gradient's error, as measured on critics with smooth
            activations, is 5e-5 relative in float32 and 1e-10 in float64. A piecewise linear critic
            (LeakyReLU) has kinks that the exact second derivative ignores. If the step crosses
            kinks, as it does in float32, the two gradients of one batch differ by as much as their
            own size; in float64 they agree. Buffers such as running statistics see three
            evaluations instead of one; random layers draw the same numbers in all three. Neither
            method has a gradient with respect to ``real`` and ``fake``.
        critic_args: further positional arguments of the critic, such as labels.
        generator: the source of random numbers, on the device of ``real``; by default the device's
            default generator.

    Returns:
        A scalar in float32 (float64 for float64): the mean over the batch, without weight or
        factor 1/2.

    Raises:
        TypeError: if ``real`` or ``fake`` is not a floating-point tensor.
        ValueError: if they differ in shape, or ``kind`` or ``method`` is not one of the above.
        RuntimeError: if the critic does not depend on its input, or, with ``"exact"``, has a layer
            that cannot be differentiated twice; the message names the layer. (A module's first
            penalty is differentiated at once to find out.)

    Under autocast the critic runs in autocast's dtype and the norm is computed in float32. Finite
    differences disable autocast for their two evaluations. They do not work for a critic with
    half-precision weights, whose rounding errors exceed the differences. Frozen parameters get no
    gradients. Under torch.no_grad() and torch.inference_mode() only the value is computed, without
    a second-order graph. A gradient of zero contributes a derivative of zero.

    References: Gulrajani et al., 2017, arXiv:1704.00028 (wgan-gp); Petzka et al., 2018,
    arXiv:1709.08894 (wgan-lp); Kodali et al., 2017, arXiv:1705.07215 (dragan); Mescheder et al.,
    2018, arXiv:1801.04406 (r1, r2).
    """
    check_choice("kind", kind, KINDS)
    check_choice("method", method, _METHODS)
    wanted = torch.is_grad_enabled()  # otherwise only the value is computed
    with _recording():
        with torch.no_grad():
            x = _recordable(_points(real, fake, kind, generator))
        x = x.detach().requires_grad_()
        critic_args = tree_map_only(Tensor, _recordable, tuple(critic_args))
        if wanted and method == "finite-difference":
            return _finite_difference(critic, x, kind, center, critic_args)
        unproven = critic if isinstance(critic, nn.Module) and critic not in _proven else None
        thorough = wanted and unproven is not None
        gradient = _gradient(critic, x, critic_args, create_graph=wanted, thorough=thorough)
        penalty = gradient_norm_penalty(gradient, kind, center)
        if wanted and unproven is not None:
            _prove(unproven, penalty, x, critic_args)
    return penalty


def _recording() -> AbstractContextManager[object]:
    """Lets autograd record, even under torch.inference_mode()."""
    forbidden = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if forbidden else torch.enable_grad()


def _recordable(x: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: autograd cannot save it then."""
    return x.clone() if x.is_inference() else x


def _points(
    real: Tensor, fake: Tensor | None, kind: str, generator: torch.Generator | None
) -> Tensor:
    """The points at which the gradient is taken."""
    check_floating("real", real)
    if real.dim() == 0:
        raise ValueError("real must have shape (N, ...), got a scalar")
    if kind == "r1":
        return real

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=real.dtype, device=real.device, generator=generator)

    if kind == "dragan":
        noise = per_sample(lambda n: uniform(n, *real.shape[1:]), len(real))
        return real + 0.5 * real.std() * noise
    if fake is None:
        raise ValueError(f"fake must be a Tensor for kind {kind!r}, got None")
    check_floating("fake", fake)
    check_same_shape("fake", fake, "real", real)
    fake = fake.to(real.dtype)  # under autocast a generator's output may be of half precision
    if kind == "r2":
        return fake
    alpha = per_sample(uniform, len(real))
    return interpolate(real, fake, alpha)


def _gradient(
    critic: Callable[..., Tensor],
    x: Tensor,
    critic_args: Sequence[object],
    *,
    create_graph: bool = False,
    thorough: bool = False,
) -> Tensor:
    """The critic's gradient. With ``thorough=True``, layers that use once_differentiable are
    recorded too; they are otherwise left out unless a gradient of their output is requested."""
    out = critic(x, *critic_args)
    if not isinstance(out, Tensor):
        raise TypeError(f"critic must return a Tensor, got {type(out).__name__}")
    gradient = None
    if out.requires_grad:
        # The gradient of the sum, without computing the sum.
        ones = torch.ones_like(out, requires_grad=thorough)
        (gradient,) = torch.autograd.grad(
            out, x, ones, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise RuntimeError(
            "critic's output does not depend on its input: there is no gradient to penalize "
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
    """The norm of each sample."""
    return x.flatten(1).norm(dim=1) if x.dim() > 1 else x.abs()


@contextmanager
def _repeatable_randomness(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yields a function that resets the random number generators to their present state."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    yield again


# ---- finding the layer without a second derivative ---------------------------------------------


def _prove(critic: nn.Module, penalty: Tensor, x: Tensor, critic_args: Sequence[object]) -> None:
    """Differentiates a critic's first penalty, and names the layer if that fails."""
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
    """Differentiates with respect to every leaf of the graph, without changing any ``.grad``.

    once_differentiable raises its error at a leaf of its own: a derivative with respect to the
    parameters alone would not reach it, and be silently wrong.
    """
    leaves: list[Tensor] = []
    seen: set[Node] = set()
    pending = [result.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, AccumulateGrad):
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
        def hook(module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
            if not culprits and not _twice_differentiable(module, args, kwargs):
                culprits.append(f"layer {name!r}, {module}")

        return hook

    handles = []
    try:
        for name, module in critic.named_modules():
            if module._modules.keys() <= {"parametrizations"}:
                # nn.Module's own method: a fused layer would take the hook for a user's.
                register = nn.Module.register_forward_hook
                handles.append(register(module, try_alone(name), with_kwargs=True))
        critic(x, *critic_args)
    except Exception:  # the search is optional: the error of the penalty is raised anyway
        if not culprits:
            return "the layer could not be identified"
    finally:
        for handle in handles:
            handle.remove()
    return culprits[0] if culprits else "the cause is outside its layers, in a forward method"


def _twice_differentiable(module: nn.Module, args: Args, kwargs: Kwargs) -> bool:
    """Runs the layer's forward once more, without its hooks, and differentiates it twice. Its
    buffers, attributes and gradients do not change."""
    leaves: list[Tensor] = []

    def own(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a leaf must not be modified in place

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
        squares = [f.square().sum() for f in first if f is not None and f.requires_grad]
        if squares:
            _differentiate(torch.stack(squares).sum())
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise
        return False
    return True
