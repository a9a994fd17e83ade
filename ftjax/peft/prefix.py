"""Prefix tuning: learned keys and values before those of every layer (Li & Liang 2021, arXiv:2101.00190).

attention(Q, [P_K; K], [P_V; V])

    peft=Prefix(tokens=16)

The prefix is seen from every example of a packed row and never enters the cache. As in PEFT its keys carry no position and
the tokens' positions begin behind it. The reparameterisation by a network during training is not built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from ftjax.errors import ConfigError
from ftjax.ops import GLOBAL_SEGMENT
from ftjax.params import ParamSpec, Store, Table, key_of, ranged
from ftjax.peft.base import CONST, FROZEN, Overlay
from ftjax.peft.interop import Codec, Tensors, check_settings
from ftjax.peft.soft import SITE, SoftCodec, only
from ftjax.registry import register
from ftjax.schema import Component
from ftjax.tree import Rules


@struct.dataclass
class PrefixTap:
    """Keys and values [n, K, H] of one layer, [L, n, K, H] stacked."""

    k: jax.Array
    v: jax.Array

    def __call__(self, kv: Any, seq: Any) -> Any:
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


def kv_sites(table: Table) -> dict[str, ParamSpec]:
    """Places of keys and values, stacked or not.

    Raises:
      ConfigError: the model has none.
    """
    found = {k: s for k, s in table.items() if s.kind == "site" and k.endswith("/attn_kv")}
    if not found or SITE not in table:
        raise ConfigError("peft=prefix: the model has no attention to put keys and values before")
    return found


class PrefixCodec(Codec):
    """Prefix tuning in PEFT's format: one tensor [n, 2 L K H], keys and values taking turns, layer by layer."""

    peft_type = "PREFIX_TUNING"

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        # A projection is not in the file: what it made is.
        return check_settings(
            config,
            read=(*SoftCodec.READ, "encoder_hidden_size", "prefix_projection"),
            neutral={"init_weights": (True,)},
        )

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`."""
        parts = sorted((ranged(k).start, e) for k, e in overlay.items() if k.endswith("/attn_kv"))  # type: ignore[union-attr]
        k, v = (np.concatenate([np.asarray(getattr(e, n)) for _, e in parts]) for n in "kv")
        L, n, K, H = k.shape
        both = np.stack([k, v], axis=1).transpose(2, 0, 1, 3, 4).reshape(n, 2 * L * K * H)
        return {
            "num_virtual_tokens": n, "token_dim": K * H, "num_transformer_submodules": 1, "num_attention_heads": K,
            "num_layers": L, "encoder_hidden_size": K * H, "prefix_projection": False,
        }, {"prompt_embeddings": both.astype(np.float32)}  # fmt: skip

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """See `Codec`."""
        ((key, spec),) = kv_sites(table).items()
        (L, K, H), n = spec.shape, int(config.get("num_virtual_tokens") or 0)
        both = only(tensors, (n, 2 * L * K * H)).reshape(n, L, 2, K, H).transpose(1, 2, 0, 3, 4)
        taps: Overlay = {key: PrefixTap(jnp.asarray(both[:, 0]), jnp.asarray(both[:, 1]))}
        return Prefix(tokens=n), taps | {SITE: ShiftTap(jnp.zeros((n,), jnp.float32))}


@register("peft")
class Prefix(Component):
    """Learned keys and values in every layer."""

    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False
    hf_type: ClassVar[str | None] = "PREFIX_TUNING"
    usual_lr: ClassVar[tuple[float, float]] = (1e-4, 1e-1)
    hf_codec: ClassVar[PrefixCodec] = PrefixCodec()

    name: Literal["prefix"] = "prefix"
    tokens: int = Field(16, gt=0, description="Number of virtual tokens.")
    std: float = Field(0.02, gt=0, description="Standard deviation of the initial keys and values.")

    def labels(self, table: Table) -> Rules:
        """Keys and values."""
        kv_sites(table)
        taps = [("overlay/*/k", "prefix"), ("overlay/*/v", "prefix")]
        return [*taps, (f"overlay/{SITE}/places", CONST), ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """Normal draws."""

        def draw(name: str, spec: ParamSpec) -> jax.Array:
            shape = (*spec.shape[:-2], self.tokens, *spec.shape[-2:])
            return self.std * jax.random.normal(key_of(key, name), shape, jnp.float32)

        taps: Overlay = {k: PrefixTap(draw(f"{k}/k", s), draw(f"{k}/v", s)) for k, s in kv_sites(table).items()}
        return taps | {SITE: ShiftTap(jnp.zeros((self.tokens,), jnp.float32))}
