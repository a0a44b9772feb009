"""Noise, interpolation, and saved images."""

import math

import numpy as np
import pytest
import torch

from gankernels import data, games
from gankernels.games import DataSpec
from gankernels.train import sample
from gankernels.train.sample import BLOCK, draw, generate, slerp, truncate, walk


@pytest.fixture
def game():
    """`game(name, spec)`: a generator with fresh weights whose images fill the range."""

    def make(name="cgan", spec=None):
        torch.manual_seed(0)
        spec = spec or DataSpec(1, 8, 3)
        made = games.get(name)(spec).eval()
        with torch.no_grad():
            for parameter in made.generator.parameters():
                parameter.mul_(2)
        return made

    return make


def whole(parts):
    return torch.cat(list(parts))


def test_noise_is_the_same_however_much_is_drawn(game):
    game = game()
    many = whole(draw(game, 2 * BLOCK + 7, seed=3))
    assert many.shape == (2 * BLOCK + 7, 100)
    for count in (1, 9, BLOCK, BLOCK + 1):
        assert torch.equal(whole(draw(game, count, seed=3)), many[:count])
    assert not torch.equal(whole(draw(game, 9, seed=4)), many[:9])
    assert len(many.unique(dim=0)) == len(many)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_images_do_not_depend_on_the_batch_size(game, batch_size):
    game = game()
    labels = torch.arange(BLOCK + 9) % 3
    expected = whole(generate(game, draw(game, len(labels), 0), labels)).int()
    images = list(generate(game, draw(game, len(labels), 0), labels, batch_size))
    assert max(map(len, images)) <= batch_size
    # A level may round the other way where a matrix product of another size adds in another order.
    assert (whole(images).int() - expected).abs().max() <= 1
    assert expected.float().std() > 10


def test_every_image_has_its_label(game):
    game = game()
    labels = torch.tensor([2, 0, 1] * 100)
    images = whole(generate(game, draw(game, 300, 5), labels, 64))
    noise = whole(draw(game, 300, 5))
    for i in (0, 1, 65, 299):
        alone = data.to_uint8(game.sample(1, labels=labels[i : i + 1], noise=noise[i : i + 1]))
        assert (images[i].int() - alone[0].int()).abs().max() <= 1


def test_truncated_noise_has_the_truncated_distribution(game):
    from scipy.stats import kstest, truncnorm

    for threshold in (0.1, 1.0, 2.0):
        noise = whole(draw(game(), 200, 0, threshold)).flatten()
        assert noise.abs().max() <= threshold
        fit = kstest(noise.double().numpy(), truncnorm(-threshold, threshold).cdf)
        assert fit.statistic < 0.012  # 20,000 values; a scaled normal is at .03 and more


def test_truncation_moves_noise_gradually():
    noise = torch.randn(50, 100)
    assert (truncate(noise, 1.01) - truncate(noise, 1.0)).abs().max() < 0.02
    torch.testing.assert_close(truncate(noise, 50.0), noise, rtol=1e-4, atol=1e-5)
    assert torch.equal(truncate(noise, 0.5).sign(), noise.sign())
    assert truncate(torch.tensor([20.0, -20.0]), 9.0).tolist() == [9.0, -9.0]


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_wrong_truncation(threshold):
    with pytest.raises(ValueError, match="truncation must be above 0, got"):
        truncate(torch.zeros(1), threshold)


def test_slerp_stays_on_the_sphere_at_even_angles():
    start, end = torch.randn(2, 5, 100).unbind()
    start, end = (10 * z / z.norm(dim=1, keepdim=True) for z in (start, end))
    path = slerp(start, end, 7)
    assert path.shape == (5, 7, 100)
    torch.testing.assert_close(path[:, 0], start)
    torch.testing.assert_close(path[:, -1], end)
    torch.testing.assert_close(path.norm(dim=2), torch.full((5, 7), 10.0))
    angles = torch.cosine_similarity(path[:, 1:], path[:, :-1], dim=2).double().acos()
    torch.testing.assert_close(angles, angles[:, :1].expand(-1, 6), rtol=1e-3, atol=0)


def test_slerp_of_what_coincides():
    z = torch.randn(3, 10)
    torch.testing.assert_close(slerp(z, z, 4), z[:, None].expand(-1, 4, -1))
    assert slerp(z, -z, 5).isfinite().all()
    assert torch.equal(slerp(z, 2 * z, 1)[:, 0], z)


def test_a_walk_leads_from_the_images_of_one_seed_to_those_of_the_other(game):
    game = game()
    rows = BLOCK + 2
    noise = whole(walk(game, rows, 4, (1, 2))).unflatten(0, (rows, 4))
    torch.testing.assert_close(noise[:, 0], whole(draw(game, rows, 1)))
    torch.testing.assert_close(noise[:, -1], whole(draw(game, rows, 2)))


@pytest.mark.parametrize(("name", "channels"), [("cgan", 1), ("cgan", 3), ("gan", 1)])
def test_npz_is_what_load_reads(game, tmp_path, name, channels):
    game = game(name, DataSpec(channels, 8, 3))
    labels = torch.arange(20) % 3 if game.conditional else torch.zeros(20).long()
    condition = labels if game.conditional else None
    parts = list(generate(game, draw(game, 20, 0), condition, batch_size=8))
    sample.save_npz(iter(parts), labels, tmp_path / "new/set.npz")
    with np.load(tmp_path / "new/set.npz") as archive:
        assert archive["images"].shape == ((20, 8, 8) if channels == 1 else (20, 8, 8, 3))
        assert (archive["images"].dtype, archive["labels"].dtype) == (np.uint8, np.int64)
    read = data.load(tmp_path / "new/set.npz")
    assert torch.equal(read.images, torch.cat(parts))
    assert torch.equal(read.labels, labels)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["set.npz"]


