"""What prefix tuning puts into a model: keys and values at every layer, and a shift of the tokens' positions.

attention(Q, [P_K; K], [P_V; V])     (Li & Liang 2021, arXiv:2101.00190)

    {"layers[0:4]/attn_kv": PrefixTap(k, v), "input/tap": ShiftTap(places)}
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.ops import GLOBAL_SEGMENT
from ftjax.params import ParamSpec


@struct.dataclass
class PrefixTap:
    """Keys and values [n, K, H] of one layer, [L, n, K, H] stacked."""

    k: jax.Array
    v: jax.Array

    @property
    def columns(self) -> int:
        """How many keys it puts in front."""
        return self.k.shape[-3]

    def __call__(self, kv: Any, seq: Any, **around: Any) -> Any:
        """The layer's keys and values with the prefix in front."""
        B, n = kv.k.shape[0], self.k.shape[0]

        def before(x: jax.Array, rest: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.broadcast_to(x.astype(rest.dtype), (B, *x.shape)), rest], axis=1)

        return kv.replace(
            k=before(self.k, kv.k), v=before(self.v, kv.v),
            positions=before(jnp.zeros((n,), kv.positions.dtype), kv.positions),
            segments=before(jnp.full((n,), GLOBAL_SEGMENT, kv.segments.dtype), kv.segments),
        )  # fmt: skip

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Split by heads, as keys and values are."""
        each = (*spec.axes[:-2], None, *spec.axes[-2:])
        return {"k": each, "v": each}


@struct.dataclass
class ShiftTap:
    """Moves the tokens' positions on by `places` [n] without adding columns; its length is what counts."""

    places: jax.Array

    @property
    def shift(self) -> int:
        """By how much."""
        return self.places.shape[0]

    def __call__(self, seq: Any, _: Any) -> Any:
        """The sequence as it is: the model has read `shift`."""
        return seq

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Not split."""
        return {"places": (None,)}
