"""NF4: 4 bits per weight at the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, section 3).

    W = NF4[code] * absmax[block],   blocks of 64;   absmax = D8[code8] * absmax2[block2] + mean,   blocks of 256

Blocks run through the kernel by rows of outputs, [out, in], as torch's Linear holds it, so codes and scales are those of
bitsandbytes. With double quantization a weight takes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits.

    model=Pretrained(path="my/llama", quantize=NF4())
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from ftjax.params import ParamSpec
from ftjax.quant.base import Quantized, Storage
from ftjax.registry import register

BLOCK, NESTED_BLOCK = 64, 256

# Appendix E of the paper: means of adjoining quantiles of N(0, 1), 8 at and above zero and 8 at and below, scaled to [-1, 1].
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def dynamic_values() -> np.ndarray:
    """The 256 signed values of dynamic 8-bit quantization (arXiv:2110.02861, section 2.1), ascending, float32.

    Seven decades, 1e-6 to 1; decade k is cut into 2^k equal parts between its tenth and itself, whose middles count, with
    either sign. 0 and 1 complete the table.
    """
    values = [np.float32(0), np.float32(1)]
    for k in range(7):
        edges = _even(0.1, 1, 2**k + 1)
        decade = np.float32(10.0 ** (k - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*decade, *-decade]
    return np.sort(np.array(values, np.float32))


def _even(start: float, stop: float, n: int) -> np.ndarray:
    """Evenly spaced float32 numbers from either end to the middle, each rounded once: so the published tables are made."""
    first, last = float(np.float32(start)), float(np.float32(stop))
    step, at = float(np.float32(last - first) / np.float32(n - 1)), np.arange(n)
    return np.where(at < n // 2, first + step * at, last - step * (n - 1 - at)).astype(np.float32)


D8_VALUES = dynamic_values()


def middles(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Midpoints between adjoining values, float32: a number above the midpoint belongs to the upper value."""
    exact = np.asarray(values, np.float64)
    return ((exact[:-1] + exact[1:]) / 2).astype(np.float32)


@struct.dataclass
class NF4Weight(Quantized):
    """A kernel by blocks of 64 inputs of one output; a kernel whose inputs do not fill blocks, as one flat row.

    Attributes:
      codes: [out, in / 2] uint8, the earlier weight in the upper 4 bits; flat: [blocks * 32].
      absmax: [out, in / 64] uint8, codes into `D8_VALUES`, or float32 without double quantization; flat: [blocks].
      absmax2: [blocks / 256] float32, the scale of `absmax`; None without double quantization.
      mean: scalar float32, what was taken off `absmax` first; None likewise.
    """

    codes: jax.Array
    absmax: jax.Array
    absmax2: jax.Array | None
    mean: jax.Array | None
    sides: tuple[int, int] = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    @property
    def flat(self) -> bool:
        """Whether blocks run across outputs."""
        return self.sides[0] % BLOCK != 0

    @property
    def layers(self) -> int:
        """See `Quantized`."""
        return self.codes.shape[0] if self.codes.ndim > (1 if self.flat else 2) else 0

    def scales(self) -> jax.Array:
        """The largest absolute value of each block, in the shape of `absmax`, float32."""
        if self.absmax2 is None or self.mean is None:
            return self.absmax
        nested = jnp.repeat(self.absmax2, NESTED_BLOCK)[: self.absmax.size].reshape(self.absmax.shape)
        return look_up(self.absmax, D8_VALUES) * nested + self.mean

    def kernel(self) -> jax.Array:
        """See `Quantized`."""
        inner, outer = self.sides
        codes = jnp.stack([self.codes >> 4, self.codes & 15], axis=-1)
        values = look_up(codes.reshape(*self.absmax.shape, BLOCK), NF4_VALUES)
        rows = (values * self.scales()[..., None]).reshape(*self.absmax.shape[:-1], -1)
        return (rows[: inner * outer].reshape(outer, inner) if self.flat else rows).T

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Codes and scales are split as the kernel is; the scales of scales lie everywhere."""
        *lead, inner, outer = spec.axes
        sides = (None,) if self.flat else (outer, inner)
        axes = {"codes": (*lead, *sides), "absmax": (*lead, *sides)}
        return axes | ({} if self.absmax2 is None else {"absmax2": (*lead, None), "mean": (*lead,)})


def look_up(codes: jax.Array, values: Any) -> jax.Array:
    """The float32 value of each code.

    A gather, on purpose: in a tree of `where`s every constant is broadcast to the kernel's shape, and XLA moves those
    broadcasts out of the loop over layers, where they are held at full size (16 kernels' worth).
    """
    return jnp.asarray(np.asarray(values, np.float32)).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def nearest_nf4(x: jax.Array) -> jax.Array:
    """The code of the nearest value to each x in [-1, 1], uint8: the number of midpoints below it."""
    return sum(((x > m).astype(jnp.uint8) for m in middles(NF4_VALUES)), jnp.zeros(x.shape, jnp.uint8))


def _blocks(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """A flat array in rows of `size`, filled up with zeros: (each row over its largest absolute value, those values)."""
    rows = jnp.pad(x, (0, -x.size % size)).reshape(-1, size)
    absmax = jnp.abs(rows).max(axis=1)
    inverse = jnp.where(absmax > 0, 1 / jnp.where(absmax > 0, absmax, 1), 0)
    return rows * inverse[:, None], absmax


@register("quant")
class NF4(Storage):
    """Block kernels in 4 bits at normal quantiles."""

    name: Literal["nf4"] = "nf4"
    double: bool = Field(True, description="Quantize the blocks' scales too: 4.127 bits per weight instead of 4.5.")

    def pack(self, w: jax.Array, dtype: str) -> NF4Weight:
        """See `Storage`."""
        inner, outer = w.shape
        scaled, absmax = _blocks(w.T.reshape(-1), BLOCK)
        codes = nearest_nf4(scaled)
        codes = codes[:, ::2] << 4 | codes[:, 1::2]
        whole = inner % BLOCK == 0
        codes = codes.reshape(outer, inner // 2) if whole else codes.reshape(-1)
        grid = (outer, inner // BLOCK) if whole else (-1,)
        if not self.double:
            return NF4Weight(codes, absmax.reshape(grid), None, None, (inner, outer), dtype)
        # Rounded as it is stored: fused with the subtraction, it would not be.
        mean = jax.lax.optimization_barrier(absmax.mean())
        scaled, absmax2 = _blocks(absmax - mean, NESTED_BLOCK)
        codes8 = jnp.searchsorted(jnp.asarray(middles(D8_VALUES)), scaled, side="left").astype(jnp.uint8)
        codes8 = codes8.reshape(-1)[: absmax.size].reshape(grid)
        return NF4Weight(codes, codes8, absmax2, mean, (inner, outer), dtype)
