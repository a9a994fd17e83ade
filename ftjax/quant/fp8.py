"""Kernels in 8-bit floating point, E4M3, with one scale per output (Micikevicius et al. 2022, arXiv:2209.05433, section 3).

W[i, o] = e4m3(codes[i, o]) * absmax[o] / 448,   absmax[o] = max_i |W[i, o]|

model=Pretrained(path="my/llama", quantize=FP8())
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.params import ParamSpec
from ftjax.quant.base import Quantized, Storage
from ftjax.registry import register

LARGEST = 448
"""The largest finite E4M3 number, 1.75 * 2^8; the format has no infinity."""


@struct.dataclass
class FP8Weight(Quantized):
    """A kernel by outputs.

    Attributes:
      codes: [in, out] uint8, the bits of float8_e4m3fn numbers from -448 to 448. As bits, because a compiler without
        that type carries such an array through the loop over layers in float16, at twice the size.
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
        values = jax.lax.bitcast_convert_type(self.codes, jnp.float8_e4m3fn)
        return values.astype(jnp.float32) * (self.absmax / LARGEST)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """As the kernel's own."""
        return {"codes": spec.axes, "absmax": (*spec.axes[:-2], spec.axes[-1])}


@register("quant")
class FP8(Storage):
    """Block kernels in 8-bit floating point."""

    name: Literal["fp8"] = "fp8"

    def pack(self, w: jax.Array, dtype: str) -> FP8Weight:
        """See `Storage`; an output without any weight keeps zeros."""
        absmax = jnp.abs(w).max(axis=0)
        values = w * (LARGEST / jnp.where(absmax > 0, absmax, 1))
        codes = jax.lax.bitcast_convert_type(values.astype(jnp.float8_e4m3fn), jnp.uint8)
        inner, outer = w.shape
        return FP8Weight(codes, absmax, (inner, outer), dtype)
