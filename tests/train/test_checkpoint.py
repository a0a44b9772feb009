"""Nothing is lost: checkpoints are complete, atomic, and resumed bit for bit."""

import copy
import errno
import json
import pickle

import pytest
import torch

from gankernels.train import CheckpointError, Config, Trainer, latest_checkpoint, load_game, start
from gankernels.train import checkpoint as checkpoint_module

SMALL = {
    "gan": {},
    "cgan": {},  # dropout: the default generator counts too
    "cdcgan": {"width": 4},
    "dcgan": {"size": 32, "width": 4},
    "wgan": {"n_critic": 2},
}


def tensors(value, path=""):
    """Every tensor and plain value in a nested state, by path."""
    if isinstance(value, dict):
        return {k: v for name in value for k, v in tensors(value[name], f"{path}/{name}").items()}
    if isinstance(value, (list, tuple)):
        return tensors(dict(enumerate(value)), path)
    return {path: value}


@pytest.mark.parametrize(
    ("model", "precision"), [*((model, "fp32") for model in SMALL), ("cgan", "bf16")]
)
def test_resume_is_bit_for_bit(run, tmp_path, model, precision):
    settings = {"game": model, "precision": precision, **SMALL[model]}
    whole = run(**settings, steps=60, out=str(tmp_path / "whole"))
    whole.fit()
    continued = torch.rand(3), torch.rand(3, generator=whole.rng)

    run(**settings, steps=30, out=str(tmp_path / "parts")).fit()
    torch.manual_seed(12345)
    parts = run(**settings, steps=60, out=str(tmp_path / "parts"), resume=True)
    assert parts.step == 30
    parts.fit()
    resumed = torch.rand(3), torch.rand(3, generator=parts.rng)

    for a, b in zip(continued, resumed, strict=True):
        assert torch.equal(a, b)
    a = checkpoint_module.read(tmp_path / "whole/checkpoints/step_00000060.pt")
    b = checkpoint_module.read(tmp_path / "parts/checkpoints/step_00000060.pt")
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert sum(isinstance(value, torch.Tensor) for value in a.values()) > 20
    for path, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[path]), path
        else:
            assert value == b[path], path


def test_metrics_continue_without_gaps_or_repeats(run, tmp_path):
    run(steps=40, log_every=10, checkpoint_every=15).fit()
    folder = tmp_path / "run"
    # As a kill would leave it: later lines than the checkpoint, one of them torn.
    (folder / "checkpoints/step_00000040.pt").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5')
    run(steps=50, log_every=10, resume=True).fit()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps == [10, 20, 30, 40, 50]


def test_resume_starts_where_there_is_nothing_and_ends_where_all_is_done(run, tmp_path):
    trainer = run(steps=5, resume=True)
    assert trainer.step == 0
    trainer.fit()
    again = run(steps=5, resume=True)
    assert again.step == 5
    before = (tmp_path / "run/metrics.jsonl").read_text()
    again.fit()
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_run_is_not_overwritten(run):
    run(steps=5).fit()
    with pytest.raises(ValueError, match="already holds a run: --resume"):
        run(steps=5)


def test_a_trainer_does_not_overwrite_a_run_either(run, digits, tmp_path):
    first = run(steps=5)
    first.fit()
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    game = type(first.game)(first.game.spec)
    with pytest.raises(ValueError, match="already holds a run beyond step 0"):
        Trainer(game, digits, Config(out=str(tmp_path / "run"), steps=5, device="cpu")).fit()
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics
    first.fit()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-3}, "lr cannot change when a run is resumed: 0.0002 in .*, 0.001 given"),
        ({"batch_size": 8}, "batch_size cannot change"),
        ({"seed": "4"}, "seed cannot change"),
        ({"game": "gan"}, "a run of another game, not of gan"),
    ],
)
def test_resume_refuses_other_settings(run, change, message):
    run(steps=5).fit()
    with pytest.raises(ValueError, match=message):
        run(steps=10, resume=True, **change)


def test_resume_takes_the_same_settings_as_text(run):
    run(steps=5, lr=1e-3).fit()
    trainer = run(steps="7", lr="1e-3", log_every="3", resume=True)
    assert (trainer.step, trainer.config.steps, trainer.config.log_every) == (5, 7, 3)
    assert trainer.optimizers["generator"].param_groups[0]["lr"] == 1e-3


