"""A tiny ResNet for small images, with a shortcut of zeros."""

from __future__ import annotations

from ftjax.headspec import HeadSpec, label_names
from ftjax.models.base import Model, Numerics
from ftjax.models.resnet_cifar import ResNetCifar, ResNetCifarConfig


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """8 and 16 channels, two blocks and one."""
    numbers = ResNetCifarConfig(num_channels=3, hidden_sizes=(8, 16), depths=(2, 1))
    return ResNetCifar(numbers, numerics or Numerics(), head or HeadSpec("image_classification", label_names(3)))
