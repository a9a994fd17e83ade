"""Prefix tuning: learned keys and values before those of every layer (Li & Liang 2021, arXiv:2101.00190).

attention(Q, [P_K; K], [P_V; V])

    peft=Prefix(tokens=16)

The prefix is seen from every example of a packed row and never enters the cache. As in PEFT its keys carry no rotation and
the tokens' positions begin behind it; and of an encoder and a decoder only the decoder's attention to itself has a prefix,
which stands before its tokens for the biases by relative position. `projection` trains a network that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ftjax.errors import ConfigError, DataError
from ftjax.params import ParamSpec, Store, Table, key_of, ranged
from ftjax.peft.base import CONST, FROZEN, Overlay
from ftjax.peft.interop import CONFIG_FILE, Codec, Tensors, check_settings
from ftjax.peft.prefix_projection import ProjectedPrefix
from ftjax.peft.prefix_tap import PrefixTap, ShiftTap
from ftjax.peft.soft import SITE, SoftCodec, only
from ftjax.registry import register
from ftjax.schema import Component
from ftjax.tree import Rules


def kv_sites(table: Table) -> dict[str, ParamSpec]:
    """Places of keys and values, stacked or not.

    Raises:
      ConfigError: the model has none.
    """
    found = {k: s for k, s in table.items() if s.kind == "site" and k.endswith("/attn_kv")}
    if not found or SITE not in table:
        raise ConfigError("peft=prefix: the model has no attention to put keys and values before")
    return found


def has_sides(table: Table) -> bool:
    """Whether an encoder's values are read by the decoder that has the prefix."""
    return any((r := ranged(k)) is not None and r.stack == "decoder" for k in kv_sites(table))


def twice(layers: int, pairs: int) -> np.ndarray:
    """Which pair of keys and values in PEFT's tensor is that of each decoder layer, where there are an encoder and a decoder.

    PEFT sets the pairs down twice and deals them out two to a layer, of which the second, meant for the attention to the
    encoder, is dropped again. So layer i has pair 2 i, counted round: of an odd number of pairs each comes up once.
    """
    return 2 * np.arange(layers) % pairs


def shift(tokens: int) -> Overlay:
    """The tap that lets the tokens' positions begin behind the prefix."""
    return {SITE: ShiftTap(jnp.zeros((tokens,), jnp.float32))}


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
        overlay = {k: e.spread(overlay) if hasattr(e, "spread") else e for k, e in overlay.items()}
        parts = sorted((ranged(k).start, e) for k, e in overlay.items() if k.endswith("/attn_kv"))  # type: ignore[union-attr]
        k, v = (np.concatenate([np.asarray(getattr(e, n)) for _, e in parts]) for n in "kv")
        L, n, K, H = k.shape
        sides = 2 if has_sides(table) else 1
        both = np.stack([k, v], axis=1)
        if sides == 2:
            pairs = np.zeros((L + 1 - L % 2, *both.shape[1:]), np.float32)
            pairs[twice(L, len(pairs))] = both
            both = pairs
        flat = both.transpose(2, 0, 1, 3, 4).reshape(n, 2 * len(both) * K * H)
        return {
            "num_virtual_tokens": n, "token_dim": K * H, "num_transformer_submodules": sides, "num_attention_heads": K,
            "num_layers": len(both), "encoder_hidden_size": K * H, "prefix_projection": False,
        }, {"prompt_embeddings": flat.astype(np.float32)}  # fmt: skip

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """See `Codec`. Layers that share a pair in the file of an encoder and decoder have copies of their own here."""
        ((key, spec),) = kv_sites(table).items()
        (L, K, H), n = spec.shape, int(config.get("num_virtual_tokens") or 0)
        sides = 2 if has_sides(table) else 1
        pairs: Any = config.get("num_layers") if sides == 2 else L
        if type(pairs) is not int or pairs < L:
            raise DataError(f"{CONFIG_FILE}: num_layers={pairs!r}, and the decoder has {L} layers")
        if (said := config.get("num_transformer_submodules")) not in (None, sides):
            raise DataError(f"{CONFIG_FILE}: num_transformer_submodules={said!r}, and this model calls for {sides}")
        both = only(tensors, (n, 2 * pairs * K * H)).reshape(n, -1, 2, K, H).transpose(1, 2, 0, 3, 4)
        both = both[twice(L, len(both))] if sides == 2 else both
        taps: Overlay = {key: PrefixTap(jnp.asarray(both[:, 0]), jnp.asarray(both[:, 1]))}
        return Prefix(tokens=n), taps if sides == 2 else taps | shift(n)


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
    std: float = Field(
        0.02, gt=0, description="Standard deviation of the initial keys and values; not of projected ones."
    )
    projection: bool = Field(False, description="Whether a network of two layers makes them while training.")
    hidden: int = Field(0, ge=0, description="Width of that network; 0: as wide as the keys of all heads.")

    def labels(self, table: Table) -> Rules:
        """Keys and values, or the network that makes them."""
        place = [] if has_sides(table) else [(f"overlay/{SITE}/places", CONST)]
        return [("overlay/*/attn_kv/*", "prefix"), *place, ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """Normal draws; a network's keys and values begin wherever it does."""

        def draw(name: str, spec: ParamSpec) -> jax.Array:
            shape = (*spec.shape[:-2], self.tokens, *spec.shape[-2:])
            return self.std * jax.random.normal(key_of(key, name), shape, jnp.float32)

        sites = kv_sites(table)
        taps: Overlay = {k: PrefixTap(draw(f"{k}/k", s), draw(f"{k}/v", s)) for k, s in sites.items()}
        if self.projection:
            taps = {k: ProjectedPrefix.begin(key, k, s, self.tokens, self.hidden) for k, s in sites.items()}
        return taps if has_sides(table) else taps | shift(self.tokens)
