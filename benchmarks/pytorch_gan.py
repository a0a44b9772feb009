"""PyTorch-GAN's cgan, dcgan and wgan_gp for MNIST: networks and training loops.

The baseline of training.py, written afresh from the configurations of those scripts. Kept as they
are: eager float32 and contiguous, batches of 64, `num_workers=0` and an image through Pillow for
every sample, noise from numpy, gradients for networks that do not move, `.item()` and a line of
output at every step, and 0.8 passed as batch norm's eps where its momentum was meant. Left out: a
picture of samples every 400 batches, and the last batch of an epoch where it is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gankernels.data import ImageData, to_float
from gankernels.data._pixels import resize

LATENT = 100
CLASSES = 10
BATCH = 64
SLOPE = 0.2
EPS = 0.8
N_CRITIC = 5
PENALTY_WEIGHT = 10
LR = 2e-4
BETAS = (0.5, 0.999)

# ---- networks ----------------------------------------------------------------------------------


class DenseGenerator(nn.Module):
    """128, then 256, 512 and 1024 with batch norm; with `classes`, embedded labels are joined."""

    def __init__(self, size: int, classes: int = 0) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(classes, classes) if classes else None
        layers: list[nn.Module] = [nn.Linear(LATENT + classes, 128)]
        layers.append(nn.LeakyReLU(SLOPE, inplace=True))
        for before, after in pairwise((128, 256, 512, 1024)):
            layers += [
                nn.Linear(before, after),
                nn.BatchNorm1d(after, EPS),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Linear(1024, size * size), nn.Tanh())

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            noise = torch.cat((self.embedding(labels), noise), -1)
        return self.layers(noise).view(-1, 1, self.size, self.size)


class ConditionalDiscriminator(nn.Module):
    """512 three times, dropout before the activation; embedded labels joined to the pixels."""

    per_sample = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, CLASSES)
        layers: list[nn.Module] = [nn.Linear(size * size + CLASSES, 512)]
        layers.append(nn.LeakyReLU(SLOPE, inplace=True))
        for _ in range(2):
            layers += [nn.Linear(512, 512), nn.Dropout(0.4), nn.LeakyReLU(SLOPE, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(512, 1))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.layers(torch.cat((images.flatten(1), self.embedding(labels)), -1))


class Critic(nn.Module):
    """512, 256, 1. No norm."""

    per_sample = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size * size, 512), nn.LeakyReLU(SLOPE, inplace=True),
            nn.Linear(512, 256), nn.LeakyReLU(SLOPE, inplace=True),
            nn.Linear(256, 1),
        )  # fmt: skip

    def forward(self, images: Tensor, labels: None = None) -> Tensor:
        return self.layers(images.flatten(1))


class ConvGenerator(nn.Module):
    """Dense to 128 x size/4 x size/4, then upsampling and 3x3 convolutions to 128, 64 and 1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.start = (128, size // 4, size // 4)
        self.dense = nn.Linear(LATENT, 128 * (size // 4) ** 2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, 1, 1), nn.BatchNorm2d(128, EPS),
            nn.LeakyReLU(SLOPE, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, 1, 1), nn.BatchNorm2d(64, EPS),
            nn.LeakyReLU(SLOPE, inplace=True),
            nn.Conv2d(64, 1, 3, 1, 1), nn.Tanh(),
        )  # fmt: skip
        self.apply(init_normal)

    def forward(self, noise: Tensor, labels: None = None) -> Tensor:
        return self.layers(self.dense(noise).view(-1, *self.start))


class ConvDiscriminator(nn.Module):
    """3x3 convolutions of stride 2 to 16, 32, 64, 128; a logit (the scripts: its sigmoid)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((1, 16, 32, 64, 128)):
            layers.append(nn.Conv2d(before, after, 3, 2, 1))
            layers += [nn.LeakyReLU(SLOPE, inplace=True), nn.Dropout2d(0.25)]
            if before > 1:
                layers.append(nn.BatchNorm2d(after, EPS))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(128 * (size // 16) ** 2, 1)
        self.apply(init_normal)

    def forward(self, images: Tensor, labels: None = None) -> Tensor:
        return self.head(self.layers(images).flatten(1))


def init_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# ---- data --------------------------------------------------------------------------------------


class PillowImages(Dataset):
    """A sample as MNIST and torchvision's Resize, ToTensor and Normalize(0.5, 0.5) make it."""

    def __init__(self, data: ImageData, size: int) -> None:
        self.images, self.labels, self.size = data.images[:, 0], data.labels, size
        self.mean, self.std = torch.tensor([0.5]), torch.tensor([0.5])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index].numpy())
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).view(self.size, self.size, 1)
        x = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        x = x.clone().sub_(self.mean.view(-1, 1, 1)).div_(self.std.view(-1, 1, 1))
        return x, int(self.labels[index])


