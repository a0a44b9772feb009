"""The built-in metrics, on samples that each of them must distinguish."""

import pytest
import torch

from gankernels import metrics
from gankernels.data import Columns, Image, Label, Tokens, to_float
from gankernels.metrics import Cache, Evaluation, features, frechet_distance


def resample(data, labels, rng):
    """Real images of the given labels, drawn with replacement."""
    rows = [(data.labels == k).nonzero().flatten() for k in range(data.num_classes)]
    return torch.stack(
        [
            data.images[rows[k][torch.randint(len(rows[k]), (1,), generator=rng).item()]]
            for k in labels
        ]
    )


@pytest.fixture(scope="module")
def real_features(digits, trained):
    return features(trained[0], digits.images)


@pytest.fixture(scope="module")
def evaluation(digits, trained, tmp_path_factory):
    """`evaluation(conditional)`: all metrics that fit, with the classifier that is trained once."""
    folder = tmp_path_factory.mktemp("metrics")

    def make(conditional=True):
        given = ("labels",) if conditional else ()
        chosen = metrics.suitable(digits, "images", given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics._cache, "train_classifier", lambda *_, **__: trained)
            return Evaluation(chosen, digits, Cache(folder), given=given)

    return make


@pytest.fixture
def score(evaluation):
    def run(sample, n=800, conditional=True, **options):
        found = evaluation(conditional).score(sample, n=n, **options)
        return {key: value for scores in found.values() for key, value in scores.items()}

    return run


def test_real_images_score_as_real(digits, trained, score, evaluation):
    scores = score(lambda n, rng, labels: to_float(resample(digits, labels, rng)))
    assert scores.keys() == {"frechet", "accuracy", "diversity"}
    assert evaluation().facts == {"classifier_accuracy": trained[1]}
    assert scores["accuracy"] > 0.99
    assert 0.93 < scores["diversity"] < 1.07
    assert scores["frechet"] < 0.3


def test_noise_scores_far_from_real(digits, score):
    def noise(n, rng, labels):
        return torch.rand(n, 1, 28, 28, generator=rng) * 2 - 1

    scores = score(noise)
    assert scores["accuracy"] < 0.2
    assert scores["frechet"] > 20


def test_wrong_labels_are_noticed(digits, score):
    # Perfect images of the next class: only the accuracy can tell.
    scores = score(lambda n, rng, labels: to_float(resample(digits, (labels + 1) % 10, rng)))
    assert scores["accuracy"] < 0.02
    assert scores["frechet"] < 0.3


def test_collapse_is_noticed(digits, score):
    # One perfect image per class: only the diversity and the distance can tell.
    first = torch.stack([digits.images[digits.labels == k][0] for k in range(10)])
    collapsed = score(lambda n, rng, labels: to_float(first[labels]))
    assert collapsed["accuracy"] > 0.99
    assert collapsed["diversity"] == 0
    healthy = score(lambda n, rng, labels: to_float(resample(digits, labels, rng)))
    assert collapsed["frechet"] > 5 * healthy["frechet"]


def test_samples_come_in_batches_with_labels_in_proportion(digits, score):
    asked = []

    def record(n, rng, labels):
        assert labels.shape == (n,)
        asked.append(labels)
        return torch.zeros(n, 1, 28, 28)

    score(record, n=2 * len(digits))
    assert max(map(len, asked)) <= 256
    labels = torch.cat(asked)
    assert labels.bincount().tolist() == (2 * digits.labels.bincount()).tolist()
    assert labels[:100].unique().numel() == 10  # not sorted by class


def test_default_number_of_samples(digits, evaluation):
    assert evaluation().count(None) == len(digits)


def test_same_seed_same_scores(digits, score):
    def sample(n, rng, labels):
        return to_float(resample(digits, labels, rng))

    assert score(sample, seed=5) == score(sample, seed=5)
    assert score(sample, seed=5) != score(sample, seed=6)


def test_samples_are_rounded_as_if_saved(digits, score):
    def sample(offset):
        return lambda n, rng, labels: to_float(resample(digits, labels, rng)) + offset / 127.5

    assert score(sample(0.4)) == score(sample(0.0))
    assert score(sample(0.6)) != score(sample(0.0))


def test_unconditional(digits, trained, real_features, score):
    def sample(n, rng):
        return torch.rand(n, 1, 28, 28, generator=rng) * 2 - 1

    scores = score(sample, n=300, conditional=False)
    assert scores.keys() == {"frechet"}
    # The reference is all of the data, and the samples are those of the seed.
    rng = torch.Generator().manual_seed(0)
    drawn = torch.cat([torch.rand(n, 1, 28, 28, generator=rng) for n in (256, 44)])
    rounded = (drawn * 255).round() / 127.5 - 1
    expected = frechet_distance(features(trained[0], rounded), real_features)
    assert scores["frechet"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda n, rng, labels: torch.full((n, 1, 28, 28), torch.nan), "must be finite"),
        (lambda n, rng, labels: torch.zeros(n + 1, 1, 28, 28), "must return 50 samples, got 51"),
        (lambda n, rng, labels: torch.zeros(n, 1, 8, 8), r"\(N, 1, 28, 28\)"),
    ],
)
def test_bad_samples_are_refused(score, sample, message):
    with pytest.raises(ValueError, match=message):
        score(sample, n=50)


def test_too_few_samples_are_refused(score):
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        score(lambda n, rng, labels: torch.zeros(n, 1, 28, 28), n=1)


def test_samples_that_a_metric_cannot_judge_are_refused(digits):
    words = Columns({"words": Tokens(("", "a"), 2)}, {"words": torch.ones(3, 2).long()}, "words")
    assert metrics.suitable(words, "words", ()) == []
    with pytest.raises(
        ValueError, match="metric 'frechet' must be of type Image, got of type Tokens"
    ):
        metrics.check(["frechet"], words, "words", ())
    with pytest.raises(
        ValueError, match="metric 'accuracy' must be of type Image made from Label, got of type I"
    ):
        metrics.check(["accuracy"], digits, "images", ())
    pictures = Columns(
        {"images": Image(1, 2, 2), "labels": Label(("a",))},
        {"images": torch.zeros(3, 1, 2, 2).byte(), "labels": torch.zeros(3).long()},
        "pictures",
    )
    with pytest.raises(ValueError, match="must be labeled images in memory, got Columns"):
        metrics.check(["frechet"], pictures, "images", ())


def test_names_are_looked_up():
    assert metrics.parse("accuracy, frechet,accuracy") == ["accuracy", "frechet"]
    with pytest.raises(ValueError, match="unknown metric 'frechet_'; did you mean 'frechet'"):
        metrics.parse("frechet_")
