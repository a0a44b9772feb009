import pytest
import torch

from gankernels.data import to_float
from gankernels.metrics import evaluate, features, frechet_distance


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


@pytest.fixture
def score(digits, trained, real_features):
    def run(sample_fn, conditional=True, n=800, **options):
        options.setdefault("real_features", real_features)
        return evaluate(sample_fn, digits, trained[0], n=n, conditional=conditional, **options)

    return run


def test_real_images_score_as_real(digits, trained, score):
    scores = score(lambda labels, n, rng: to_float(resample(digits, labels, rng)))
    assert scores.n == 800
    assert scores.classifier_accuracy == trained[1]
    assert scores.accuracy > 0.99
    assert 0.93 < scores.diversity_ratio < 1.07
    assert scores.frechet < 0.3


def test_noise_scores_far_from_real(digits, score):
    def noise(labels, n, rng):
        return torch.rand(n, 1, 28, 28, generator=rng) * 2 - 1

    scores = score(noise)
    assert scores.accuracy < 0.2
    assert scores.frechet > 20


def test_wrong_labels_are_noticed(digits, score):
    # Perfect images of the next class: only the accuracy can tell.
    scores = score(lambda labels, n, rng: to_float(resample(digits, (labels + 1) % 10, rng)))
    assert scores.accuracy < 0.02
    assert scores.frechet < 0.3


def test_collapse_is_noticed(digits, score):
    # One perfect image per class: only the diversity and the distance can tell.
    first = torch.stack([digits.images[digits.labels == k][0] for k in range(10)])
    collapsed = score(lambda labels, n, rng: to_float(first[labels]))
    assert collapsed.accuracy > 0.99
    assert collapsed.diversity_ratio == 0
    healthy = score(lambda labels, n, rng: to_float(resample(digits, labels, rng)))
    assert collapsed.frechet > 5 * healthy.frechet


def test_samples_come_in_batches_with_labels_in_proportion(digits, score):
    asked = []

    def record(labels, n, rng):
        assert labels.shape == (n,)
        asked.append(labels)
        return torch.zeros(n, 1, 28, 28)

    score(record, n=2 * len(digits))
    assert max(map(len, asked)) <= 256
    labels = torch.cat(asked)
    assert labels.bincount().tolist() == (2 * digits.labels.bincount()).tolist()
    assert labels[:100].unique().numel() == 10  # not sorted by class


def test_default_number_of_samples(digits, score):
    assert score(lambda labels, n, rng: torch.zeros(n, 1, 28, 28), n=None).n == len(digits)


def test_same_seed_same_scores(digits, score):
    def sample(labels, n, rng):
        return to_float(resample(digits, labels, rng))

    assert score(sample, seed=5) == score(sample, seed=5)
    assert score(sample, seed=5) != score(sample, seed=6)


def test_samples_are_rounded_as_if_saved(digits, score):
    def sample(offset):
        return lambda labels, n, rng: to_float(resample(digits, labels, rng)) + offset / 127.5

    assert score(sample(0.4)) == score(sample(0.0))
    assert score(sample(0.6)) != score(sample(0.0))


def test_unconditional(digits, trained, real_features):
    def sample(labels, n, rng):
        assert labels is None
        return torch.rand(n, 1, 28, 28, generator=rng) * 2 - 1

    scores = evaluate(sample, digits, trained[0], n=300, conditional=False)
    assert scores.accuracy is None
    assert scores.diversity_ratio is None
    # The reference is all of the data, and the samples are those of the seed.
    rng = torch.Generator().manual_seed(0)
    drawn = torch.cat([torch.rand(n, 1, 28, 28, generator=rng) for n in (256, 44)])
    rounded = (drawn * 255).round() / 127.5 - 1
    expected = frechet_distance(features(trained[0], rounded), real_features)
    assert scores.frechet == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("sample_fn", "message"),
    [
        (lambda labels, n, rng: torch.full((n, 1, 28, 28), torch.nan), "not finite"),
        (lambda labels, n, rng: torch.zeros(n + 1, 1, 28, 28), "returned 51 images where 50"),
        (lambda labels, n, rng: torch.zeros(n, 1, 8, 8), r"\(N, 1, 28, 28\)"),
    ],
)
def test_bad_samples_are_refused(score, sample_fn, message):
    with pytest.raises(ValueError, match=message):
        score(sample_fn, n=50)


def test_too_few_samples_are_refused(score):
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        score(lambda labels, n, rng: torch.zeros(n, 1, 28, 28), n=1)
