"""CUDA graphs: each op and whole training iterations, captured once, replayed on other data."""

import pytest
import torch

import gankernels as gk
from gankernels import games
from gankernels.data import ImageData
from gankernels.games import DataSpec
from gankernels.train import Trainer
from gankernels.train.config import configure


def warm_up(run, times=3):
    """On a stream of its own, as PyTorch asks for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def test_ops_forward_backward_and_double_backward(op, dtype):
    inputs = op.draw(dtype)
    warm_up(lambda: op.solve(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op.solve(inputs)
    for seed in (1, 2):
        new = op.draw(dtype, seed=seed)
        with torch.no_grad():
            for there, here in zip(inputs, new, strict=True):
                there.copy_(here)
        graph.replay()
        for a, b in zip(found, op.solve(new), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(momentum):
    captured, eager = (
        gk.nn.BatchNormLeakyReLU2d(3, momentum=momentum, device="cuda") for _ in range(2)
    )
    x = torch.randn(8, 3, 5, 5, device="cuda")
    warm_up(lambda: captured(x), times=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured(x)
    for _ in range(2):
        eager(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        eager(x)
    assert captured.num_batches_tracked == 5
    for (name, a), b in zip(captured.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b), name


GAMES = {
    "wgan-gp": {"size": 8},
    "cgan": {"size": 8, "penalty": "dragan", "minibatch_discrimination": "6,5"},
    "dcgan": {"size": 32, "width": 8, "penalty": "r1", "minibatch_stddev": True},
}


def make_trainer(name, folder):
    settings = {"out": folder, "device": "cuda", "batch_size": 16, **GAMES[name]}
    config, options = configure(games.get(name), settings)
    generator = torch.Generator().manual_seed(0)
    shape = (64, 1, config.size, config.size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    data = ImageData(images, torch.arange(64) % 10, tuple("0123456789"), "noise")
    torch.manual_seed(0)
    trainer = Trainer(games.get(name)(DataSpec(1, config.size, 10), options), data, config)
    for optimizer in trainer.optimizers.values():
        for group in optimizer.param_groups:
            group["capturable"] = True
    return trainer


@pytest.mark.parametrize("name", GAMES)
def test_a_whole_training_iteration(name, tmp_path, monkeypatch):
    """Batches, noise, every player's steps, penalties, optimisers and the moving average."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    captured, eager = (make_trainer(name, tmp_path / part) for part in ("captured", "eager"))
    torch.manual_seed(1)  # of dropout
    warm_up(captured.iterate)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(captured.rng)
    with torch.cuda.graph(graph):
        captured.iterate()
    before = [t.clone() for t in captured.game.state_dict().values()]
    for _ in range(4):
        graph.replay()
    torch.manual_seed(1)
    for _ in range(3 + 4):
        eager.iterate()
    after = captured.game.state_dict()
    assert any(not torch.equal(a, b) for a, b in zip(after.values(), before, strict=True))
    torch.testing.assert_close(after, eager.game.state_dict(), rtol=1e-4, atol=1e-5)
    averages = (t.average.state_dict() for t in (captured, eager))
    torch.testing.assert_close(*averages, rtol=1e-4, atol=1e-5)
    assert torch.equal(captured.rng.get_state(), eager.rng.get_state())
