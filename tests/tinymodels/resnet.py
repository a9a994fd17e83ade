"""A tiny ResNet: one stage of basic blocks, one that halves the size."""

from __future__ import annotations

from ftjax.headspec import HeadSpec, label_names
from ftjax.models.base import Model, Numerics
from ftjax.models.resnet import ResNet, ResNetConfig


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """8 and 16 channels, one block each."""
    numbers = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1), layer_type="basic", hidden_act="relu",
        downsample_in_first_stage=False, downsample_in_bottleneck=False,
    )  # fmt: skip
    return ResNet(numbers, numerics or Numerics(), head or HeadSpec("image_classification", label_names(3)))
