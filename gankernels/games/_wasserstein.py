"""The common base of the Wasserstein GANs."""

from __future__ import annotations

from torch import Tensor, nn

from gankernels import networks
from gankernels.games._adversarial import Adversarial, AdversarialOptions
from gankernels.games._round import Round


class Wasserstein(Adversarial):
    """Dense networks, and losses that are means of the critic's outputs."""

    options: AdversarialOptions

    def make_generator(self) -> nn.Module:
        return networks.MLPGenerator(self.options.latent_dim, self.spec.image_shape)

    def make_discriminator(self) -> nn.Module:
        return networks.MLPDiscriminator(self.spec.image_shape)

    def discriminator_loss(self, round: Round) -> dict[str, Tensor]:
        # Minus the estimated Wasserstein distance, up to the critic's Lipschitz constant.
        return {"wasserstein": round.fake.mean() - round.real.mean()}

    def generator_loss(self, round: Round) -> dict[str, Tensor]:
        return {"adversarial": -round.fake.mean()}
