"""GAN layers and penalties as fused kernels that stay fast through the second derivative."""

from gankernels import functional, nn
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
    "tune_allocator",
    "unfuse",
    "use_backend",
]
