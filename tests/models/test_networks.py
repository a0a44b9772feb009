"""Parameter counts as published, shapes, and how labels enter."""

import pytest
import torch

from gankernels import models
from gankernels.nn import BatchNormLeakyReLU1d, BatchNormLeakyReLU2d, LeakyReLUBatchNorm1d


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


MNIST = (1, 28, 28)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (lambda: models.EmbeddingMLPGenerator(100, MNIST, 10), 1_490_936),
        (lambda: models.EmbeddingMLPDiscriminator(MNIST, 10), 935_585),
        (lambda: models.MLPGenerator(100, MNIST), 1_510_032),
        (lambda: models.MLPDiscriminator(MNIST), 533_505),
        (lambda: models.DenseConvGenerator(100, 1, 28), 2_305_472),
        (lambda: models.DenseConvDiscriminator(1, 28), 212_865),
        (lambda: models.DCGANGenerator(100, 3, 64), 3_576_704),
        (lambda: models.DCGANDiscriminator(3, 64), 2_765_568),
    ],
)
def test_parameter_counts(network, parameters):
    assert count(network()) == parameters


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [12, 28, 32])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_small_conv_shapes(channels, size, num_classes):
    generator = models.DenseConvGenerator(6, channels, size, num_classes, width=4)
    discriminator = models.DenseConvDiscriminator(channels, size, num_classes, width=4)
    check_pair(generator, discriminator, 6, (channels, size, size), num_classes)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_dcgan_shapes(size, num_classes):
    generator = models.DCGANGenerator(6, 3, size, num_classes, width=4)
    discriminator = models.DCGANDiscriminator(3, size, num_classes, width=4)
    check_pair(generator, discriminator, 6, (3, size, size), num_classes)


@pytest.mark.parametrize("channels", [1, 3])
def test_dense_shapes(channels):
    shape = (channels, 12, 12)
    check_pair(models.MLPGenerator(6, shape), models.MLPDiscriminator(shape), 6, shape, 0)
    generator = models.EmbeddingMLPGenerator(6, shape, 4)
    check_pair(generator, models.EmbeddingMLPDiscriminator(shape, 4), 6, shape, 4)


def check_pair(generator, discriminator, latent_dim, shape, num_classes):
    labels = torch.tensor([0, 1, 3]) if num_classes else None
    images = generator(torch.randn(3, latent_dim), labels)
    assert images.shape == (3, *shape)
    assert images.abs().max() <= 1
    logits = discriminator(images, labels)
    assert logits.shape == (3,)
    logits.sum().backward()
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        assert parameter.grad is not None, f"{name} takes no part"
    if num_classes:
        # The same noise in a batch of its own: only the labels can make the images differ. (Not
        # in eval mode, where so few ReLU units may all be dead before any training.)
        noise = torch.randn(1, latent_dim).expand(3, -1)
        images = generator(noise, labels)
        assert not torch.equal(images[0], images[1])
        discriminator.eval()  # without dropout
        logits = discriminator(images[:1].expand(3, -1, -1, -1), labels)
        assert len(logits.unique()) == 3


def test_label_planes_keep_channels_last():
    from gankernels.models._labels import join_one_hot

    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    joined = join_one_hot(images, torch.tensor([1, 0]), 2)
    assert joined.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(joined[:, :3], images)
    assert torch.equal(joined[0, 3:].amax((1, 2)), torch.tensor([0.0, 1.0]))
    assert torch.equal(joined[0, 3:].amin((1, 2)), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    "network",
    [
        models.DenseConvDiscriminator(1, 28, 10, width=4),
        models.EmbeddingMLPDiscriminator(MNIST, 10),
    ],
)
def test_missing_labels(network):
    with pytest.raises(ValueError, match="labels are missing"):
        network(torch.zeros(2, 1, 28, 28))


@pytest.mark.parametrize(
    "network", [models.DenseConvDiscriminator(1, 28, width=4), models.MLPDiscriminator(MNIST)]
)
def test_unwanted_labels(network):
    with pytest.raises(ValueError, match="unconditional"):
        network(torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]))


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="divisible by 4, got 30"):
        models.DenseConvGenerator(100, 1, 30)
    with pytest.raises(ValueError, match="divisible by 4, got 30"):
        models.DenseConvDiscriminator(1, 30)
    for network in (
        lambda: models.DCGANGenerator(100, 1, 48),
        lambda: models.DCGANDiscriminator(1, 48),
    ):
        with pytest.raises(ValueError, match="power of two of at least 16, got 48"):
            network()


def norms(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


def test_norms_are_fused_and_configured_as_the_sources_mean_them():
    # Keras's momentum 0.8 keeps 0.8 of the old statistics; PyTorch's counts what is replaced.
    classic = norms(models.EmbeddingMLPGenerator(100, MNIST, 10), LeakyReLUBatchNorm1d)
    dense = norms(models.MLPGenerator(100, MNIST), BatchNormLeakyReLU1d)
    assert [len(classic), len(dense)] == [3, 3]
    assert {(norm.momentum, norm.eps, norm.negative_slope) for norm in classic + dense} == {
        (0.2, 1e-5, 0.2)
    }
    family = norms(models.DCGANGenerator(100, 3, 64), BatchNormLeakyReLU2d)
    assert [norm.negative_slope for norm in family] == [0.0] * 4
    critic = models.MLPDiscriminator(MNIST)
    assert not norms(critic, (BatchNormLeakyReLU1d, torch.nn.modules.batchnorm._BatchNorm))


def test_dcgan_init():
    torch.manual_seed(0)
    network = models.DCGANGenerator(100, 3, 64)
    assert network.layers[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    scale = network.layers[1].weight.detach()
    assert scale.mean().item() == pytest.approx(1, abs=0.01)
    assert scale.std().item() == pytest.approx(0.02, rel=0.2)
