"""The minibatch standard deviation against the same in PyTorch's own ops.

``python benchmarks/minibatch_stddev.py`` prints the table, ``--save NAME`` writes results/. Three
measures: forward; forward and backward; a penalty step, that is forward, backward, the squared norm
of the gradient (our own kernel for all), double backward. The yardstick is ``x.clone()``, of which
what each has to move is so many: half of one forward, one backward, one and a half double backward,
one and a half the norm and its derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import arguments_of, interleaved, save
from torch import Tensor

import gankernels as gk
from gankernels.ops.minibatch_stddev import reference

SHAPES = ((64, 512, 4, 4), (64, 256, 16, 16), (16, 512, 8, 8))
DTYPES = (torch.float32, torch.bfloat16)
LEAST = {"forward": 0.5, "forward + backward": 1.5, "penalty step": 4.5}  # clones of x
GROUP_SIZE = 4


def contenders(what: str, x: Tensor) -> dict[str, Callable[[], object]]:
    leaf = x.clone().requires_grad_()
    grad_y = torch.randn(len(x), 1, *x.shape[2:]).to(x.dtype)

    def run(function: Callable[[Tensor, int, int], Tensor]) -> Callable[[], object]:
        def forward() -> Tensor:
            return function(x, GROUP_SIZE, 1)

        def first() -> Tensor:
            return torch.autograd.grad(function(leaf, GROUP_SIZE, 1), leaf, grad_y)[0]

        def second() -> Tensor:
            y = function(leaf, GROUP_SIZE, 1)
            (grad,) = torch.autograd.grad(y, leaf, grad_y, create_graph=True)
            return torch.autograd.grad(gk.functional.gradient_norm_penalty(grad, "r1"), leaf)[0]

        return {"forward": forward, "forward + backward": first, "penalty step": second}[what]

    return {
        "yardstick": x.clone,
        "eager": run(reference),
        "ours": run(gk.functional.minibatch_stddev),
    }


def main() -> None:
    arguments = arguments_of(__doc__)
    rows = []
    print(f"{'case':46} {'eager ms':>9} {'ours ms':>9}  x eager  clones (least)")
    for shape in SHAPES:
        for dtype in DTYPES:
            for what, least in LEAST.items():
                torch.manual_seed(0)
                x = torch.randn(shape).to(dtype)
                times = interleaved(contenders(what, x), seconds=arguments.seconds)
                name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {what}"
                ratio, clones = (times[k] / times["ours"] for k in ("eager", "yardstick"))
                print(
                    f"{name:46} {1e3 * times['eager']:9.3f} {1e3 * times['ours']:9.3f}"
                    f"  {ratio:7.2f}  {1 / clones:6.2f} ({least})",
                    flush=True,
                )
                rows.append({"case": name, "seconds": times, "times_eager": ratio})
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
