import logging

import pytest
import torch

from gankernels.data import ImageData, to_float
from gankernels.metrics import (
    Classifier,
    features,
    load_or_train_classifier,
    train_classifier,
)
from gankernels.metrics import _cache as cache_module


@pytest.fixture(scope="module")
def small():
    """Two kinds of 8x8 image, few enough that training them takes a second or two."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (60, 3, 8, 8), generator=rng, dtype=torch.uint8)
    images[::2, :, :, :4] += 150
    return ImageData(images, torch.arange(60) % 2, ("left", "none"), "small")


def test_accuracy_on_held_out_digits(digits, trained):
    classifier, accuracy = trained
    assert accuracy >= 0.98
    _, held_out = digits.split()
    with torch.no_grad():
        predicted = classifier(to_float(held_out.images)).argmax(1)
    assert (predicted == held_out.labels).double().mean().item() == pytest.approx(accuracy)
    assert classifier.held_out_accuracy == accuracy
    assert not classifier.training


def test_training_is_deterministic_and_leaves_the_global_random_state_alone(small):
    before = torch.get_rng_state()
    first, accuracy = train_classifier(small, seed=1)
    assert torch.get_rng_state().equal(before)
    torch.rand(1)  # whatever the global state is
    second, _ = train_classifier(small, seed=1)
    other, _ = train_classifier(small, seed=2)
    assert accuracy == 1
    states = [model.state_dict() for model in (first, second, other)]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert not states[0]["head.weight"].equal(states[2]["head.weight"])


@pytest.mark.parametrize("size", [1, 2, 7, 28, 32, 65])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_channels(size, channels):
    classifier = Classifier(channels, size, 7, num_features=33)
    x = torch.zeros(3, channels, size, size)
    assert classifier(x).shape == (3, 7)
    assert classifier.features(x).shape == (3, 33)


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"x must be \(N, 1, 28, 28\).*got \(3, 1, 32, 32\)"):
        Classifier(1, 28, 10)(torch.zeros(3, 1, 32, 32))


def test_features_of_bytes_and_floats(digits, trained):
    classifier, _ = trained
    images = digits.images[:300]
    from_bytes = features(classifier, images)
    assert from_bytes.shape == (300, 64)
    assert from_bytes.equal(features(classifier, to_float(images)))
    torch.testing.assert_close(from_bytes, features(classifier, images, batch_size=7))
    torch.testing.assert_close(classifier.head(from_bytes), classifier(to_float(images)))
    with pytest.raises(TypeError, match=r"uint8 or floating point, got torch\.int64"):
        features(classifier, images.long())


def test_features_are_of_eval_mode_and_the_mode_is_put_back(small):
    classifier = Classifier(3, 8, 2).train()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    result = features(classifier, small.images)
    assert classifier.training
    torch.testing.assert_close(
        dict(classifier.state_dict()), before, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(result[:1], features(classifier.eval(), small.images[:1]))


def test_feature_covariance_is_well_conditioned(digits, trained):
    covariance = torch.cov(features(trained[0], digits.images).double().T)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert eigenvalues[-1] / eigenvalues[0] < 1e5


def test_cache(small, tmp_path, monkeypatch):
    calls = []

    def counted(data, **options):
        calls.append(options["seed"])
        return train_classifier(data, **options)

    monkeypatch.setattr(cache_module, "train_classifier", counted)
    first, accuracy = load_or_train_classifier(small, tmp_path / "run")
    second, again = load_or_train_classifier(small, tmp_path / "run")
    assert calls == [0]
    assert again == accuracy
    assert not second.training
    assert features(first, small.images).equal(features(second, small.images))
    (path,) = (tmp_path / "run").iterdir()
    assert path.name.startswith("classifier-")

    # Another seed, and other data under the same name, are other classifiers.
    load_or_train_classifier(small, tmp_path / "run", seed=1)
    relabelled = ImageData(small.images, 1 - small.labels, small.classes, small.name)
    load_or_train_classifier(relabelled, tmp_path / "run")
    assert calls == [0, 1, 0]
    assert len(list((tmp_path / "run").iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "foreign", "hostile"])
def test_a_damaged_cache_is_trained_anew(small, tmp_path, monkeypatch, caplog, damage):
    untrained = Classifier(3, 8, 2).eval()
    monkeypatch.setattr(cache_module, "train_classifier", lambda data, **_: (untrained, 0.5))
    load_or_train_classifier(small, tmp_path)
    (path,) = tmp_path.iterdir()
    intact = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(intact[:1000])
    elif damage == "foreign":
        torch.save({"weight": torch.zeros(1)}, path)
    else:
        torch.save(untrained, path)  # a whole module: only unpickling code can read it
    with caplog.at_level(logging.WARNING):
        classifier, _ = load_or_train_classifier(small, tmp_path)
    assert classifier is untrained
    assert f"{path} cannot be read" in caplog.text
    assert path.read_bytes() == intact
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_only_the_cache(small, tmp_path, monkeypatch, caplog):
    untrained = Classifier(3, 8, 2).eval()
    monkeypatch.setattr(cache_module, "train_classifier", lambda data, **_: (untrained, 0.5))
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert load_or_train_classifier(small, tmp_path / "file")[0] is untrained
    assert "could not be kept" in caplog.text
