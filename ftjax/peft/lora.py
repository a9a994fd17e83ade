"""LoRA: a low-rank update beside a frozen weight (Hu et al. 2021, arXiv:2106.09685, eq. 3).

y = x W + b + s * drop(x) A B,   A [in, r], B [r, out],   s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)

    peft=LoRA(rank=16, alpha=32, targets=("q_proj", "v_proj"))
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from ftjax.errors import ConfigError
from ftjax.ops import dense
from ftjax.params import ParamSpec, Store, Table, key_of, ranged, spec_of, unranged
from ftjax.peft.base import CONST, FROZEN, Overlay, select, subset
from ftjax.registry import register
from ftjax.schema import Component
from ftjax.tree import Rules


@struct.dataclass
class LoRADelta:
    """The update of one weight (all arrays lead with [layers] when stacked).

    Attributes:
      a: [in, r] float32.
      b: [r, out] float32, zero at the start.
      scale: scalar s; not trained.
      rate: dropout rate on the input of A; None when the method has no dropout. Not trained.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    rate: jax.Array | None = None

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]: the base's product plus the low-rank one."""
        y = dense(x, base, bias)
        if key is not None and self.rate is not None:
            x = dropout(x, self.rate, key)
        z = x @ self.a.astype(x.dtype) * self.scale.astype(x.dtype)
        return y + (z @ self.b.astype(x.dtype)).astype(y.dtype)

    def merge(self, base: jax.Array) -> jax.Array:
        """W + s A B, float32 (leading dimensions allowed)."""
        return base + self.scale[..., None, None] * (self.a @ self.b)


def dropout(x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Inverted dropout with a traced rate: entries are kept with probability 1 - rate and scaled by 1 / (1 - rate)."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


def draw_a(key: jax.Array, path: str, spec: ParamSpec, rank: int) -> jax.Array:
    """A's initial values, uniform within 1 / sqrt(in) as PEFT draws them (kaiming with a = sqrt 5): [(layers,) in, rank].

    Each of the rank's columns has a key of its own: a draw of rank 16 begins with the draw of rank 8, which lets trials
    of unequal rank train as one program by zero padding.
    """
    bound = 1 / math.sqrt(spec.unstacked.shape[0])

    def column(k: jax.Array) -> jax.Array:
        return jax.random.uniform(k, spec.unstacked.shape[:1], jnp.float32, -bound, bound)

    def layer(k: jax.Array) -> jax.Array:
        return jax.vmap(lambda i: column(jax.random.fold_in(k, i)))(jnp.arange(rank)).T

    key = key_of(key, unranged(path) + "/lora_a")
    r = ranged(path)
    if r is None:
        return layer(key)
    return jax.vmap(lambda i: layer(jax.random.fold_in(key, i)))(jnp.arange(r.start, r.stop))


@register("peft")
class LoRA(Component):
    """Low-rank update beside each targeted weight."""

    mergeable: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = True
    hf_type: ClassVar[str | None] = "LORA"

    name: Literal["lora"] = "lora"
    rank: int = Field(8, gt=0, description="Rank r of the update.")
    alpha: float = Field(16.0, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate on the input of A.")
    targets: tuple[str, ...] = Field(
        ("all-linear",), min_length=1, description="Weights by name (q_proj or q), pattern, or all-linear."
    )
    layers: tuple[int, ...] = Field((), description="Only these layers, counted from 0; empty: all.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")

    @property
    def scale(self) -> float:
        """The factor s on the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def keys(self, table: Table) -> list[str]:
        """Store keys that get an update."""
        beyond = [i for i in self.layers if not 0 <= i < max(r.stop for k in table if (r := ranged(k)))]
        if beyond:
            raise ConfigError(f"peft.layers={beyond[0]}: the model has no such layer")
        chosen = select(table, self.targets, where="peft.targets")
        for key in chosen:
            if self.rank > min(table[key].unstacked.shape):
                smallest = min(table[key].unstacked.shape)
                raise ConfigError(f"peft.rank={self.rank} exceeds {smallest}, the smaller side of {unranged(key)}")
        return [part for key in chosen for part in subset(key, self.layers)]

    def labels(self, table: Table) -> Rules:
        """A and B are groups of their own, so that they can learn at different rates (LoRA+)."""
        const = [("overlay/*/scale", CONST)] + ([("overlay/*/rate", CONST)] if self.dropout else [])
        return [("overlay/*/a", "lora_a"), ("overlay/*/b", "lora_b"), *const, ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """B = 0, so that the adapted model equals the base."""
        return {k: self.delta(key, k, spec_of(table, k)) for k in self.keys(table)}

    def delta(self, key: jax.Array, path: str, spec: ParamSpec) -> LoRADelta:
        """The update of one weight at step 0."""
        lead = spec.shape[:1] if spec.stacked else ()
        return LoRADelta(
            a=draw_a(key, path, spec, self.rank),
            b=jnp.zeros((*lead, self.rank, spec.shape[-1]), jnp.float32),
            scale=jnp.full(lead, self.scale, jnp.float32),
            rate=jnp.full(lead, self.dropout, jnp.float32) if self.dropout else None,
        )

    def check(self, run: Any) -> Iterable[str]:
        """Nothing that other parts of a run could contradict."""
        return ()
