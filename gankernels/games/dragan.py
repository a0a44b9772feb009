"""DRAGAN: a GAN whose discriminator is kept smooth around the data (Kodali et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from gankernels.games import option
from gankernels.games.gan import GAN, GANOptions


@dataclass(frozen=True)
class DRAGANOptions(GANOptions):
    lr: float = option(1e-4, "learning rate of the generator")
    d_lr: float = option(1e-4, "learning rate of the discriminator")
    beta2: float = option(0.9, "Adam's beta2")
    penalty: str | None = option("dragan", "penalty on the discriminator's gradient")


class DRAGAN(GAN):
    """Dense GAN with a gradient penalty around the data (convolutional: dcgan, penalty=dragan)."""

    Options = DRAGANOptions
