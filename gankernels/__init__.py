"""GAN layers and penalties as fused kernels that stay fast through the second derivative."""

from pathlib import Path

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise ImportError(
        f"gankernels needs torch >= 2.10, but {torch.__version__} is installed in "
        f"{Path(torch.__file__).parent.parent}"
    )

from gankernels import functional, nn, optim
from gankernels._library import build_info, use_backend
from gankernels._version import __version__
from gankernels.allocator import tune_allocator
from gankernels.fuse import fuse, unfuse

__all__ = [
    "__version__",
    "build_info",
    "functional",
    "fuse",
    "nn",
    "optim",
    "tune_allocator",
    "unfuse",
    "use_backend",
]
