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


def make_trainer(name, folder, graph, **more):
    settings = {"out": folder, "device": "cuda", "batch_size": 16, "log_every": 3, "graph": graph}
    settings |= GAMES[name] | more
    config, options = configure(games.get(name), settings)
    generator = torch.Generator().manual_seed(0)
    shape = (64, 1, config.data_options.size, config.data_options.size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    data = ImageData(images, torch.arange(64) % 10, tuple("0123456789"), "noise")
    torch.manual_seed(0)
    return Trainer(
        games.get(name)(DataSpec(1, config.data_options.size, 10), options), data, config
    )


@pytest.mark.parametrize("name", GAMES)
def test_a_whole_training_iteration(name, tmp_path, monkeypatch):
    """Batches, noise, every player's steps, penalties, optimizers and the moving average."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    runs = []
    for graph in (True, False):
        trainer = make_trainer(name, tmp_path / str(graph), graph)
        torch.manual_seed(1)  # of dropout
        for _ in range(12):
            trainer.iterate()
        runs.append(trainer)
    captured, eager = runs
    # Every third iteration is another one: it takes the gradient norms.
    assert len(captured.call.captured) == 2
    assert captured.losses.take() == pytest.approx(eager.losses.take(), rel=1e-3)
    torch.testing.assert_close(
        captured.game.state_dict(), eager.game.state_dict(), rtol=1e-4, atol=1e-5
    )
    averages = (trainer.ema["generator"].state_dict() for trainer in runs)
    torch.testing.assert_close(*averages, rtol=1e-4, atol=1e-5)
    assert torch.equal(captured.rng.get_state(), eager.rng.get_state())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_iterations(precision, tmp_path):
    trainer = make_trainer("cgan", tmp_path, True, precision=precision)
    for _ in range(12):
        trainer.iterate()
    values = trainer.losses.take()  # raises where one is not finite
    assert "discriminator/penalty" in values
    if precision == "fp16":
        assert trainer.scalers["generator"].get_scale() > 1


def test_going_on_from_a_checkpoint_captures_anew(tmp_path):
    trainer = make_trainer("cgan", tmp_path, True)
    for _ in range(8):
        trainer.iterate()
    path = trainer.save()
    for _ in range(8):
        trainer.iterate()
    again = make_trainer("cgan", tmp_path, True)
    again.load(path)
    for _ in range(8):
        again.iterate()
    torch.testing.assert_close(
        again.game.state_dict(), trainer.game.state_dict(), rtol=1e-4, atol=1e-5
    )


def test_a_game_that_reads_back_is_refused(tmp_path):
    trainer = make_trainer("cgan", tmp_path, True)
    player = trainer.players[0]
    attribute = "lazy_loss" if player.lazy_every == 1 else "loss"  # what loss_of() returns
    inner = getattr(player, attribute)

    def loss(batch, rng):
        terms = inner(batch, rng)
        terms["real"].item()
        return terms

    object.__setattr__(player, attribute, loss)
    assert player.loss_of(0) is loss
    trainer.iterate()
    trainer.iterate()  # the first and second of ordinary iterations; the next takes norms
    trainer.iterate()
    trainer.iterate()
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph .*--no-graph"):
        trainer.iterate()
