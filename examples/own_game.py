"""A GAN of one's own on the trainer: the hinge loss, and a callback that stops a lost game.

Everything else comes with the trainer: checkpoints and resuming, half precision, a penalty or
minibatch discrimination (options of every Adversarial game), sample grids, logs.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankernels import data, networks, optim
from gankernels.games import Adversarial, AdversarialOptions, Player, Round
from gankernels.train import Callback, Config, Trainer


class HingeGAN(Adversarial):
    """Dense GAN with the hinge loss (Lim & Ye 2017, arXiv:1705.02894)."""

    def make_generator(self) -> nn.Module:
        return networks.MLPGenerator(self.options.latent_dim, self.spec.image_shape)

    def make_discriminator(self) -> nn.Module:
        return networks.MLPDiscriminator(self.spec.image_shape)

    def players(self) -> list[Player]:
        adam = partial(optim.Adam, lr=2e-4, betas=(0.5, 0.999))
        return [self.discriminator_player(adam), self.generator_player(adam)]

    def discriminator_loss(self, round: Round) -> dict[str, Tensor]:
        return {"real": F.relu(1 - round.real).mean(), "fake": F.relu(1 + round.fake).mean()}

    def generator_loss(self, round: Round) -> dict[str, Tensor]:
        return {"adversarial": -round.fake.mean()}


class StopWhenLost(Callback):
    """Ends a run in which the discriminator has nothing left to learn from."""

    def on_report(self, trainer: Trainer, values: dict[str, float]) -> None:
        if values.get("discriminator/real", 1) + values.get("discriminator/fake", 1) < 1e-3:
            trainer.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", default="runs/hinge")
    arguments = parser.parse_args()

    digits = data.load("digits", size=28)
    torch.manual_seed(0)
    game = HingeGAN(
        digits.spec,
        AdversarialOptions(penalty="r1", penalty_weight=1.0, penalty_every=16),
    )
    config = Config(out=arguments.out, steps=arguments.steps, batch_size=arguments.batch)
    trainer = Trainer(game, digits, config, callbacks=[StopWhenLost()])
    trainer.fit()
    print(f"{trainer.run / 'samples.png'} shows samples at step {trainer.step}")


if __name__ == "__main__":
    main()
