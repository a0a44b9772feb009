"""Draws any number of images from a trained generator and saves them as a grid, files or an array.

Noise and images are passed on in parts, so that memory does not grow with their number (except for
a grid, which is one picture). Noise is drawn on the CPU, BLOCK rows at a time whatever the batch
size, so that a seed gives the same images on any device, and image i is the same however many are
drawn.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gankernels._files import fill_folder, write_atomically
from gankernels._paths import expand
from gankernels.data import to_uint8
from gankernels.data._pictures import to_picture
from gankernels.games import Game
from gankernels.train.checkpoint import list_classes

#: Rows of noise drawn at a time; with another number a seed would give other images.
BLOCK = 256
#: Characters that the name of a folder of images cannot have: separators, and a leading dot.
IMPOSSIBLE = r"^\.|[/\0\ud800-\udc7f\udd00-\udfff]"
#: Bytes of a folder's name, with room for a suffix that makes it unique; file systems allow 255.
LONGEST = 240


def draw(game: Game, count: int, seed: int, truncation: float | None = None) -> Iterator[Tensor]:
    """The noise of `count` images as parts `(n, latent_dim)`.

    Args:
        truncation: see `truncate`; None draws from the whole normal distribution.

    Raises:
        ValueError: the truncation is not above 0, or the seed does not fit into 64 bits.
    """
    check_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    for start in range(0, count, BLOCK):
        noise = game.noise(BLOCK, rng)[: count - start]
        yield noise if truncation is None else truncate(noise, truncation)


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that PyTorch's generators do not accept."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")


def truncate(noise: Tensor, threshold: float) -> Tensor:
    """Normal noise as noise of the normal distribution truncated to [-threshold, threshold].

    The truncation trick (Brock et al. 2019, arXiv:1809.11096): more typical images, less variety.
    There, values beyond the threshold are drawn again. Here each value is mapped to the same
    quantile of the truncated distribution, which gives the same distribution, and images that
    change gradually with the threshold.

    Raises:
        ValueError: the threshold is not above 0.
    """
    if not threshold > 0:
        raise ValueError(f"truncation must be above 0, got {threshold}")
    rank = torch.erf(noise.double() / math.sqrt(2)) * math.erf(threshold / math.sqrt(2))
    return (math.sqrt(2) * torch.erfinv(rank)).clamp(-threshold, threshold).to(noise.dtype)


def walk(
    game: Game,
    rows: int,
    columns: int,
    seeds: tuple[int, int],
    truncation: float | None = None,
) -> Iterator[Tensor]:
    """The noise of a grid whose row i goes from image i of one seed to image i of the other."""
    first, second = (draw(game, rows, seed, truncation) for seed in seeds)
    for start, end in zip(first, second, strict=True):
        yield slerp(start, end, columns).flatten(0, 1)


def slerp(start: Tensor, end: Tensor, count: int) -> Tensor:
    """Spherical interpolation of rows `(n, d)`, as `(n, count, d)` including both ends.

    Normal noise of many dimensions lies near a sphere. A straight line between two of its points
    passes through a region that a generator has never seen; the arc stays on the sphere.
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1)
    angle = cosine.clamp(-1, 1).acos()[:, None, None].double()
    t = torch.linspace(0, 1, count, dtype=torch.float64, device=start.device)[:, None]
    # If the two (nearly) coincide or are opposite, the arc is undefined, and a line is used.
    arc = angle.sin() > 1e-4
    sine = torch.where(arc, angle.sin(), 1.0)
    from_start = torch.where(arc, ((1 - t) * angle).sin() / sine, 1 - t)
    from_end = torch.where(arc, (t * angle).sin() / sine, t)
    return (from_start * start[:, None] + from_end * end[:, None]).to(start.dtype)


def generate(
    game: Game, noise: Iterable[Tensor], labels: Tensor | None, batch_size: int = BLOCK
) -> Iterator[Tensor]:
    """Images as parts of uint8 `(n, C, H, W)` on the CPU, `batch_size` of them at a time.

    Raises:
        ValueError: an argument that `Game.sample` does not accept.
    """
    done = 0
    for part in itertools.chain.from_iterable(block.split(batch_size) for block in noise):
        n = len(part)
        chosen = None if labels is None else labels[done : done + n]
        yield to_uint8(game.sample(n, batch_size=batch_size, noise=part, labels=chosen)).cpu()
        done += n


