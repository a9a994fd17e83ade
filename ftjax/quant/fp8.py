"""Kernels in 8-bit floating point, E4M3, with one scale per output (Micikevicius et al. 2022, arXiv:2209.05433, section 3).

W[i, o] = e4m3(codes[i, o]) * absmax[o] / 448,   absmax[o] = max_i |W[i, o]|

model=Pretrained(path="my/llama", quantize=FP8())
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.quant.base import Storage
from ftjax.quant.by_output import ByOutput, scaled
from ftjax.registry import register

LARGEST = 448
"""The largest finite E4M3 number, 1.75 * 2^8; the format has no infinity."""


@struct.dataclass
class FP8Weight(ByOutput):
    """A kernel by outputs.

    Attributes:
      codes: [in, out] uint8, the bits of float8_e4m3fn numbers from -448 to 448. As bits, because a compiler without
        that type carries such an array through the loop over layers in float16, at twice the size.
    """

    def kernel(self) -> jax.Array:
        """See `Quantized`."""
        values = jax.lax.bitcast_convert_type(self.codes, jnp.float8_e4m3fn)
        return values.astype(jnp.float32) * (self.absmax / LARGEST)


@register("quant")
class FP8(Storage):
    """Block kernels in 8-bit floating point."""

    name: Literal["fp8"] = "fp8"

    def pack(self, w: jax.Array, dtype: str) -> FP8Weight:
        """See `Storage`; an output without any weight keeps zeros."""
        values, absmax = scaled(w, LARGEST)
        codes = jax.lax.bitcast_convert_type(values.astype(jnp.float8_e4m3fn), jnp.uint8)
        inner, outer = w.shape
        return FP8Weight(codes, absmax, (inner, outer), dtype)
