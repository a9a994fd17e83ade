"""Kernels in 8 bits with one scale per output (Dettmers et al. 2022, arXiv:2208.07339, section 2.1).

W[i, o] = codes[i, o] * absmax[o] / 127,   absmax[o] = max_i |W[i, o]|

model=Pretrained(path="my/llama", quantize=Int8())
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.quant.base import Storage
from ftjax.quant.by_output import ByOutput, scaled
from ftjax.registry import register

LARGEST = 127


@struct.dataclass
class Int8Weight(ByOutput):
    """A kernel by outputs.

    Attributes:
      codes: [in, out] int8, from -127 to 127.
    """

    def kernel(self) -> jax.Array:
        """See `Quantized`."""
        return self.codes.astype(jnp.float32) * (self.absmax / LARGEST)


@register("quant")
class Int8(Storage):
    """Block kernels in 8 bits."""

    name: Literal["int8"] = "int8"

    def pack(self, w: jax.Array, dtype: str) -> Int8Weight:
        """See `Storage`; an output without any weight keeps zeros."""
        values, absmax = scaled(w, LARGEST)
        inner, outer = w.shape
        return Int8Weight(jnp.round(values).astype(jnp.int8), absmax, (inner, outer), dtype)