def parse_labels(text: str, classes: Sequence[str]) -> list[int]:
    """Classes by name or, if no name is a number, by index: `cat,dog` or `0,1`.

    A name with a comma must be in double quotes.

    Raises:
        ValueError: no such class; the message lists the classes.
    """
    index = {name: i for i, name in enumerate(classes)}
    if text in index:
        return [index[text]]
    if not any(re.fullmatch("[+-]?[0-9]+", name) for name in classes):
        index = {str(i): i for i in range(len(classes))} | index
    try:
        names = next(csv.reader([text], skipinitialspace=True), []) or [""]
    except csv.Error as error:
        raise ValueError(f"labels must be names like cat,dog, got {text!r}: {error}") from error
    labels = []
    for name in names:
        label = index.get(name, index.get(name.strip()))
        if label is None:
            raise ValueError(f"labels must be among {list_classes(classes)}, got {name!r}")
        labels.append(label)
    return labels


def _is_number(name: str) -> bool:
    return re.fullmatch("-?(0|[1-9][0-9]{0,17})", name) is not None


def values_of(classes: Sequence[str]) -> np.ndarray:
    """The value of each class in an array of labels: numbers if all names are numbers, else names.

    Sorting the values gives the order of the classes, if these are in the order of
    `gankernels.data.load`: numeric for numbers, else alphabetical.
    """
    if all(map(_is_number, classes)):
        numbers = np.array([int(name) for name in classes], dtype=np.int64)
        if (np.diff(numbers) > 0).all():
            return numbers
    return np.array(classes, dtype=np.str_)


def save_npz(
    images: Iterable[Tensor],
    labels: Tensor,
    path: str | Path,
    classes: Sequence[str] | None = None,
) -> None:
    """Write an .npz that `gankernels.data.load` reads.

    It has `images`, uint8 `(N, H, W)` or, in color, `(N, H, W, C)`, and `labels` `(N,)`: int64
    or, if `classes` are given whose names are not numbers, these names.
    """
    path = expand(path)
    values = labels.numpy() if classes is None else values_of(classes)[labels.numpy()]
    images = iter(images)
    first = next(images)
    shape = tuple(_channels_last(first).shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}

    def write(file: BinaryIO) -> None:
        # numpy.savez needs the whole array at once.
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("images.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for part in itertools.chain([first], images):
                    entry.write(_channels_last(part).contiguous().numpy().tobytes())
            with archive.open("labels.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values)

    write_atomically(path, write)


def save_folder(
    images: Iterable[Tensor],
    labels: Tensor | None,
    path: str | Path,
    classes: Sequence[str] | None = None,
    count: int = 0,
) -> None:
    """Write one PNG per image: `000000.png`, ..., in a subfolder per label if there are labels.

    The folder appears when it is complete.

    Args:
        classes: the names of the subfolders; with None they are numbers of one width. A name that
            no folder can have, or that is hidden, is escaped by `folder_names`.
        count: the number of images, so that their names are of one width.

    Raises:
        ValueError: the path of the folder already exists.
    """
    width = max(6, len(str(count - 1)))
    if labels is not None and classes is None:
        digits = len(str(int(labels.max())))  # 02 and 10 sort as they should
        names = [f"{i:0{digits}}" for i in range(int(labels.max()) + 1)]
    else:
        names = folder_names(classes or ())
    with fill_folder(expand(path)) as whole:
        for i, image in enumerate(itertools.chain.from_iterable(images)):
            folder = whole
            if labels is not None:
                folder = whole / names[int(labels[i])]
                folder.mkdir(exist_ok=True)
            to_picture(image).save(folder / f"{i:0{width}d}.png")


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder name for each class: the class's own name if possible.

    Impossible characters (a slash, a leading dot) are escaped as in a URL: `a%2Fb`.
    """
    names: dict[str, None] = {}
    own = set(classes)
    for name in classes:
        safe = re.sub(IMPOSSIBLE, lambda found: f"%{ord(found[0]):02X}", name) or "%"
        while len(os.fsencode(safe)) > LONGEST:
            safe = safe[:-1]
        free = (safe if n == 1 else f"{safe}~{n}" for n in itertools.count(1))
        names[next(x for x in free if x == name or (x not in names and x not in own))] = None
    return list(names)


def _channels_last(images: Tensor) -> Tensor:
    """`(N, C, H, W)` as `(N, H, W)` if C is 1, else as `(N, H, W, C)`."""
    return images.squeeze(1) if images.shape[1] == 1 else images.permute(0, 2, 3, 1)
