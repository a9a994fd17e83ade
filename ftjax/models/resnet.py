"""ResNet, basic and bottleneck blocks, as transformers has it (He et al. 2015, arXiv:1512.03385).

x = relu(F(x) + shortcut(x)), F of two 3 x 3 convolutions, or of 1 x 1, 3 x 3 and 1 x 1; each with BatchNorm.

    model, params = load_pretrained("microsoft/resnet-50")
    model.apply(params, {"pixel_values": pixels}).logits
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar, Self

import jax
from flax import linen as nn

from ftjax.models.base import FamilyConfig
from ftjax.models.batchnorm import BatchNorm
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import ACTIVATIONS
from ftjax.models.vision import Conv, ConvNet, ConvNorm, whole_numbers
from ftjax.registry import register

_REDUCTION = 4  # of a bottleneck's inner channels; transformers has it as a constant too


@dc.dataclass(frozen=True)
class ResNetConfig(FamilyConfig):
    """The numbers of a ResNet; names as in `config.json`."""

    num_channels: int
    embedding_size: int
    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    layer_type: str
    hidden_act: str
    downsample_in_first_stage: bool
    downsample_in_bottleneck: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`; every number that decides the function must be there."""
        c = HFConfig(config)
        read = cls(
            num_channels=c.int("num_channels"),
            embedding_size=c.int("embedding_size"),
            hidden_sizes=whole_numbers(c, "hidden_sizes"),
            depths=whole_numbers(c, "depths"),
            layer_type=c.raw("layer_type"),
            hidden_act=c.raw("hidden_act"),
            downsample_in_first_stage=c.bool("downsample_in_first_stage"),
            downsample_in_bottleneck=c.bool("downsample_in_bottleneck", implied=False),
        )
        for name, allowed in (("layer_type", _LAYERS), ("hidden_act", ACTIVATIONS)):
            if getattr(read, name) not in allowed:
                raise c.wrong(name, getattr(read, name), " or ".join(allowed))
        if len(read.hidden_sizes) != len(read.depths):
            raise c.wrong("depths", list(read.depths), f"{len(read.hidden_sizes)} numbers, as hidden_sizes has")
        for name in ("out_features", "out_indices", "stage_names"):  # which stages a backbone gives out: not used here
            c.raw(name)
        c.finish()
        return read

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        lists = {"hidden_sizes": list(self.hidden_sizes), "depths": list(self.depths)}
        return {"model_type": "resnet", **dc.asdict(self), **lists}


@dc.dataclass(frozen=True)
class _Layer:
    """One convolution of a block: channels out, kernel size, stride."""

    out: int
    size: int
    stride: int


def _basic(c: ResNetConfig, out: int, stride: int) -> tuple[_Layer, ...]:
    return _Layer(out, 3, stride), _Layer(out, 3, 1)


def _bottleneck(c: ResNetConfig, out: int, stride: int) -> tuple[_Layer, ...]:
    inner, early = out // _REDUCTION, c.downsample_in_bottleneck
    return _Layer(inner, 1, stride if early else 1), _Layer(inner, 3, 1 if early else stride), _Layer(out, 1, 1)


_LAYERS = {"basic": _basic, "bottleneck": _bottleneck}


def _names(layer: str) -> tuple[str, str]:
    return f"{layer}.convolution", f"{layer}.normalization"


class ResNetBlock(nn.Module):
    """One residual block; the shortcut is a 1 x 1 convolution where size or channels change."""

    config: ResNetConfig
    out: int
    stride: int
    hf: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        act = ACTIVATIONS[c.hidden_act]
        y = x
        for i, layer in enumerate(_LAYERS[c.layer_type](c, self.out, self.stride)):
            y = nn.relu(y) if i else y  # within a block transformers has ReLU, whatever hidden_act says
            conv, norm = _names(f"{self.hf}.layer.{i}")
            y = Conv(layer.out, layer.size, conv, layer.stride, layer.size // 2, name=f"conv{i + 1}")(y)
            y = BatchNorm(norm, name=f"norm{i + 1}")(y)
        if self.stride != 1 or x.shape[-1] != self.out:
            x = ConvNorm(self.out, 1, *_names(f"{self.hf}.shortcut"), self.stride, name="shortcut")(x)
        return act(y + x)


class ResNetStage(nn.Module):
    """Blocks of one width; the first may halve the size."""

    config: ResNetConfig
    index: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, i = self.config, self.index
        stride = 2 if i or c.downsample_in_first_stage else 1
        for j in range(c.depths[i]):
            hf = f"resnet.encoder.stages.{i}.layers.{j}"
            x = ResNetBlock(c, c.hidden_sizes[i], 1 if j else stride, hf, name=f"block{j}")(x)
        return x


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of every 3 x 3 places, at every second place; nothing stands beyond the border."""
    around: Any = ((1, 1), (1, 1))
    return nn.max_pool(x, (3, 3), (2, 2), around)


class ResNetTrunk(nn.Module):
    """A 7 x 7 convolution and max-pooling (a quarter of the size), the stages, the mean over all places."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = ConvNorm(c.embedding_size, 7, *_names("resnet.embedder.embedder"), 2, name="embedder")(x)
        x = max_pool(ACTIVATIONS[c.hidden_act](x))
        for i in range(len(c.depths)):
            x = ResNetStage(c, i, name=f"stage{i + 1}")(x)
        return x.mean((1, 2))


@register("family", "resnet")
@dc.dataclass(frozen=True)
class ResNet(ConvNet):
    """ResNet for image classification."""

    family: ClassVar[str] = "resnet"
    Config: ClassVar[type[FamilyConfig]] = ResNetConfig
    heads: ClassVar[dict[str, str]] = {"image_classification": "ResNetForImageClassification"}
    prefix: ClassVar[str] = "resnet."
    head_hf: ClassVar[str] = "classifier.1"

    @property
    def trunk(self) -> nn.Module:
        """Everything below the head."""
        return ResNetTrunk(self.config)

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.config.hidden_sizes[-1]
