"""What kernels with 8-bit codes and one scale per output have in common.

W[i, o] = value(codes[i, o]) * absmax[o] / largest,   absmax[o] = max_i |W[i, o]|
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.params import ParamSpec
from ftjax.quant.base import Quantized


@struct.dataclass
class ByOutput(Quantized):
    """A kernel by outputs; subclasses say what a code stands for.

    Attributes:
      codes: [in, out], 8 bits each.
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

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """As the kernel's own."""
        return {"codes": spec.axes, "absmax": (*spec.axes[:-2], spec.axes[-1])}


def scaled(w: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    """(w so that the largest of each output is `largest` in magnitude, absmax [out]); an output of zeros keeps zeros."""
    absmax = jnp.abs(w).max(axis=0)
    return w * (largest / jnp.where(absmax > 0, absmax, 1)), absmax
