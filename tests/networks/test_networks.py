"""Parameter counts as published, shapes, and labels as inputs."""

import pytest
import torch

from gankernels import networks
from gankernels.nn import BatchNormLeakyReLU1d, BatchNormLeakyReLU2d, LeakyReLUBatchNorm1d


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


MNIST = (1, 28, 28)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (lambda: networks.EmbeddingMLPGenerator(100, MNIST, 10), 1_490_936),
        (lambda: networks.EmbeddingMLPDiscriminator(MNIST, 10), 935_585),
        (lambda: networks.MLPGenerator(100, MNIST), 1_510_032),
        (lambda: networks.MLPDiscriminator(MNIST), 533_505),
        (lambda: networks.DenseConvGenerator(100, 1, 28), 2_305_472),
        (lambda: networks.DenseConvDiscriminator(1, 28), 212_865),
        (lambda: networks.DeconvGenerator(128, 1, 28), 1_554_177),
        (lambda: networks.ConvCritic(1, 28), 1_030_145),
        (lambda: networks.DCGANGenerator(100, 3, 64), 3_576_704),
        (lambda: networks.DCGANDiscriminator(3, 64), 2_765_568),
    ],
)
def test_parameter_counts(network, parameters):
    assert count(network()) == parameters


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [12, 28, 32])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_small_conv_shapes(channels, size, num_classes):
    generator = networks.DenseConvGenerator(6, channels, size, num_classes, width=4)
    discriminator = networks.DenseConvDiscriminator(channels, size, num_classes, width=4)
    check_pair(generator, discriminator, 6, (channels, size, size), num_classes)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_dcgan_shapes(size, num_classes):
    generator = networks.DCGANGenerator(6, 3, size, num_classes, width=4)
    discriminator = networks.DCGANDiscriminator(3, size, num_classes, width=4)
    check_pair(generator, discriminator, 6, (3, size, size), num_classes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [4, 12, 28, 32])
def test_wgan_gp_shapes(channels, size):
    generator = networks.DeconvGenerator(6, channels, size, width=4)
    critic = networks.ConvCritic(channels, size, width=4)
    check_pair(generator, critic, 6, (channels, size, size), 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_dense_shapes(channels):
    shape = (channels, 12, 12)
    check_pair(networks.MLPGenerator(6, shape), networks.MLPDiscriminator(shape), 6, shape, 0)
    generator = networks.EmbeddingMLPGenerator(6, shape, 4)
    check_pair(generator, networks.EmbeddingMLPDiscriminator(shape, 4), 6, shape, 4)


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
    from gankernels.networks._labels import join_one_hot

    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    joined = join_one_hot(images, torch.tensor([1, 0]), 2)
    assert joined.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(joined[:, :3], images)
    assert torch.equal(joined[0, 3:].amax((1, 2)), torch.tensor([0.0, 1.0]))
    assert torch.equal(joined[0, 3:].amin((1, 2)), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    "network",
    [
        networks.DenseConvDiscriminator(1, 28, 10, width=4),
        networks.EmbeddingMLPDiscriminator(MNIST, 10),
    ],
)
def test_missing_labels(network):
    with pytest.raises(ValueError, match="labels must be given for"):
        network(torch.zeros(2, 1, 28, 28))


@pytest.mark.parametrize(
    "network", [networks.DenseConvDiscriminator(1, 28, width=4), networks.MLPDiscriminator(MNIST)]
)
def test_unwanted_labels(network):
    with pytest.raises(ValueError, match="unconditional"):
        network(torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]))


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="divisible by 4, got 30"):
        networks.DenseConvGenerator(100, 1, 30)
    with pytest.raises(ValueError, match="divisible by 4, got 30"):
        networks.DenseConvDiscriminator(1, 30)
    with pytest.raises(ValueError, match="divisible by 4, got 30"):
        networks.DeconvGenerator(100, 1, 30)
    with pytest.raises(ValueError, match="divisible by 4, got 30"):
        networks.ConvCritic(1, 30)
    for network in (
        lambda: networks.DCGANGenerator(100, 1, 48),
        lambda: networks.DCGANDiscriminator(1, 48),
    ):
        with pytest.raises(ValueError, match="power of two of at least 16, got 48"):
            network()


