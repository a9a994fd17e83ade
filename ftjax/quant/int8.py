"""Kernels in 8 bits with one scale per output (Dettmers et al. 2022, arXiv:2208.07339, section 2.1).

W[i, o] = codes[i, o] * absmax[o] / 127,   absmax[o] = max_i |W[i, o]|

model=Pretrained(path="my/llama", quantize=Int8())
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.params import ParamSpec
from ftjax.quant.base import Quantized, Storage
from ftjax.registry import register

LARGEST = 127


@struct.dataclass
class Int8Weight(Quantized):
    """A kernel by outputs.

    Attributes:
      codes: [in, out] int8, from -127 to 127.
      absmax: [out] float32.
    """

    codes: jax.Array
    absmax: jax.Array
    sides: tuple[int, int] = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    @property
    def layers(self) -> int:
        """See `Quantized`."""
        return self.codes.shape[0] if self.codes.ndim == 3 else 0

    def kernel(self) -> jax.Array:
        """See `Quantized`."""
        return self.codes.astype(jnp.float32) * (self.absmax / LARGEST)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """As the kernel's own."""
        return {"codes": spec.axes, "absmax": (*spec.axes[:-2], spec.axes[-1])}


@register("quant")
class Int8(Storage):
    """Block kernels in 8 bits."""

    name: Literal["int8"] = "int8"

    def pack(self, w: jax.Array, dtype: str) -> Int8Weight:
        """See `Storage`; an output without any weight keeps zeros."""
        absmax = jnp.abs(w).max(axis=0)
        codes = jnp.round(w * (LARGEST / jnp.where(absmax > 0, absmax, 1)))
        inner, outer = w.shape
        return Int8Weight(codes.astype(jnp.int8), absmax, (inner, outer), dtype)
