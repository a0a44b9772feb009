"""Helpers of the tests of the layers for CPUs."""

import copy

import torch

import gankernels as gk


def both(network):
    """The network, and a copy with the layers for CPUs."""
    faster = gk.fuse(copy.deepcopy(network), cpu=True)
    return network, faster


def derivatives(network, x):
    """Output, and first and second derivatives as a gradient penalty has them."""
    x = x.clone().requires_grad_()
    y = network(x)
    parameters = [p for p in network.parameters() if p.requires_grad]
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    second = torch.autograd.grad(gradient.float().square().sum(), [x, *parameters])
    return y, gradient, *second
