"""ResNet for small images with shortcuts without parameters, "option A" (He et al. 2015, arXiv:1512.03385, section 4.2).

x = relu(F(x) + pad(x)): where the size halves, the shortcut takes every second place and fills the new channels with zeros.

    folder = convert("resnet20_cifar10.safetensors", "resnet20")           # or: python -m ftjax.models.convert FILE FOLDER
    model, params = load_pretrained(folder)

transformers has no such model; the config file is our own, the tensors keep the names that the PyTorch code gave them.
"""

from __future__ import annotations

import dataclasses as dc
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.errors import ConfigError, DataError
from ftjax.headspec import HeadSpec, label_names
from ftjax.models import hf
from ftjax.models.base import FamilyConfig, Numerics
from ftjax.models.batchnorm import BatchNorm
from ftjax.models.folder import stream
from ftjax.models.hfconfig import HFConfig
from ftjax.models.tensors import load_table
from ftjax.models.vision import Conv, ConvNet, ConvNorm, whole_numbers
from ftjax.registry import register

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the pretrained CIFAR-10 networks were fed with, after scaling pixels to [0, 1]."""


@dc.dataclass(frozen=True)
class ResNetCifarConfig(FamilyConfig):
    """The numbers of such a ResNet; ResNet-20 is (16, 32, 64) with (3, 3, 3)."""

    num_channels: int
    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`."""
        c = HFConfig(config)
        read = cls(c.int("num_channels"), whole_numbers(c, "hidden_sizes"), whole_numbers(c, "depths"))
        if len(read.hidden_sizes) != len(read.depths):
            raise c.wrong("depths", list(read.depths), f"{len(read.hidden_sizes)} numbers, as hidden_sizes has")
        c.finish()
        return read

    def to_hf(self) -> dict[str, Any]:
        """The inverse."""
        lists = {"hidden_sizes": list(self.hidden_sizes), "depths": list(self.depths)}
        return {"model_type": "resnet_cifar", "num_channels": self.num_channels, **lists}


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions and the shortcut."""

    out: int
    stride: int
    hf: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Conv(self.out, 3, f"{self.hf}.conv1", self.stride, 1, name="conv1")(x)
        y = nn.relu(BatchNorm(f"{self.hf}.bn1", name="norm1")(y))
        y = Conv(self.out, 3, f"{self.hf}.conv2", 1, 1, name="conv2")(y)
        y = BatchNorm(f"{self.hf}.bn2", name="norm2")(y)
        return nn.relu(y + self.shortcut(x))

    def shortcut(self, x: jax.Array) -> jax.Array:
        """Every second place, zeros in the new channels, half of them before and half behind."""
        new = self.out - x.shape[-1]
        if self.stride == 1 and not new:
            return x
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class CifarStage(nn.Module):
    """Blocks of one width; all but the first stage begin by halving the size."""

    config: ResNetCifarConfig
    index: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        i = self.index
        for j in range(self.config.depths[i]):
            stride = 2 if i and not j else 1
            x = CifarBlock(self.config.hidden_sizes[i], stride, f"layer{i + 1}.{j}", name=f"block{j}")(x)
        return x


class CifarTrunk(nn.Module):
    """A 3 x 3 convolution, the stages, the mean over all places."""

    config: ResNetCifarConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = nn.relu(ConvNorm(c.hidden_sizes[0], 3, "conv1", "bn1", name="embedder")(x))
        for i in range(len(c.depths)):
            x = CifarStage(c, i, name=f"stage{i + 1}")(x)
        return x.mean((1, 2))


@register("family", "resnet_cifar")
@dc.dataclass(frozen=True)
class ResNetCifar(ConvNet):
    """ResNet-20, 32, 44, 56 and so on for images of about 32 x 32."""

    family: ClassVar[str] = "resnet_cifar"
    Config: ClassVar[type[FamilyConfig]] = ResNetCifarConfig
    heads: ClassVar[dict[str, str]] = {"image_classification": "ResNetCifarForImageClassification"}
    head_hf: ClassVar[str] = "linear"

    @property
    def trunk(self) -> nn.Module:
        """Everything below the head."""
        return CifarTrunk(self.config)

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.config.hidden_sizes[-1]


# From a file of tensors ------------------------------------------------------------------------------------------------


def convert(source: str | Path, folder: str | Path, *, labels: Sequence[str] = ()) -> Path:
    """Makes a model folder (config, weights, normalisation) of a safetensors file with a network's tensors.

    Args:
      source: the file, tensors named as in the PyTorch code that trained it (``layer1.0.conv1.weight``, ...).
      folder: created if absent.
      labels: of the outputs; by default CIFAR-10's where there are ten.

    Raises:
      DataError: the tensors are not those of such a network.
      ConfigError: the number of labels is not that of the outputs.
    """
    source, folder = Path(source).expanduser(), Path(folder)
    if not source.is_file():
        raise DataError(f"no file {source}")
    shapes = {name: read().shape for name, read in stream([source])}
    config = _config_of(shapes, source)
    n = shapes["linear.weight"][0]
    labels = tuple(labels) or (CIFAR10 if n == len(CIFAR10) else label_names(n))
    if len(labels) != n:
        raise ConfigError(f"{len(labels)} labels for {n} outputs of {source}")
    model = ResNetCifar(config, Numerics(), HeadSpec("image_classification", labels))
    params = load_table(
        model.table, [source], dtype=jnp.float32, ignore=lambda name: name.endswith("num_batches_tracked")
    )
    hf.save(model, params, folder)
    scale = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    fed = {**scale, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    (folder / "preprocessor_config.json").write_text(json.dumps(fed, indent=2) + "\n")
    return folder


def _config_of(shapes: dict[str, tuple[int, ...]], source: Path) -> ResNetCifarConfig:
    """The numbers that the tensors' names and shapes tell."""
    blocks = sorted(
        {(int(m[1]), int(m[2])) for n in shapes if (m := re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", n))}
    )
    stages = sorted({stage for stage, _ in blocks})
    if not {"conv1.weight", "linear.weight"} <= set(shapes) or stages != list(range(1, len(stages) + 1)) or not stages:
        raise DataError(f"{source} does not hold a ResNet of this kind: it needs conv1, layer1.0.conv1, ..., linear")
    return ResNetCifarConfig(
        shapes["conv1.weight"][1],
        tuple(shapes[f"layer{s}.0.conv1.weight"][0] for s in stages),
        tuple(sum(stage == s for stage, _ in blocks) for s in stages),
    )
