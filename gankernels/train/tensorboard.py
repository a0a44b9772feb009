"""Event files for TensorBoard."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from torch import Tensor

from gankernels._paths import expand
from gankernels.data._pillow import open_image


class TensorBoard:
    """Writes event files into a folder for `tensorboard --logdir`.

    Args:
        folder: created if it does not exist.
        step: the step that the run continues from, 0 for a new one. Later entries of a killed run
            are no longer shown.

    Raises:
        ImportError: tensorboard is not installed; see `available`.
    """

    def __init__(self, folder: str | Path, step: int = 0) -> None:
        try:  # not at the top of this file: the import takes a fifth of a second and more
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"logs for TensorBoard need tensorboard: pip install gankernels[train] ({error})"
            ) from error
        # Entries from purge_step on are hidden; `step` itself stays, as in metrics.jsonl.
        self._writer = SummaryWriter(str(expand(folder)), purge_step=step + 1)

    @staticmethod
    def available() -> bool:
        """Whether tensorboard is installed."""
        return importlib.util.find_spec("tensorboard") is not None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a point to every curve; names with the same part before a "/" share a section."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, picture: str | Path | Tensor, name: str = "samples") -> None:
        """Add a picture: a PNG file, or uint8 `(C, H, W)` with C 1 or 3.

        Raises TypeError or ValueError for another tensor.
        """
        if isinstance(picture, Tensor):
            if picture.dim() != 3 or picture.shape[0] not in (1, 3):
                raise ValueError(
                    f"picture must be (C, H, W) with C 1 or 3, got {tuple(picture.shape)}"
                )
            if str(picture.dtype) != "torch.uint8":
                raise TypeError(f"picture must be torch.uint8, got {picture.dtype}")
            pixels = picture.permute(1, 2, 0).cpu().numpy()
        else:
            with open_image(picture) as opened:
                pixels = np.asarray(opened.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()  # images are rare, so this costs little and shows all curves up to one

    def text(self, step: int, lines: str, name: str = "samples") -> None:
        """Add lines of text, without formatting."""
        indented = "".join(f"    {line}\n" for line in lines.splitlines())  # a block of Markdown
        self._writer.add_text(name, indented, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
