"""Other people's networks, from papers and their repositories."""

import sys
from pathlib import Path

import pytest
from fusing import assert_same, everything, images

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import networks

NETWORKS = {
    "dcgan": (
        lambda: networks.DCGAN(4, 32),
        ["fused main.3 with main.4", "fused main.6 with main.7"],
    ),
    "unet": (
        lambda: networks.UNet(2),
        [
            "fused down1.norm with down1.act",
            "fused down2.norm with down2.act",
            "fused up1.norm1 with up1.act1",
            "left up1.norm2: followed by cat",
            "fused up2.norm1 with up2.act1",
            "left up2.norm2: followed by cat",
        ],
    ),
    "resnet": (
        lambda: networks.ResNet(4, 2),
        [
            "fused blocks.0.residual.0 with blocks.0.residual.1",
            "fused blocks.0.residual.3 with blocks.0.residual.4",
            "fused blocks.1.residual.0 with blocks.1.residual.1",
            "fused blocks.1.residual.3 with blocks.1.residual.4",
            "left norm: followed by relu as a function: as a module it would be fused",
        ],
    ),
    "stylegan": (lambda: networks.StyleGAN(4, 2), ["no BatchNorm to fuse"]),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("lone", [False, True])
def test_networks_of_others(name, lone):
    make, expected = NETWORKS[name]
    lines = assert_same(make(), images(size=32), lone=lone)
    if lone:
        assert [n.startswith("fused") for n in lines] == [not n.startswith("no") for n in expected]
    else:
        assert len(lines) == len(expected)
        for line, start in zip(lines, expected, strict=True):
            assert line.startswith(start)


def test_networks_of_others_have_penalties_that_change_something():
    """Or the comparison above would be of zeros."""
    for make, _ in NETWORKS.values():
        values = everything(make(), images(size=32))
        assert sum(v.abs().max() > 1e-6 for v in values) > len(values) / 2
