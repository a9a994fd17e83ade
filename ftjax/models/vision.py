"""Image classifiers: convolutions, and `ConvNet`, which runs a trunk of them under a linear head.

    class ResNet(ConvNet):                         # a family gives these
        trunk = ...                                # a Linen module: pixels [B, H, W, C] -> pooled values [B, D]
        head_hf = "classifier.1"

Images come as transformers has them, ``pixel_values`` [B, C, H, W] in float32; kernels are [height, width, in, out].
"""

from __future__ import annotations

import dataclasses as dc
import math
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from ftjax import ops
from ftjax.errors import ConfigError
from ftjax.models.base import Model, Output
from ftjax.models.batchnorm import STAT, BatchNorm
from ftjax.models.heads import ScoreHead
from ftjax.models.hfconfig import HFConfig
from ftjax.params import ParamSpec, Store, Table, declare, leaf, nest


class Conv(nn.Module):
    """x [B, H, W, in] -> [B, H', W', out], square kernels, zero padding."""

    out: int
    size: int
    hf: str
    stride: int = 1
    padding: int = 0
    use_bias: bool = False
    std: float = 0.0
    """Of the initial values; 0: He's for ReLU by the outputs, sqrt(2 / (out size^2)) (arXiv:1502.01852)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.out)
        std = self.std or math.sqrt(2 / (self.out * self.size**2))
        spec = ParamSpec(shape, (None, None, None, "embed"), "conv", std=std, hf=self.hf + ".weight", transposed=True)
        y = ops.conv(x, leaf(self, "w", spec), stride=self.stride, padding=self.padding)
        if not self.use_bias:
            return y
        b = leaf(self, "b", ParamSpec((self.out,), ("embed",), "bias", init="zeros", hf=self.hf + ".bias"))
        return y + b.astype(y.dtype)


class ConvNorm(nn.Module):
    """A convolution that keeps the size (but for its stride), and BatchNorm."""

    out: int
    size: int
    conv_hf: str
    norm_hf: str
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Conv(self.out, self.size, self.conv_hf, self.stride, self.size // 2, name="conv")(x)
        return BatchNorm(self.norm_hf, name="norm")(x)


def to_nhwc(pixels: jax.Array, channels: int) -> jax.Array:
    """pixel_values [B, C, H, W] as convolutions take them, [B, H, W, C].

    Raises:
      ConfigError: another number of dimensions or channels.
    """
    if pixels.ndim != 4 or pixels.shape[1] != channels:
        raise ConfigError(f"pixel_values has the shape {list(pixels.shape)}; the model takes [B, {channels}, H, W]")
    return pixels.transpose(0, 2, 3, 1)


def whole_numbers(c: HFConfig, name: str) -> tuple[int, ...]:
    """A list of integers in `config.json`.

    Raises:
      DataError: it is missing or something else.
    """
    value = c.raw(name)
    if value is None:
        raise c.missing(name)
    if not isinstance(value, list | tuple) or not value or not all(type(x) is int for x in value):
        raise c.wrong(name, value, "a list of integers")
    return tuple(value)


@dc.dataclass(frozen=True)
class ConvNet(Model):
    """A convolutional trunk, pooled, under a linear head."""

    head_hf: ClassVar[str]
    """Name of the head's module in the file."""
    buffers: ClassVar[tuple[str, ...]] = ("*.num_batches_tracked",)

    @property
    def trunk(self) -> nn.Module:
        """``pixels [B, H, W, C] -> [B, D]``."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """D, what the trunk gives."""
        raise NotImplementedError

    @property
    def head_module(self) -> nn.Module:
        """One output per label; initial values as spread as torch's uniform ones."""
        return ScoreHead(len(self.head.labels), self.head_hf, math.sqrt(1 / (3 * self.width)))

    @cached_property
    def table(self) -> Table:
        """Every parameter and running statistic, by path."""
        pixels: Any = jax.ShapeDtypeStruct((1, 64, 64, self.config.num_channels), self.dtype)
        pooled: Any = jax.ShapeDtypeStruct((1, self.width), self.dtype)
        return {**declare(self.trunk, pixels), **declare(self.head_module, pooled, None, None)}

    def constants(self) -> dict[str, np.ndarray]:
        """torch's count of batches, which its BatchNorm has but does not use at a fixed momentum."""
        means = (s.hf for s in self.table.values() if s.kind == "stat" and s.hf.endswith("running_mean"))
        return {name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64) for name in means}

    def apply(
        self, params: Store, inputs: dict[str, jax.Array], *, cache: Any = None, first: bool = True, train: bool = False
    ) -> Output:
        """Pooled values and the head for a batch of images.

        Args:
          params: store keyed as `table`, adapters in place.
          inputs: "pixel_values" [B, C, H, W].
          cache: no use here.
          first: no use here.
          train: whether the batch's own statistics are used, unless `Numerics.batch_norm` is "frozen"; `Output.mutable`
            then holds where the running ones move.
        """
        p = nest(params)
        x = to_nhwc(jnp.asarray(inputs["pixel_values"]), self.config.num_channels).astype(self.dtype)
        mutable: Store = {}
        if train and self.numerics.batch_norm == "train":
            pooled, new = self.trunk.apply({"params": p}, x, mutable=[STAT])
            mutable = flatten_dict(new[STAT], sep="/")
        else:
            pooled = self.trunk.apply({"params": p}, x)
        made: Any = self.head_module.apply({"params": p}, pooled, None, None)
        hidden, head = made
        return Output(hidden, head, mutable=mutable)
