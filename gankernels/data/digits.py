"""The 1,797 handwritten digits that come with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gankernels._options import option
from gankernels.data._columns import Data
from gankernels.data._images import ImageOptions, image_data, numbered
from gankernels.data._kind import Kind


@dataclass(frozen=True)
class DigitsOptions(ImageOptions):
    # MNIST's size, for which the small networks are designed.
    size: int | None = option(28, "resize images to size x size (none: 8, as stored)")


class Digits(Kind):
    Options = DigitsOptions
    accepted = "'digits'"
    names = ("digits",)

    @classmethod
    def open(cls, source: str, options: DigitsOptions, name: str) -> Data:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "the digits data set comes with scikit-learn: pip install gankernels[train]"
            ) from error
        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
        images = torch.from_numpy(pixels).unsqueeze(1)
        return image_data(images, *numbered(digits.target), source, options, name)
