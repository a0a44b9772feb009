"""batch_norm_leaky_relu against eager PyTorch and torch.compile: the bars of the project.

``python benchmarks/batch_norm_leaky_relu.py`` prints the table and writes results/; the same cases
run under pytest-benchmark in test_batch_norm_leaky_relu.py. Times are given in clones, the time of
``x.clone()`` in the same round, and as ratios to eager and to the best compiled form.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import interleaved, prepare, save
from torch import Tensor, nn
from torch._inductor.exc import InductorError

import gankernels as gk

SLOPE = 0.2


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    derivative: str  # "forward", "backward" (forward and backward) or "penalty" (a penalty step)
    bar: float  # how many times faster than eager it has to be

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        shape = "x".join(map(str, self.shape))
        return f"{shape} {str(self.dtype)[6:]} {layout} {self.derivative}"


def cases() -> Iterator[Case]:
    bars = {  # (dtype, channels_last): forward, forward + backward, penalty step
        (torch.float32, False): (2.5, 2.5, 7),
        (torch.float32, True): (2, 2.2, 20),
        (torch.bfloat16, False): (2.5, 3, 10),
        (torch.bfloat16, True): (2.5, 3, 30),
    }
    passes = ("forward", "backward", "penalty")
    for (dtype, channels_last), values in bars.items():
        for shape in ((64, 128, 32, 32), (128, 128, 14, 14)):
            for derivative, bar in zip(passes, values, strict=True):
                yield Case(shape, dtype, channels_last, derivative, bar)
    for shape in ((64, 256), (64, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            for derivative in passes:
                yield Case(shape, dtype, False, derivative, 1)


def eager_penalty(grad: Tensor) -> Tensor:
    return (grad.flatten(1).float().norm(2, 1) - 1).square().mean()


def contenders(case: Case, compiled: bool) -> dict[str, Callable[[], object]]:
    """The clone, eager, ours and, where asked for, the compiled forms of one case."""
    torch.manual_seed(0)
    x = torch.randn(case.shape).to(case.dtype)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    grad_y = torch.randn_like(x)
    x.requires_grad_()
    channels, flat = case.shape[1], len(case.shape) == 2
    norm = nn.BatchNorm1d if flat else nn.BatchNorm2d
    ours = gk.nn.BatchNormLeakyReLU1d if flat else gk.nn.BatchNormLeakyReLU2d
    modules = {
        "eager": nn.Sequential(norm(channels), nn.LeakyReLU(SLOPE)),
        "ours": ours(channels, negative_slope=SLOPE),
    }
    penalties = {"eager": eager_penalty, "ours": gk.functional.gradient_norm_penalty}

    def forward(module: nn.Module) -> Tensor:
        return module(x)

    def backward(module: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), (x, *module.parameters()), grad_y)

    def penalty(module: nn.Module, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(module(x), x, grad_y, create_graph=True)
        weight = next(module.parameters())  # the bias has no part in the second derivative
        return torch.autograd.grad(of(dx), (x, weight))

    runs: dict[str, Callable[[], object]] = {"clone": lambda: x.detach().clone()}
    for name, module in modules.items():
        runs[name] = {
            "forward": lambda m=module: forward(m),
            "backward": lambda m=module: backward(m),
            "penalty": lambda m=module, of=penalties[name]: penalty(m, of),
        }[case.derivative]
    if compiled:
        torch._dynamo.reset()
        if case.derivative == "penalty":
            # A compiled module cannot be differentiated twice; a whole step with torch.func inside
            # can, and is the strongest form that PyTorch has.
            weight, bias = torch.ones(channels), torch.zeros(channels)

            def step(x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
                def penalised(x: Tensor, weight: Tensor) -> Tensor:
                    def scalar(x: Tensor) -> Tensor:
                        y = F.batch_norm(x, None, None, weight, bias, True)
                        return (F.leaky_relu(y, SLOPE) * grad_y).sum()

                    return eager_penalty(torch.func.grad(scalar)(x))

                return torch.func.grad(penalised, argnums=(0, 1))(x, weight)

            compiled_step = torch.compile(step)
            runs["compiled"] = lambda: compiled_step(x.detach(), weight, grad_y)
        else:
            module = torch.compile(
                nn.Sequential(norm(channels), nn.LeakyReLU(SLOPE)), dynamic=False
            )
            run = forward if case.derivative == "forward" else backward
            runs["compiled"] = lambda: run(module)
        try:
            runs["compiled"]()
        except InductorError:
            # torch 2.13 writes C++ that does not compile for the bfloat16 penalty step.
            print(f"{case}: torch.compile fails, see the column of nan")
            del runs["compiled"]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="per case")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile too")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    prepare(arguments.threads)
    rows = []
    print(
        f"{'case':52} {'clones: eager':>13} {'compiled':>9} {'ours':>6}   x eager (bar)  x compiled"
    )
    for case in cases():
        if arguments.only not in str(case):
            continue
        times = interleaved(contenders(case, arguments.compiled), seconds=arguments.seconds)
        clones = {name: t / times["clone"] for name, t in times.items()}
        ratio = times["eager"] / times["ours"]
        against = times["compiled"] / times["ours"] if "compiled" in times else float("nan")
        verdict = " " if ratio >= case.bar else "!"
        print(
            f"{case!s:52} {clones['eager']:13.2f} {clones.get('compiled', float('nan')):9.2f} "
            f"{clones['ours']:6.2f}   {ratio:7.2f} ({case.bar:4}){verdict} {against:11.2f}",
            flush=True,
        )
        rows.append({"case": str(case), "bar": case.bar, "seconds": times, "times_eager": ratio})
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
