"""A small convolutional classifier: the judge of samples, and the features they are compared in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankernels import _console as console
from gankernels._modes import evaluating
from gankernels.data import ImageData, to_float

_WIDTH = 32
_MAX_WIDTH = 128
_BATCH_SIZE = 64
_LEARNING_RATE = 4e-3


class Classifier(nn.Module):
    """Strided 3x3 convolutions down to 4x4 pixels or less, then a feature layer and logits.

    Args:
        channels: 1 or 3, though any number works.
        size: height and width of the images in pixels, at least 1.
        num_classes: number of logits.
        num_features: width of the penultimate layer. Small compared to the number of images, so
            that a covariance of the features is well conditioned.

    Shape:
        ``(N, channels, size, size)`` in [-1, 1] to ``(N, num_classes)``.
    """

    #: Accuracy on held-out images, in [0, 1]; NaN until :func:`train_classifier`.
    held_out_accuracy: Tensor

    def __init__(
        self, channels: int, size: int, num_classes: int, *, num_features: int = 64
    ) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.num_classes, self.num_features = num_classes, num_features
        layers = [_block(channels, _WIDTH, stride=2), _block(_WIDTH, _WIDTH)]
        width, size = _WIDTH, (size + 1) // 2
        while size > 4:
            layers.append(_block(width, min(2 * width, _MAX_WIDTH), stride=2))
            width, size = min(2 * width, _MAX_WIDTH), (size + 1) // 2
        self.body = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(width * size * size, num_features, bias=False),
            nn.BatchNorm1d(num_features),
            # Leaky, so that no feature is constant and the covariance keeps its full rank.
            nn.LeakyReLU(0.2),
        )
        self.head = nn.Linear(num_features, num_classes)
        self.register_buffer("held_out_accuracy", torch.tensor(float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Activations of the penultimate layer, ``(N, num_features)``."""
        expected = (self.channels, self.size, self.size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"x must be (N, {', '.join(map(str, expected))}), the images that the classifier "
                f"was built for, got {tuple(x.shape)}"
            )
        return self.body(x)


def _block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.2),
    )


def train_classifier(
    data: ImageData,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> tuple[Classifier, float]:
    """Train a classifier on 80 % of ``data`` and measure it on the rest.

    It uses AdamW with a one-cycle learning rate schedule, on images that are slightly rotated,
    scaled and shifted, for 16 epochs, but at least 400 and at most 6,000 steps of 64 images. The
    same seed gives the same classifier on the same machine with the same number of threads. The
    global random state is not changed.

    Returns:
        the classifier in eval mode, and its accuracy on the held-out images in [0, 1].
    """
    device = torch.device(device)
    training, held_out = data.split(seed=seed)
    images, labels = training.images.to(device), training.labels.to(device)
    steps = min(max(16 * len(training) // _BATCH_SIZE, 400), 6000)

    with torch.random.fork_rng(devices=[]):  # weights are drawn from the CPU's default generator
        torch.manual_seed(seed)
        classifier = Classifier(data.channels, data.size, data.num_classes)
    classifier.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=_LEARNING_RATE, weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    rng = torch.Generator().manual_seed(seed)
    for _ in _progress_bar(steps, progress):
        # Drawing on the CPU gives the same batches on every device.
        chosen = torch.randint(len(training), (_BATCH_SIZE,), generator=rng).to(device)
        batch = _augment(to_float(images[chosen]), rng)
        loss = F.cross_entropy(classifier(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    classifier.eval().requires_grad_(False)
    predicted = classifier.head(features(classifier, held_out.images).to(device)).argmax(1).cpu()
    classifier.held_out_accuracy.fill_((predicted == held_out.labels.cpu()).double().mean())
    return classifier, classifier.held_out_accuracy.item()


def _augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate by up to 0.2 rad, scale by up to 12 %, shift by up to 7 % of the width, per image."""
    angle, log_scale, dx, dy = (torch.rand(4, len(x), generator=rng) * 2 - 1) * torch.tensor(
        [[0.2], [0.12], [0.14], [0.14]]  # grid coordinates span 2, hence .14
    )
    cos, sin = log_scale.exp() * angle.cos(), log_scale.exp() * angle.sin()
    maps = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(-1, 2, 3).to(x.device)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _progress_bar(steps: int, shown: bool) -> Iterable[int]:
    if not shown:
        return range(steps)
    bar = console.bar(iterable=range(steps), desc="classifier", unit="step", leave=False)
    return range(steps) if bar is None else bar


@torch.no_grad()
def features(classifier: Classifier, images: Tensor, batch_size: int = 256) -> Tensor:
    """Penultimate features of ``images``, float32 ``(N, F)`` on the CPU.

    Args:
        classifier: used in eval mode; its modes are restored afterwards.
        images: ``(N, C, S, S)``, uint8 pixels or floating point in [-1, 1].
        batch_size: images converted and computed at a time.
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    device = classifier.head.weight.device
    parts = []
    with evaluating(classifier):
        for batch in images.split(batch_size):
            batch = batch.to(device)
            batch = to_float(batch) if batch.dtype == torch.uint8 else batch.float()
            parts.append(
                classifier.features(batch.contiguous(memory_format=torch.channels_last)).cpu()
            )
    return torch.cat(parts)
