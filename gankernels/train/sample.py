"""Any number of images from a trained generator: noise in, a grid, single files or an array out.

Noise and images go from one function to the next in parts, so that memory does not grow with
their number (but for a grid, which is one picture). Noise is drawn on the CPU, BLOCK rows at a
time whatever the batch size, so that a seed means the same images on any device and image i is
the same however many are drawn.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gankernels.data import to_uint8
from gankernels.games import Game
from gankernels.train.files import write_atomically
from gankernels.train.images import to_picture

#: Rows of noise drawn at a time; with another number a seed would mean other images.
BLOCK = 256


def draw(game: Game, count: int, seed: int, truncation: float | None = None) -> Iterator[Tensor]:
    """The noise of `count` images as parts `(n, latent_dim)`.

    Args:
        truncation: see `truncate`; None draws from the whole normal distribution.

    Raises:
        ValueError: a truncation that is not above 0, or a seed that no generator takes.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    rng = torch.Generator().manual_seed(seed)
    for start in range(0, count, BLOCK):
        noise = game.noise(BLOCK, rng)[: count - start]
        yield noise if truncation is None else truncate(noise, truncation)


def truncate(noise: Tensor, threshold: float) -> Tensor:
    """Normal noise as noise of the normal distribution truncated to [-threshold, threshold].

    The truncation trick (Brock et al. 2019, arXiv:1809.11096): more typical images, less variety.
    There, values beyond the threshold are drawn again; here each is mapped to the value of the
    same rank under the truncated distribution, which gives that very distribution, and images
    that change gradually with the threshold instead of being others.

    Raises:
        ValueError: a threshold that is not above 0.
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
    """The noise of a grid whose row i goes from image i of the first seed to that of the second."""
    first, second = (draw(game, rows, seed, truncation) for seed in seeds)
    for start, end in zip(first, second, strict=True):
        yield slerp(start, end, columns).flatten(0, 1)


def slerp(start: Tensor, end: Tensor, count: int) -> Tensor:
    """Spherical interpolation of rows `(n, d)`, as `(n, count, d)` with both ends in it.

    Normal noise of many dimensions lies near a sphere. A straight line between two points of it
    leaves the sphere for a middle that a generator has never seen; this walk stays on it.
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1)
    angle = cosine.clamp(-1, 1).acos()[:, None, None].double()
    t = torch.linspace(0, 1, count, dtype=torch.float64, device=start.device)[:, None]
    # Where the two (nearly) coincide or oppose each other there is no arc, and a line will do.
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
        ValueError: what `Game.sample` does not take.
    """
    done = 0
    for part in itertools.chain.from_iterable(block.split(batch_size) for block in noise):
        n = len(part)
        chosen = None if labels is None else labels[done : done + n]
        yield to_uint8(game.sample(n, batch_size=batch_size, noise=part, labels=chosen)).cpu()
        done += n


def save_npz(images: Iterable[Tensor], labels: Tensor, path: str | Path) -> None:
    """Write what `gankernels.data.load` reads.

    That is `images`, uint8 `(N, H, W)` or, of colour, `(N, H, W, C)`, and `labels`, int64 `(N,)`.
    """
    images = iter(images)
    first = next(images)
    shape = tuple(_channels_last(first).shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}

    def write(file) -> None:
        # numpy's own savez wants the whole array at once.
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("images.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for part in itertools.chain([first], images):
                    entry.write(_channels_last(part).contiguous().numpy().tobytes())
            with archive.open("labels.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, labels.numpy())

    write_atomically(Path(path), write)


def save_folder(images: Iterable[Tensor], labels: Tensor | None, path: str | Path) -> None:
    """Write one PNG per image: `000000.png`, ..., in a subfolder for every label there is.

    The folder appears when it is complete.

    Raises:
        ValueError: something lies where the folder is to be.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already: samples go into a new or an empty folder")
    temporary = path.with_name(f".{path.name}.tmp")
    digits = 1 if labels is None else len(str(int(labels.max())))  # 02 and 10 sort as they should
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for i, image in enumerate(itertools.chain.from_iterable(images)):
            folder = temporary
            if labels is not None:
                folder = temporary / f"{int(labels[i]):0{digits}}"
                folder.mkdir(exist_ok=True)
            to_picture(image).save(folder / f"{i:06d}.png")
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _channels_last(images: Tensor) -> Tensor:
    """`(N, C, H, W)` as `(N, H, W)` where C is 1, else as `(N, H, W, C)`."""
    return images.squeeze(1) if images.shape[1] == 1 else images.permute(0, 2, 3, 1)