def test_torn_checkpoint(run, tmp_path):
    run(steps=20, checkpoint_every=10).fit()
    torn = tmp_path / "run/checkpoints/step_00000020.pt"
    torn.write_bytes(torn.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"step_00000020.pt is damaged"):
        run(steps=30, resume=True)
    torn.unlink()
    assert run(steps=30, resume=True).step == 10


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_code_is_refused_and_not_run(run, tmp_path):
    run(steps=5).fit()
    target = tmp_path / "run/checkpoints/step_00000005.pt"
    victim = tmp_path / "victim"
    for write in (
        lambda: torch.save({"magic": Bomb(victim)}, target),
        lambda: target.write_bytes(pickle.dumps(Bomb(victim), protocol=2)),
    ):
        write()
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            run(steps=10, resume=True)
        assert not victim.exists()


def test_foreign_files(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other.pt is not a checkpoint of gankernels"):
        load_game(tmp_path / "other.pt")
    torch.save({"magic": checkpoint_module.MAGIC, "version": 99}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="version 99, this gankernels reads 4: use"):
        load_game(tmp_path / "newer.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CheckpointError, match="damaged"):
        load_game(tmp_path / "empty.pt")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_game(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_game(tmp_path)


def test_checkpoint_of_another_game_or_other_data(run, tmp_path):
    one = run("gan", steps=5, out=str(tmp_path / "gan"))
    one.fit()
    path = latest_checkpoint(tmp_path / "gan")
    with pytest.raises(CheckpointError, match="is of another game than wgan"):
        run("wgan").load(path)
    with pytest.raises(CheckpointError, match="holds other networks than these"):
        run("gan", latent_dim=7).load(path)
    with pytest.raises(CheckpointError, match="was trained on 1797 rows of images "):
        run("gan", size=12).load(path)


def test_resume_on_another_kind_of_device(run, tmp_path):
    run(steps=5, device="cpu:0").fit()
    assert run(steps=10, device="cpu", resume=True).step == 5
    path = latest_checkpoint(tmp_path / "run")
    content = checkpoint_module.read(path)
    torch.save({**content, "device": "cuda"}, path)
    with pytest.raises(CheckpointError, match=r"written on cuda.* resume with --device cuda"):
        run(steps=10, resume=True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("torn")])
def test_full_disk_keeps_the_previous_checkpoint(run, tmp_path, monkeypatch, error):
    trainer = run(steps=20, checkpoint_every=10)
    save = torch.save

    def full(content, file):
        if content["step"] == 20:
            file.write(b"half of it")
            raise error
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"could not write .*20.pt: .*; earlier .* intact"):
        trainer.fit()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000010.pt"]
    monkeypatch.undo()
    assert run(steps=20, resume=True).step == 10


def test_load_game_has_the_averaged_generator(run, tmp_path):
    trainer = run(steps=10)
    trainer.fit()
    game, config = load_game(tmp_path / "run")
    assert not game.training
    assert config["game"] == "cgan"
    labels = torch.arange(10)
    with trainer.sampling() as trained:
        expected = trained.sample(10, labels=labels, rng=torch.Generator().manual_seed(1))
    assert torch.equal(
        game.sample(10, labels=labels, rng=torch.Generator().manual_seed(1)), expected
    )
    plain = trainer.game.eval().sample(10, labels=labels, rng=torch.Generator().manual_seed(1))
    assert not torch.equal(plain, expected)


def test_without_average(run, tmp_path):
    trainer = run(steps=5, ema=0)
    assert not trainer.ema
    trainer.fit()
    game, _ = load_game(tmp_path / "run/checkpoints/step_00000005.pt")
    for a, b in zip(game.parameters(), trainer.game.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_are_ordered_by_number(tmp_path):
    """From step 100,000,000 on their names are longer, and as text the later is the less."""
    steps = [2, 99_999_997, 99_999_999, 100_000_000, 1_000_000_000, 2**62]
    folder = tmp_path / "checkpoints"
    for step in reversed(steps[:-1]):
        checkpoint_module.save(tmp_path, step, {"content": step}, keep=10)
    (folder / "step_x.pt").touch()  # nobody's
    newest = checkpoint_module.save(tmp_path, steps[-1], {}, keep=3)
    found = checkpoint_module.checkpoints(tmp_path)
    assert [checkpoint_module.step_of(path) for path in found] == steps[-3:]
    assert latest_checkpoint(tmp_path) == newest == folder / f"step_{2**62}.pt"
    newest.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step_1000000000.pt is intact"):
        checkpoint_module.read(newest)


def test_a_run_goes_beyond_eight_digits(run, tmp_path):
    run(steps=1).fit()
    path = latest_checkpoint(tmp_path / "run")
    content = checkpoint_module.read(path)
    torch.save({**content, "step": 99_999_998}, path.with_name("step_99999998.pt"))
    path.unlink()
    run(steps=100_000_001, resume=True, checkpoint_every=1, sample_every=1).fit()
    saved = [path.name for path in checkpoint_module.checkpoints(tmp_path / "run")]
    assert saved == ["step_100000000.pt", "step_100000001.pt"]
    assert run(steps=100_000_001, resume=True).step == 100_000_001
    report = (tmp_path / "run/report.html").read_text()
    assert report.index("step 99,999,999") < report.index("step 100,000,000")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A trainer of a tiny game after a step, and what its checkpoint holds."""
    run = tmp_path_factory.mktemp("whole")
    tiny = {"size": 8, "batch_size": 4, "width": 1, "latent_dim": 3, "device": "cpu"}
    trainer = start("cdcgan", out=str(run), precision="fp32", **tiny)
    trainer.iterate()
    return trainer, torch.load(trainer.save(), weights_only=True)


def parts_of(value, path=()):
    """The paths of all parts, but only of the first of many parameters or weights."""
    for i, key in enumerate(range(len(value)) if isinstance(value, list) else value):
        yield (*path, key)
        if isinstance(value[key], (dict, list)) and (len(path) < 3 or i == 0):
            yield from parts_of(value[key], (*path, key))


EMPTY = torch.empty(0)
GONE = object()


def change(content, path, value):
    """A copy in which a part is another, or gone."""
    *parents, last = path
    result = below = dict(content)
    for key in parents:
        below[key] = copy.copy(below[key])
        below = below[key]
    if value is GONE:
        del below[last]
    else:
        below[last] = value
    return result


def test_a_part_that_is_missing_or_of_another_kind(whole, monkeypatch):
    trainer, content = whole
    path = latest_checkpoint(trainer.run)
    refused = set()
    for i, part in enumerate(parts_of(content)):
        values = [EMPTY, GONE, None, "x", [], 10**30]
        for value in values if len(part) == 1 else [values[i % 6]]:
            read = change(content, part, value)
            monkeypatch.setattr(checkpoint_module.archive, "load", lambda *_, read=read: read)
            try:
                (load_game if part[0] in ("config", "spec", "ema") else trainer.load)(path)
            except (CheckpointError, ValueError) as error:
                assert str(path) in str(error)  # noqa: PT017
                refused.add(part)
    assert refused >= {(name,) for name in content}
    assert {part[:4] for part in refused} >= {
        ("optimizers", player, "state", 0) for player in ("discriminator", "generator")
    }


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            ("optimizers", "generator", "state", 0, "step"),
            EMPTY,
            "step must be a tensor of float32",
        ),
        (("rng",), torch.zeros(5056, dtype=torch.uint8), "rng cannot be used: "),
        (("step",), -1, "step must not be negative, got -1"),
        (("step",), True, "step must be a int, got True"),
        (("config", "game"), "gan", "unknown setting 'width'"),
        (("config", "latent_dim"), 10**9, "holds other networks than these"),
        (("config", "latent_dim"), 2**62, "the networks of these settings are too large"),
        (("config", "zzz"), 1, "unknown setting 'zzz'"),
        (("spec", "images", "width"), 2**40, "images must be square, got 8x1099511627776"),
        (("spec", "images", "channels"), 2**62, "the networks of these settings are too large"),
        (("spec", "images", "channels"), 3, "holds other networks than these"),
        (("spec", "labels", "kind"), "title", "labels: kind must be one of image, label"),
        (("ema", "generator"), None, "state must be a mapping"),
        (("optimizers", "generator", "param_groups", 0, "betas"), (0.5,), "betas must be a sequ"),
        (("default_rng", 0), EMPTY, r"rng\[1\] must be a tensor of uint8"),
    ],
)
def test_what_is_wrong_with_a_part_is_said(whole, tmp_path, part, value, message):
    trainer, content = whole
    path = tmp_path / "a.pt"
    torch.save(change(content, part, value), path)
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        (load_game if part[0] in ("config", "spec") else trainer.load)(path)
    after = tensors(trainer.state_dict())
    for name, old in tensors(before).items():
        new = after[name]
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new, name


def test_weights_that_are_not_finite(whole, tmp_path):
    trainer, content = whole
    part = "game", "discriminator.head.bias"
    torch.save(change(content, part, torch.tensor([torch.nan])), tmp_path / "a.pt")
    for use in (load_game, trainer.load):
        with pytest.raises(CheckpointError, match=r"not finite: discriminator.head.bias"):
            use(tmp_path / "a.pt")


def test_many_damaged_checkpoints_are_read_once_each(tmp_path, monkeypatch):
    for step in range(12):
        (tmp_path / f"step_{step:08d}.pt").write_bytes(b"PK")
    load, read = checkpoint_module.archive.load, []
    monkeypatch.setattr(
        checkpoint_module.archive, "load", lambda *a: (read.append(a[0]), load(*a))[1]
    )
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint_module.read(tmp_path / "step_00000011.pt")
    assert len(read) == 12