def norms(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


def test_norms_are_fused_and_configured_as_the_sources_mean_them():
    # Keras's momentum 0.8 keeps 0.8 of the old statistics; PyTorch's counts what is replaced.
    classic = norms(networks.EmbeddingMLPGenerator(100, MNIST, 10), LeakyReLUBatchNorm1d)
    dense = norms(networks.MLPGenerator(100, MNIST), BatchNormLeakyReLU1d)
    assert [len(classic), len(dense)] == [3, 3]
    assert {(norm.momentum, norm.eps, norm.negative_slope) for norm in classic + dense} == {
        (0.2, 1e-5, 0.2)
    }
    family = norms(networks.DCGANGenerator(100, 3, 64), BatchNormLeakyReLU2d)
    assert [norm.negative_slope for norm in family] == [0.0] * 4
    for critic in (networks.MLPDiscriminator(MNIST), networks.ConvCritic(1, 28)):
        assert not norms(critic, torch.nn.modules.batchnorm._NormBase)


def test_dcgan_init():
    torch.manual_seed(0)
    network = networks.DCGANGenerator(100, 3, 64)
    assert network.layers[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    scale = network.layers[1].weight.detach()
    assert scale.mean().item() == pytest.approx(1, abs=0.01)
    assert scale.std().item() == pytest.approx(0.02, rel=0.2)


# ---- statistics of the batch ---------------------------------------------------------------------

DISCRIMINATORS = [
    lambda: networks.MLPDiscriminator((1, 16, 16)),
    lambda: networks.EmbeddingMLPDiscriminator((1, 16, 16), 3),
    lambda: networks.DenseConvDiscriminator(1, 16, width=4),
    lambda: networks.DCGANDiscriminator(1, 16, width=4),
    lambda: networks.ConvCritic(1, 16, width=4),
]


def judge(discriminator, images):
    labels = torch.zeros(len(images), dtype=torch.int64)
    conditional = getattr(discriminator, "num_classes", 0)
    return discriminator.eval()(images, labels if conditional else None)


@pytest.mark.parametrize("make", DISCRIMINATORS)
@pytest.mark.parametrize(
    ("stddev", "kernels", "more"), [(True, None, 1), (False, (7, 3), 7), (True, (7, 3), 8)]
)
def test_batch_statistics_join_the_features(make, stddev, kernels, more):
    plain, joined = make(), make()
    joined.load_state_dict(plain.state_dict())
    assert networks.with_batch_statistics(joined, stddev, kernels) is joined
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    inside = []
    joined.head[-1].register_forward_hook(lambda m, inputs, o: inside.append(inputs[0]))
    together = judge(joined, images)
    features = plain.head.weight[0].numel()
    assert inside[0].shape == (8, features + more)
    torch.testing.assert_close(joined.head[-1].weight[:, :features], plain.head.weight.flatten(1))
    # Without what was joined the output is the old one, and that alone looks at other samples.
    torch.testing.assert_close(judge(plain, images[:4]), judge(plain, images)[:4])
    assert not torch.allclose(judge(joined, images[:4]), together[:4])
    with torch.no_grad():
        joined.head[-1].weight[:, features:] = 0
    torch.testing.assert_close(judge(joined, images), judge(plain, images))


def test_batch_statistics_give_a_collapse_away():
    discriminator = networks.with_batch_statistics(
        networks.MLPDiscriminator((1, 8, 8)), True, (5, 3)
    )
    seen = []
    discriminator.head[-1].register_forward_hook(lambda m, inputs, o: seen.append(inputs[0]))
    discriminator(10 * torch.randn(8, 1, 8, 8))
    discriminator(torch.randn(1, 1, 8, 8).expand(8, -1, -1, -1))
    varied, collapsed = seen
    assert (collapsed[:, -6] < varied[:, -6]).all()  # the deviation
    torch.testing.assert_close(collapsed[:, -5:], torch.full((8, 5), 7.0))  # 7 others, all alike
    assert (varied[:, -5:] < 7).all()


def test_no_statistics_leave_the_discriminator_alone():
    discriminator = networks.MLPDiscriminator(MNIST)
    head = discriminator.head
    assert networks.with_batch_statistics(discriminator).head is head


@pytest.mark.parametrize("choice", [{"stddev": True}, {"kernels": (3, 2)}])
def test_statistics_need_a_head(choice):
    with pytest.raises(ValueError, match="Sequential has no linear or convolutional head"):
        networks.with_batch_statistics(torch.nn.Sequential(torch.nn.Linear(3, 1)), **choice)


@pytest.mark.parametrize(
    ("make", "per_sample"),
    [
        (lambda: networks.MLPDiscriminator(MNIST), True),
        (lambda: networks.EmbeddingMLPDiscriminator(MNIST, 3), True),
        (lambda: networks.DenseConvDiscriminator(1, 28, 3, width=4), True),
        (lambda: networks.ConvCritic(1, 28, width=4), True),
        (lambda: networks.DCGANDiscriminator(1, 32, width=4), False),
        (lambda: networks.with_batch_statistics(networks.ConvCritic(1, 28, width=4), True), False),
    ],
)
def test_who_judges_each_sample_by_itself(make, per_sample):
    discriminator = make().double()
    for module in discriminator.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    size = 32 if isinstance(discriminator, networks.DCGANDiscriminator) else 28
    images = torch.rand(8, 1, size, size, dtype=torch.float64)
    labels = torch.arange(8) % 3 if getattr(discriminator, "num_classes", 0) else None
    together = discriminator(images, labels)
    alone = discriminator(images[:4], None if labels is None else labels[:4])
    assert torch.allclose(alone, together[:4], rtol=1e-9) == per_sample
    assert getattr(discriminator, "per_sample", False) == per_sample
