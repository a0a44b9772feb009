"""`gankernels evaluate` on runs of a few steps on real digits."""

import json

import numpy as np
import pytest

from gankernels import metrics
from gankernels.cli import main
from gankernels.data import load

SIZE = 8
TRAIN = ["--steps", "3", "--batch-size", "8", "--device", "cpu", "--set", f"size={SIZE}"]


@pytest.fixture(scope="module")
def cgan(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cgan"
    assert main(["train", "cgan", "--data", "digits", *TRAIN, "--out", str(out)]) == 0
    assert main(["evaluate", str(out), "--count", "200", "--device", "cpu"]) == 0  # its classifier
    return out


def evaluate(source, tmp_path, *more):
    path = tmp_path / "scores.json"
    arguments = ["evaluate", str(source), "--count", "200", "--device", "cpu", "--json", str(path)]
    assert main([*arguments, *more]) == 0
    return json.loads(path.read_text())


def test_prints_and_writes_every_score(cgan, tmp_path, capsys):
    scores = evaluate(cgan, tmp_path)
    assert scores["game"] == "cgan"
    assert scores["data"] == "digits"
    assert scores["n"] == 200
    assert scores["classifier_accuracy"] > 0.95
    assert 0 <= scores["accuracy"] <= 1
    assert scores["frechet"] > 0
    assert scores["untrained_frechet"] > 0
    assert scores["frechet_ratio"] == pytest.approx(scores["frechet"] / scores["untrained_frechet"])
    printed = capsys.readouterr().out
    for expected in (
        f"held-out real images {scores['classifier_accuracy']:.2%}",
        f"accuracy of the samples {scores['accuracy']:.2%}",
        f"relative to real {scores['diversity']:.1%}",
        f"(classifier features) {scores['frechet']:.3f}",
        f"untrained generator {scores['untrained_frechet']:.3f}",
        f"ratio of the two {scores['frechet_ratio']:.4f}",
    ):
        assert expected in " ".join(printed.split())


def test_the_trained_generator_is_the_one_scored(cgan, tmp_path):
    from gankernels.train import load_game

    scores = evaluate(cgan, tmp_path, "--seed", "3")
    game, _ = load_game(cgan)
    data = load("digits", size=SIZE)
    chosen = ["frechet", "accuracy"]
    evaluation = metrics.Evaluation(chosen, data, metrics.Cache(cgan), given=("labels",))
    expected = evaluation.score(game.sample, n=200, seed=3)
    assert scores["frechet"] == pytest.approx(expected["frechet"]["frechet"])
    assert scores["accuracy"] == expected["accuracy"]["accuracy"]
    assert scores["untrained_frechet"] != pytest.approx(scores["frechet"])


def test_the_classifier_is_kept_in_the_run_folder(cgan, tmp_path, monkeypatch):
    assert len(list(cgan.glob("classifier-*.pt"))) == 1

    def fail(*_, **__):
        raise AssertionError("trained a second time")

    monkeypatch.setattr(metrics._cache, "train_classifier", fail)
    (checkpoint,) = (cgan / "checkpoints").glob("*.pt")
    by_folder, by_file = evaluate(cgan, tmp_path), evaluate(checkpoint, tmp_path)
    assert by_folder == by_file
    assert by_folder["checkpoint"] == str(checkpoint)


def test_chosen_metrics(cgan, tmp_path, capsys):
    scores = evaluate(cgan, tmp_path, "--metrics", "accuracy")
    assert {"accuracy", "classifier_accuracy"} <= scores.keys()
    assert not {"frechet", "diversity", "untrained_frechet"} & scores.keys()
    assert "Fréchet" not in capsys.readouterr().out


def test_seed_decides_the_samples(cgan, tmp_path):
    first = evaluate(cgan, tmp_path, "--seed", "1")
    assert first == evaluate(cgan, tmp_path, "--seed", "1")
    assert first["frechet"] != evaluate(cgan, tmp_path, "--seed", "2")["frechet"]


def test_unconditional(tmp_path, cgan, capsys):
    out = tmp_path / "gan"
    assert main(["train", "gan", "--data", "digits", *TRAIN, "--out", str(out)]) == 0
    for classifier in cgan.glob("classifier-*.pt"):  # of the same data: saves training it again
        (out / classifier.name).write_bytes(classifier.read_bytes())
    capsys.readouterr()
    scores = evaluate(out, tmp_path)
    assert not {"accuracy", "diversity"} & scores.keys()
    printed = capsys.readouterr().out
    assert "untrained generator" in printed
    assert "class-conditional" not in printed
    assert main(["evaluate", str(out), "--metrics", "accuracy", "--device", "cpu"]) == 2
    assert "must be of type Image made from Label, got of type Image" in capsys.readouterr().err


def test_other_data_are_brought_to_the_size_of_the_model(cgan, tmp_path):
    digits = load("digits", size=20, channels=3)
    np.savez(tmp_path / "big.npz", images=digits.images[:200], labels=digits.labels[:200])
    scores = evaluate(cgan, tmp_path, "--data", str(tmp_path / "big.npz"))
    assert scores["data"] == "big.npz"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/none"], "none does not exist"),
        (["{run}", "--data", "nowhere"], "'nowhere' is not the name of a data set"),
        (["{run}", "--count", "1"], "n must be at least 2, got 1"),
        (["{run}", "--metrics", "frechet,kidd"], "unknown metric 'kidd'"),
        (["{run}", "--data", "{tmp}/two.npz"], "other classes than two.npz has: 0, 1, 2, 3,"),
        (["{run}", "--data", "{tmp}/same.npz"], "4, 5, 6, 7, 8, 9 there, 0, 1, 2, 3, 4, 5, 6,"),
        (["{run}", "--seed", str(2**64)], "seed must fit into 64 bits, got 18446744073709551616"),
    ],
)
def test_errors_are_one_line(cgan, tmp_path, capsys, arguments, message):
    images = np.zeros((4, SIZE, SIZE), np.uint8)
    np.savez(tmp_path / "two.npz", images=images, labels=np.arange(4) % 2)
    ten = np.array([*range(9), 11])  # as many classes, but one is another
    np.savez(tmp_path / "same.npz", images=np.zeros((10, SIZE, SIZE), np.uint8), labels=ten)
    arguments = [part.format(run=cgan, tmp=tmp_path) for part in arguments]
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gankernels: error: ")
    assert message in error
    assert error.count("\n") == 1
