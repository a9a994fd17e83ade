"""P-tuning: virtual tokens made by a small network (Liu et al. 2021, arXiv:2103.10385).

tokens = W3 relu(W2 relu(W1 E + b1) + b2) + b3,   E [n, D] learned

    peft=PTuning(tokens=16, hidden=128)

Only what the network makes is exported, as PEFT does. The paper's own encoder is in `ftjax.peft.p_tuning_lstm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from ftjax.params import ParamSpec, Store, Table, key_of
from ftjax.peft.base import FROZEN, Overlay
from ftjax.peft.p_tuning_lstm import LSTMTap
from ftjax.peft.soft import SITE, SoftCodec, in_front, width
from ftjax.registry import register
from ftjax.schema import Component
from ftjax.tree import Rules


@struct.dataclass
class EncodedTap:
    """Inputs `e` [n, D] and the network: w1 [D, hidden], w2 [hidden, hidden], w3 [hidden, D], biases."""

    e: jax.Array
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array
    w3: jax.Array
    b3: jax.Array

    @property
    def shift(self) -> int:
        """By how much the tokens' positions are moved on."""
        return self.e.shape[0]

    def tokens(self) -> jax.Array:
        """The virtual tokens [n, D]."""
        h = jax.nn.relu(self.e @ self.w1 + self.b1)
        return jax.nn.relu(h @ self.w2 + self.b2) @ self.w3 + self.b3

    def __call__(self, seq: Any, _: Any) -> Any:
        """The sequence with the virtual tokens in front."""
        return in_front(seq, self.tokens())

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Small: not split."""
        return {k: (None,) * getattr(self, k).ndim for k in ("e", "w1", "b1", "w2", "b2", "w3", "b3")}


class PTuningCodec(SoftCodec):
    """P-tuning in PEFT's format: the tokens that the network made."""

    peft_type = "P_TUNING"
    READ = (
        *SoftCodec.READ,
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    )

    def settings_of(self, method: PTuning) -> dict[str, Any]:
        """See `SoftCodec`."""
        return {"encoder_reparameterization_type": method.encoder.upper(), "encoder_hidden_size": method.hidden,
                "encoder_num_layers": method.depth, "encoder_dropout": 0.0}  # fmt: skip

    def method_of(self, config: Mapping[str, Any]) -> PTuning:
        """See `SoftCodec`."""
        lstm = str(config.get("encoder_reparameterization_type")).upper() == "LSTM"
        return PTuning(
            tokens=config["num_virtual_tokens"], hidden=config.get("encoder_hidden_size") or 128,
            encoder="lstm" if lstm else "mlp", depth=(lstm and config.get("encoder_num_layers")) or 2,
        )  # fmt: skip


@register("peft")
class PTuning(Component):
    """Virtual tokens made by a network of three layers, or by an LSTM and two."""

    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False
    hf_type: ClassVar[str | None] = "P_TUNING"
    usual_lr: ClassVar[tuple[float, float]] = (1e-4, 1e-1)
    hf_codec: ClassVar[PTuningCodec] = PTuningCodec()

    name: Literal["p_tuning"] = "p_tuning"
    tokens: int = Field(16, gt=0, description="Number of virtual tokens.")
    hidden: int = Field(128, gt=0, description="Width of the network.")
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="What makes them: three layers, or an LSTM and two.")
    depth: int = Field(2, gt=0, description="Layers of the LSTM; the other network does not read it.")

    def labels(self, table: Table) -> Rules:
        """All of it."""
        width(table, self.name)
        return [(f"overlay/{SITE}/*", "p_tuning"), ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """E drawn with the embedding's spread, layers as torch draws them, zero biases."""
        dim, hidden = width(table, self.name), self.hidden
        std = jnp.std(jnp.asarray(params["embed/w"], jnp.float32))

        def layer(name: str, inner: int, outer: int) -> jax.Array:
            bound = 1 / math.sqrt(inner)
            return jax.random.uniform(key_of(key, f"{SITE}/{name}"), (inner, outer), jnp.float32, -bound, bound)

        def zeros(n: int) -> jax.Array:
            return jnp.zeros((n,), jnp.float32)

        e = std * jax.random.normal(key_of(key, f"{SITE}/e"), (self.tokens, dim), jnp.float32)
        if self.encoder == "lstm":
            return {SITE: LSTMTap.begin(key, e, hidden, self.depth)}
        return {
            SITE: EncodedTap(
                e, layer("w1", dim, hidden), zeros(hidden), layer("w2", hidden, hidden), zeros(hidden),
                layer("w3", hidden, dim), zeros(dim),
            )
        }  # fmt: skip
