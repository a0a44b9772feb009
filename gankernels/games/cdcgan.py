"""Convolutional conditional GAN: DCGAN with one-hot labels as further inputs."""

from __future__ import annotations

from gankernels.games.dcgan import DCGAN


class CDCGAN(DCGAN):
    """Convolutional conditional GAN: one-hot labels join the noise and, as planes, the image."""

    conditional = True
