"""Sample grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from gankernels.data._pictures import arrange, make_grid, save_grid


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_images_in_rows(tmp_path, channels):
    images = torch.randint(256, (5, channels, 4, 6), dtype=torch.uint8)
    grid = make_grid(images, columns=3, padding=2)
    assert grid.shape == (channels, 2 * 6 + 2, 3 * 8 + 2)
    outside = torch.ones_like(grid, dtype=torch.bool)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        place = (
            slice(None),
            slice(row * 6 + 2, row * 6 + 6),
            slice(column * 8 + 2, column * 8 + 8),
        )
        assert torch.equal(grid[place], image)
        outside[place] = False
    assert not grid[outside].any()


@pytest.mark.parametrize(("channels", "shape"), [(1, (12, 12)), (3, (12, 12, 3))])
def test_saved_grid_has_the_pixels(tmp_path, channels, shape):
    images = torch.tensor([-1.0, -0.5, 0.0, 1.0])[:, None, None, None].expand(-1, channels, 3, 3)
    save_grid(images, tmp_path / "new" / "grid.png", columns=2)
    pixels = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert pixels.shape == shape
    assert set(np.unique(pixels)) == {0, 64, 128, 255}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("count", "labels", "columns"),
    [
        (64, None, 8),
        (1, None, 1),
        (64, list(range(10)), 10),
        (64, [0, 1, 2], 6),
        (100, [4], 10),
        (64, list(range(100)), 8),
    ],
)
def test_arrangement(count, labels, columns):
    cycled, found = arrange(count, labels)
    assert found == columns
    if labels is None:
        assert cycled is None
    else:
        assert cycled.tolist() == [labels[i % len(labels)] for i in range(count)]