def script_batches(data: ImageData, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches, epoch after epoch, as the scripts load them."""
    loader = DataLoader(PillowImages(data, size), batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


def memory_batches(
    data: ImageData, size: int, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the same batches from images that are decoded and normalized beforehand."""
    images, labels = to_float(resize(data.images, size)).to(device), data.labels.to(device)
    while True:
        for rows in torch.randperm(len(images), device=device).split(BATCH):
            if len(rows) == BATCH:
                yield images[rows], labels[rows]


# ---- scripts -----------------------------------------------------------------------------------


class Script:
    """A script's networks, optimizers and steps; each `step` trains on one batch.

    Args:
        print: where the line that it prints at a step goes.
        device: where it trains; noise and whatever else numpy makes is copied there.
    """

    size: int
    conditional = False

    def __init__(
        self, print: Callable[[str], object] = print, device: str | torch.device = "cpu"
    ) -> None:
        self.print = print
        self.device = device
        self.generator = self.make_generator().to(device)
        self.discriminator = self.make_discriminator().to(device)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=LR, betas=BETAS)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), lr=LR, betas=BETAS)
        self.batches = 0

    @classmethod
    def make_generator(cls) -> nn.Module:
        raise NotImplementedError

    @classmethod
    def make_discriminator(cls) -> nn.Module:
        raise NotImplementedError

    def step(self, images: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def noise(self, n: int) -> Tensor:
        return torch.FloatTensor(np.random.normal(0, 1, (n, LATENT))).to(self.device)

    def report(self, d_loss: Tensor, g_loss: Tensor) -> None:
        self.print(
            f"[Batch {self.batches}] [D loss: {d_loss.item():f}] [G loss: {g_loss.item():f}]"
        )


class AlternatingScript(Script):
    """The generator's step, then the discriminator's on the same fakes."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def random_labels(self, n: int) -> Tensor | None:
        if not self.conditional:
            return None
        return torch.LongTensor(np.random.randint(0, CLASSES, n)).to(self.device)

    def step(self, images: Tensor, labels: Tensor) -> None:
        n = len(images)
        valid, fake = (torch.full((n, 1), value, device=self.device) for value in (1.0, 0.0))
        images = images.to(self.device)
        labels = labels.to(self.device) if self.conditional else None

        self.optimizer_g.zero_grad()
        noise, drawn = self.noise(n), self.random_labels(n)
        generated = self.generator(noise, drawn)
        g_loss = self.loss(self.discriminator(generated, drawn), valid)
        g_loss.backward()
        self.optimizer_g.step()

        self.optimizer_d.zero_grad()
        real_loss = self.loss(self.discriminator(images, labels), valid)
        fake_loss = self.loss(self.discriminator(generated.detach(), drawn), fake)
        d_loss = (real_loss + fake_loss) / 2
        d_loss.backward()
        self.optimizer_d.step()

        self.batches += 1
        self.report(d_loss, g_loss)


class CGAN(AlternatingScript):
    size, conditional = 32, True

    @classmethod
    def make_generator(cls) -> nn.Module:
        return DenseGenerator(cls.size, CLASSES)

    @classmethod
    def make_discriminator(cls) -> nn.Module:
        return ConditionalDiscriminator(cls.size)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)


class DCGAN(AlternatingScript):
    size = 32

    @classmethod
    def make_generator(cls) -> nn.Module:
        return ConvGenerator(cls.size)

    @classmethod
    def make_discriminator(cls) -> nn.Module:
        return ConvDiscriminator(cls.size)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy(torch.sigmoid(output), target)


class WGANGP(Script):
    """A critic step for every batch; a generator step after the first and every fifth one."""

    size = 28

    @classmethod
    def make_generator(cls) -> nn.Module:
        return DenseGenerator(cls.size)

    @classmethod
    def make_discriminator(cls) -> nn.Module:
        return Critic(cls.size)

    def step(self, images: Tensor, labels: Tensor) -> None:
        noise = self.noise(len(images))
        d_loss = self.critic_step(images.to(self.device), noise)
        if self.batches % N_CRITIC == 0:
            self.report(d_loss, self.generator_step(noise))
        self.batches += 1

    def critic_step(self, images: Tensor, noise: Tensor) -> Tensor:
        self.optimizer_d.zero_grad()
        generated = self.generator(noise)  # not detached: its gradients are computed but not used
        real, fake = self.discriminator(images), self.discriminator(generated)
        penalty = self.penalty(images.data, generated.data)
        loss = -torch.mean(real) + torch.mean(fake) + PENALTY_WEIGHT * penalty
        loss.backward()
        self.optimizer_d.step()
        self.optimizer_g.zero_grad()
        return loss

    def generator_step(self, noise: Tensor) -> Tensor:
        loss = -torch.mean(self.discriminator(self.generator(noise)))
        loss.backward()
        self.optimizer_g.step()
        return loss

    def alpha(self, n: int) -> Tensor:
        return torch.FloatTensor(np.random.random((n, 1, 1, 1))).to(self.device)

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        alpha = self.alpha(len(real))
        x = (alpha * real + ((1 - alpha) * fake)).requires_grad_(True)
        output = self.discriminator(x)
        (gradient,) = torch.autograd.grad(
            outputs=output,
            inputs=x,
            grad_outputs=torch.ones(len(real), 1, device=self.device),
            create_graph=True,
            retain_graph=True,
        )
        return ((gradient.view(len(gradient), -1).norm(2, dim=1) - 1) ** 2).mean()


SCRIPTS: dict[str, type[Script]] = {"cgan": CGAN, "dcgan": DCGAN, "wgan_gp": WGANGP}
