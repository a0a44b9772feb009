import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gankernels.metrics import frechet_distance, within_class_diversity


def gaussian(n, f, seed, scale=1.0, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(f, f, generator=rng, dtype=torch.float64)
    return torch.randn(n, f, generator=rng, dtype=torch.float64) @ mix * scale + shift


def by_definition(a, b):
    a, b = a.numpy(), b.numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    means = a.mean(0) - b.mean(0)
    return means @ means + np.trace(cov_a + cov_b - 2 * root.real)


@settings(max_examples=25, deadline=None)
@given(f=st.integers(2, 40), seed=st.integers(0, 1000), shift=st.floats(-3, 3))
def test_frechet_distance_is_that_of_sqrtm(f, seed, shift):
    a, b = gaussian(3 * f + 5, f, seed), gaussian(4 * f + 3, f, seed + 1, scale=0.7, shift=shift)
    expected = by_definition(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_commuting_gaussians_in_closed_form():
    # White noise made exactly white, so that the covariances are exactly s^2 I and t^2 I.
    x = gaussian(200, 8, 0)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
    for s, t, shift in ((1.0, 1.0, 0.5), (3.0, 0.5, 0.0), (2.0, 0.0, 1.5)):
        expected = 8 * (s - t) ** 2 + 8 * shift**2
        assert frechet_distance(s * x, t * x + shift) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_one_feature_in_closed_form():
    a = torch.tensor([[0.0], [2.0], [4.0]])  # mean 2, variance 4
    b = torch.tensor([[4.0], [5.0], [6.0]])  # mean 5, variance 1
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 1) ** 2)


def test_frechet_distance_of_equal_sets_is_zero():
    # Float32 features with a large common mean and duplicated columns: a singular covariance,
    # where a matrix root of rounded products would be off by its square root.
    x = gaussian(500, 16, 1).float()
    x = torch.cat([x, x, torch.ones(500, 3)], dim=1) + 100
    assert 0 <= frechet_distance(x, x) < 1e-9
    assert 0 <= frechet_distance(x, x[torch.randperm(500)]) < 1e-9


def test_frechet_distance_with_fewer_images_than_features():
    # Rank one against rank one: |m|^2 + tr A + tr B - 2 |u.v|, with A = uu^T, B = vv^T.
    a = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])
    b = torch.tensor([[3.0, 4, 0], [-3.0, -4, 0]])
    assert frechet_distance(a, b) == pytest.approx(2 + 50 - 2 * 6, rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), r"a must be \(N, F\) with N >= 2, got \(1, 3\)"),
        (torch.zeros(5, 3), torch.zeros(5), r"b must be \(N, F\)"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "as many features, got 3 and 4"),
        (torch.full((5, 3), torch.nan), torch.zeros(5, 3), "a holds values that are not finite"),
    ],
)
def test_frechet_distance_checks(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_diversity_is_the_mean_pairwise_distance():
    features = gaussian(700, 6, 2).float()
    labels = torch.randint(0, 2, (700,), generator=torch.Generator().manual_seed(0)) * 2
    labels[-1] = 3
    result = within_class_diversity(features, labels, 5)
    for label in (0, 2):
        expected = torch.pdist(features[labels == label].double()).mean()
        torch.testing.assert_close(result[label], expected)
    assert result[[1, 3, 4]].isnan().all()  # none, one, none


def test_diversity_of_a_collapsed_class_is_zero():
    features = torch.full((100, 64), 123.456)
    features[50:] += 1e-4 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    result = within_class_diversity(features, torch.arange(100) // 50, 2)
    assert result[0] == 0
    assert 1e-4 < result[1] < 1e-2


def test_diversity_checks():
    with pytest.raises(ValueError, match=r"got \(4, 2\) and \(3,\)"):
        within_class_diversity(torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64), 2)