def test_folders_by_class_are_what_load_reads(game, tmp_path):
    game = game(spec=DataSpec(3, 8, 12))
    labels = torch.arange(30) % 12
    images = whole(generate(game, draw(game, 30, 0), labels))
    sample.save_folder(iter([images[:9], images[9:]]), labels, tmp_path / "set")
    read = data.load(tmp_path / "set")
    assert read.classes == tuple(f"{i:02}" for i in range(12))
    order = labels.argsort(stable=True)
    assert torch.equal(read.labels, labels[order])
    assert torch.equal(read.images, images[order])
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_folder_without_classes(game, tmp_path):
    from PIL import Image

    images = torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8)
    (tmp_path / "set").mkdir()  # empty: may be there
    sample.save_folder([images], None, tmp_path / "set")
    names = sorted(p.name for p in (tmp_path / "set").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]
    assert np.array_equal(Image.open(tmp_path / "set/000002.png"), images[2, 0])


def test_a_folder_is_complete_or_not_there(tmp_path):
    def images():
        yield torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        sample.save_folder(images(), None, tmp_path / "set")
    with pytest.raises(ValueError, match="no more"):
        sample.save_npz(images(), torch.zeros(9).long(), tmp_path / "set.npz")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_mixed_with_what_is_there(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine.png").touch()
    (tmp_path / "file").touch()
    for name in ("set", "file"):
        with pytest.raises(ValueError, match=f"{name} already exists"):
            sample.save_folder([], None, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "set"]


def test_a_seed_that_is_none(game):
    with pytest.raises(ValueError, match="seed must fit into 64 bits"):
        whole(draw(game(), 1, 2**64))


def test_labels_by_name_or_index():
    animals = ("cat", "dog", "big owl", "a,b")
    assert sample.parse_labels("dog, cat", animals) == [1, 0]
    assert sample.parse_labels("2,big owl,0", animals) == [2, 2, 0]
    assert sample.parse_labels("a,b", animals) == [3]
    assert sample.parse_labels('cat,"a,b"', animals) == [0, 3]
    # Where classes are called by numbers, numbers are names.
    assert sample.parse_labels("5,1", ("1", "2", "5")) == [2, 0]
    assert sample.parse_labels("10,2", ("0", "1", "10", "2")) == [2, 3]
    for text, classes in (("0", ("1", "2")), ("1", ("01", "02")), ("4", animals), ("", animals)):
        with pytest.raises(ValueError, match=f"labels must be among {', '.join(classes)}, got "):
            sample.parse_labels(text, classes)
    with pytest.raises(ValueError, match="labels must be"):
        sample.parse_labels("a\nb", animals)


@pytest.mark.parametrize(
    "classes",
    [
        ("1", "2", "5"),
        ("-3", "2", "10"),
        tuple(sorted(map(str, range(12)))),
        ("", "01", "cat", "dog.x", "ü"),
        ("00", "01"),
        (str(2**64), "9"),
    ],
)
def test_labels_of_an_npz_are_the_data_s(tmp_path, classes):
    labels = torch.arange(30) % len(classes)
    images = torch.randint(256, (30, 1, 4, 4), dtype=torch.uint8)
    sample.save_npz([images], labels, tmp_path / "set.npz", classes)
    read = data.load(tmp_path / "set.npz")
    assert read.classes == classes
    assert torch.equal(read.labels, labels)
    with np.load(tmp_path / "set.npz") as archive:
        numbers = classes in (("1", "2", "5"), ("-3", "2", "10"))
        assert archive["labels"].dtype.kind == ("i" if numbers else "U")


def test_folders_are_called_as_the_classes_are(tmp_path):
    classes = tuple(sorted(map(str, range(12))))
    labels = torch.arange(24) % 12
    images = torch.randint(256, (24, 1, 4, 4), dtype=torch.uint8)
    sample.save_folder([images], labels, tmp_path / "set", classes, 24)
    read = data.load(tmp_path / "set")
    assert read.classes == classes
    assert torch.equal(read.images, images[labels.argsort(stable=True)])


def test_names_that_no_folder_can_have(tmp_path):
    classes = (
        "..",
        ".",
        "",
        "a/b",
        "a%2Fb",
        "/etc",
        ".x",
        "A",
        "a",
        "x" * 300,
        "x" * 301,
        "\0",
        "é",
    )
    names = sample.folder_names(classes)
    assert len(set(names)) == len(classes)
    assert names[:9] == ["%2E.", "%2E", "%", "a%2Fb~2", "a%2Fb", "%2Fetc", "%2Ex", "A", "a"]
    assert names[-1] == "é"
    images = torch.zeros(len(classes), 1, 4, 4, dtype=torch.uint8)
    sample.save_folder([images], torch.arange(len(classes)), tmp_path / "set", classes)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == sorted(names)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_pictures_sort_however_many_there_are(tmp_path):
    images = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    sample.save_folder([images], None, tmp_path / "set", count=10_000_000)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["0000000.png", "0000001.png"]
