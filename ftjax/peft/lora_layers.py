"""LoRA on what is no matrix product: convolutions and the lookup of embeddings (as in PEFT; Hu et al. 2021, arXiv:2106.09685).

convolution   y = conv(x, W) + b + s * conv(drop(x), A) B,   A [height, width, in, r] of W's own stride and padding, B [r, out]
embedding     y = W[ids] + s * A[ids] B,                      A [V, r] zero at the start, B [r, D] normal

    peft=LoRA(rank=8, targets=("convolution", "embed"))

Where the table of tokens is the output head too, the head stays as it was: only the lookup is adapted.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ftjax.ops import conv, embed
from ftjax.params import ParamSpec
from ftjax.peft.interop import Tensors
from ftjax.peft.lora_start import by_column

Draw = Callable[[jax.Array, str, ParamSpec, int], jax.Array]


def dropout(x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Inverted dropout with a traced rate: entries are kept with probability 1 - rate and scaled by 1 / (1 - rate)."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


@struct.dataclass
class LoRAConv:
    """The update of one convolution (all arrays lead with [layers] when stacked).

    Attributes:
      a: [height, width, in, r] float32.
      b: [r, out] float32, zero at the start.
      scale: scalar s; not trained.
      rate: dropout rate on the input of A, or None. Not trained.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    rate: jax.Array | None = None

    def conv(self, x: jax.Array, base: Any, key: jax.Array | None, *, stride: int, padding: int) -> jax.Array:
        """x [B, H, W, in] -> [B, H', W', out]: the base's convolution plus the low-rank one."""
        y = conv(x, base, stride=stride, padding=padding)
        kept = x if key is None or self.rate is None else dropout(x, self.rate, key)
        inner = conv(kept, self.a, stride=stride, padding=padding) * self.scale.astype(x.dtype)
        return y + (inner @ self.b.astype(x.dtype)).astype(y.dtype)

    def merge(self, base: jax.Array) -> jax.Array:
        """W + s A B over the channels, float32 (a leading dimension allowed)."""
        return base + self.scale[..., None, None, None, None] * (self.a @ self.b[..., None, None, :, :])

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """A is split as the kernel but for its outputs, B as those."""
        *lead, height, width, inner, outer = spec.axes
        axes = {"a": (*lead, height, width, inner, "rank"), "b": (*lead, "rank", outer)}
        return axes | {name: (*lead,) for name in ("scale", "rate") if getattr(self, name) is not None}

    @classmethod
    def begin(
        cls, key: jax.Array, path: str, spec: ParamSpec, rank: int, scale: jax.Array, rate: jax.Array | None, draw: Draw
    ) -> Self:
        """An update of zero: A drawn as that of a matrix with height * width * in inputs."""
        *lead, height, width, inner, outer = spec.shape
        flat = dc.replace(spec, shape=(*lead, height * width * inner, outer), axes=(*spec.axes[:-4], None, None))
        a = draw(key, path, flat, rank).reshape(*lead, height, width, inner, rank)
        return cls(a, jnp.zeros((*lead, rank, outer), jnp.float32), scale, rate)

    @staticmethod
    def largest_rank(spec: ParamSpec) -> int:
        """Beyond which the update gains nothing."""
        *inputs, outer = spec.unstacked.shape
        return min(math.prod(inputs), outer)

    @staticmethod
    def file_shapes(spec: ParamSpec, rank: int) -> dict[str, tuple[int, ...]]:
        """Arrays of one layer in PEFT's file: torch's convolutions of [out, in, height, width]."""
        height, width, inner, outer = spec.shape
        return {"lora_A.weight": (rank, inner, height, width), "lora_B.weight": (outer, rank, 1, 1)}

    def to_file(self) -> Tensors:
        """One layer as the file has it."""
        a, b = np.asarray(self.a), np.asarray(self.b)
        return {"lora_A.weight": a.transpose(3, 2, 0, 1), "lora_B.weight": b.T[..., None, None]}

    @classmethod
    def from_file(cls, arrays: Tensors, scale: jax.Array, rate: jax.Array | None) -> Self:
        """The inverse of `to_file`."""
        a, b = arrays["lora_A.weight"], arrays["lora_B.weight"]
        return cls(jnp.asarray(a.transpose(2, 3, 1, 0)), jnp.asarray(b[..., 0, 0].T), scale, rate)


@struct.dataclass
class LoRAEmbed:
    """The update of one table's lookup; there is no dropout, as in PEFT.

    Attributes:
      a: [rows, r] float32, zero at the start.
      b: [r, D] float32.
      scale: scalar s; not trained.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array

    def embed(self, ids: jax.Array, base: Any, dtype: Any) -> jax.Array:
        """Rows [..., D] for ids [...]: the base's plus the low-rank ones."""
        update = embed(ids, self.a, dtype) * self.scale.astype(dtype) @ self.b.astype(dtype)
        # Tables are added up (words, positions, types). The barrier keeps the order of additions as it is without an adapter,
        # which XLA may otherwise change, so that an update of zero leaves every bit as it was.
        return jax.lax.optimization_barrier(embed(ids, base, dtype) + update)

    def merge(self, base: jax.Array) -> jax.Array:
        """W + s A B, float32 (a leading dimension allowed)."""
        return base + self.scale[..., None, None] * (self.a @ self.b)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """A is split by rows as the table, B as its columns."""
        *lead, rows, dim = spec.axes
        return {"a": (*lead, rows, "rank"), "b": (*lead, "rank", dim), "scale": (*lead,)}

    @classmethod
    def begin(
        cls, key: jax.Array, path: str, spec: ParamSpec, rank: int, scale: jax.Array, rate: jax.Array | None, draw: Draw
    ) -> Self:
        """An update of zero. Whatever `draw` is, A is zero and B normal, as in PEFT: a row that is not met does not move."""
        *lead, rows, dim = spec.shape
        turned = dc.replace(spec, shape=(*lead, dim, rows))
        b = by_column(key, path + "/b", turned, rank, lambda k, n: jax.random.normal(k, (n,), jnp.float32))
        return cls(jnp.zeros((*lead, rows, rank), jnp.float32), jnp.swapaxes(b, -1, -2), scale)

    @staticmethod
    def largest_rank(spec: ParamSpec) -> int:
        """Beyond which the update gains nothing."""
        return min(spec.unstacked.shape)

    @staticmethod
    def file_shapes(spec: ParamSpec, rank: int) -> dict[str, tuple[int, ...]]:
        """Arrays in PEFT's file, whose names are not those of other modules."""
        rows, dim = spec.shape
        return {"lora_embedding_A": (rank, rows), "lora_embedding_B": (dim, rank)}

    def to_file(self) -> Tensors:
        """As the file has it."""
        return {"lora_embedding_A": np.asarray(self.a).T, "lora_embedding_B": np.asarray(self.b).T}

    @classmethod
    def from_file(cls, arrays: Tensors, scale: jax.Array, rate: jax.Array | None) -> Self:
        """The inverse of `to_file`; the file's dropout is not for this module."""
        a, b = (jnp.asarray(arrays[f"lora_embedding_{x}"].T) for x in "AB")
        return cls(a, b, scale)
