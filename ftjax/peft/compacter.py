"""Compacter: adapters whose projections are sums of Kronecker products (Karimi Mahabadi et al. 2021, arXiv:2106.04647).

y + act(x H_down + d) H_up + u,   H = sum_i A_i (x) s_i t_i^T,  i = 1 .. n

    peft=Compacter(blocks=4, reduction=32)

The small A_i [n, n] are one set for the whole model, the slow weights; s_i and t_i are every projection's own. Where adapters
stand is Houlsby's choice, or with `plus` (Compacter++) Pfeiffer's. t of H_up begins at zero, so that the adapted model equals
the base; the paper's start is only near it, with A_i of size 1e-4, which here would leave hardly a gradient: A_i are drawn with
standard deviation 1 / sqrt(n).
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from ftjax.errors import ConfigError, DataError
from ftjax.params import ParamSpec, Store, Table, key_of, layer_keys, spec_of
from ftjax.peft.adapter import PHM_SETTINGS, Bottleneck, BottleneckCodec, Input, NonLinearity, adapter_sites
from ftjax.peft.adapterhub import Arrays, hub_name
from ftjax.peft.base import CONST, FROZEN, Overlay
from ftjax.peft.interop import Tensors
from ftjax.registry import register
from ftjax.schema import Component
from ftjax.tree import Rules


def kronecker_sum(rule_nab: jax.Array, left_npk: jax.Array, right_nkq: jax.Array | None) -> jax.Array:
    """sum_i A_i (x) W_i [a p, b q], W_i = left_i right_i, or left_i itself where there is no right."""
    w_npq = left_npk if right_nkq is None else jnp.einsum("npk,nkq->npq", left_npk, right_nkq)
    h = jnp.einsum("nab,npq->apbq", rule_nab, w_npq)
    return h.reshape(h.shape[0] * h.shape[1], -1)


@struct.dataclass
class CompacterTap(Bottleneck):
    """One adapter, [L, ...] stacked but for `rule`; n blocks of rank k, D wide outside and m inside.

    Attributes:
      rule: A [n, n, n], held by the first site of an overlay alone; `spread` lends it to the others.
      down_left: [n, D / n, k]; without rank [n, D / n, m / n].
      down_right: [n, k, m / n]; None without rank.
      down_bias: [m].
      up_left: [n, m / n, k]; without rank [n, m / n, D / n].
      up_right: [n, k, D / n]; None without rank.
      up_bias: [D].
    """

    rule: jax.Array | None
    down_left: jax.Array
    down_right: jax.Array | None
    down_bias: jax.Array
    up_left: jax.Array
    up_right: jax.Array | None
    up_bias: jax.Array

    def spread(self, overlay: Mapping[str, Any]) -> CompacterTap:
        """The same with the overlay's one rule at every layer; gradients add up over them."""
        rule = next(e.rule for e in overlay.values() if isinstance(e, CompacterTap) and e.rule is not None)
        n = rule.shape[-1]
        return dc.replace(
            self, rule=jnp.broadcast_to(rule, (*self.scale.shape, n, n, n)) if rule.ndim == 3 else self.rule
        )

    def project(self, x: jax.Array) -> jax.Array:
        """See `Bottleneck`."""
        assert self.rule is not None
        down = kronecker_sum(self.rule, self.down_left, self.down_right).astype(x.dtype)
        up = kronecker_sum(self.rule, self.up_left, self.up_right).astype(x.dtype)
        return self.act(x @ down + self.down_bias.astype(x.dtype)) @ up + self.up_bias.astype(x.dtype)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Small: not split."""
        lead, fields = spec.axes[:-1], {f.name: getattr(self, f.name) for f in dc.fields(self)}
        arrays = {k: v for k, v in fields.items() if hasattr(v, "ndim")}
        own = {k: (*lead, *(None,) * (v.ndim - len(lead))) for k, v in arrays.items()}
        return own | ({"rule": (None,) * 3} if self.rule is not None else {})


class CompacterCodec(BottleneckCodec):
    """Compacter and Compacter++ in AdapterHub's format; the shared rule stands among the model's shared parameters."""

    read = BottleneckCodec.read | PHM_SETTINGS | {"mh_adapter", "original_ln_before"}

    def __init__(self) -> None:
        super().__init__("compacter", parts=(True, True), phm_layer=True)

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        lines = super().refuse(config)
        places = (bool(config.get("mh_adapter")), bool(config.get("original_ln_before")))
        if places not in ((True, False), (False, True)):
            lines.append(
                f"mh_adapter={places[0]}, original_ln_before={places[1]}  is neither Compacter nor Compacter++"
            )
        needed = {"shared_phm_rule": True, "factorized_phm_rule": False, "shared_W_phm": False, "phm_bias": True}
        for name, value in needed.items():
            if config.get(name, value) != value:
                lines.append(f"{name}={config[name]!r}  is not supported; supported: {value!r}")
        return lines

    def config_of(self, method: Any, overlay: Overlay, table: Table) -> dict[str, Any]:
        """See `HubCodec`."""
        return {
            **super().config_of(method, overlay, table),
            "mh_adapter": not method.plus, "original_ln_before": method.plus, "phm_dim": method.blocks,
            "phm_rank": max(method.rank, 1), "factorized_phm_W": method.rank > 0, "shared_phm_rule": True,
        }  # fmt: skip

    def settings_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `BottleneckCodec`."""
        rank = int(config.get("phm_rank", 1)) if config.get("factorized_phm_W", True) else 0
        return {"blocks": int(config.get("phm_dim", 4)), "rank": rank, "plus": not config.get("mh_adapter")}

    def arrays(self, tap: Any) -> Arrays:
        """See `HubCodec`."""
        return {name: v for name, field in _names(tap).items() if (v := getattr(tap, field)) is not None}

    def tap_of(self, arrays: Arrays, like: Any) -> Any:
        """See `HubCodec`."""
        names = _names(like)
        return dc.replace(like, **{names[name]: value for name, value in arrays.items()})

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`."""
        settings, tensors = super().encode(overlay, table, method)
        rule = next(tap.rule for tap in overlay.values() if tap.rule is not None)
        return settings, tensors | {self.shared(table, overlay, {}): np.asarray(jax.device_get(rule), np.float32)}

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """See `Codec`."""
        name = self.shared(table, self.method_of(config, table).keys(table), config)
        rule = tensors.get(name)
        method, overlay = super().decode(config, {k: v for k, v in tensors.items() if k != name}, table, params)
        n = method.blocks
        if rule is None or rule.shape != (n, n, n):
            raise DataError(f"{name}  {'missing' if rule is None else list(rule.shape)}, expected {[n, n, n]}")
        return method, {
            k: dc.replace(tap, rule=jnp.asarray(rule)) if tap.rule is not None else tap for k, tap in overlay.items()
        }

    def shared(self, table: Table, keys: Mapping[str, Any], config: Mapping[str, Any]) -> str:
        """The rule's name in the file, under the base model's own."""
        base = self.module(table, next(iter(keys))).split(".")[0]
        return f"{base}.shared_parameters.{hub_name(config)}.phm_rule"


def _names(tap: CompacterTap) -> dict[str, str]:
    """Names in the file -> fields of the tap."""
    both = {"adapter_down.0": "down", "adapter_up": "up"}
    if tap.down_right is None:
        return {f"{f}.W": f"{t}_left" for f, t in both.items()} | {f"{f}.b": f"{t}_bias" for f, t in both.items()}
    parts = {"W_left": "left", "W_right": "right", "b": "bias"}
    return {f"{f}.{a}": f"{t}_{b}" for f, t in both.items() for a, b in parts.items()}


@register("peft")
class Compacter(Component):
    """Adapters of Kronecker products with slow weights in common."""

    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = True
    hf_type: ClassVar[str | None] = None
    usual_lr: ClassVar[tuple[float, float]] = (1e-4, 3e-2)
    hf_codec: ClassVar[CompacterCodec] = CompacterCodec()

    name: Literal["compacter"] = "compacter"
    blocks: int = Field(4, gt=0, description="Kronecker products in a sum, n; it divides both widths.")
    rank: int = Field(1, ge=0, description="Rank of each product's large factor; 0: the factor is full.")
    reduction: int = Field(32, gt=0, description="Width of the hidden values over that of the bottleneck.")
    activation: NonLinearity = Field("gelu", description="Non-linearity of the bottleneck.")
    scale: float = Field(1.0, gt=0, description="Factor on what the adapter adds.")
    plus: bool = Field(False, description="Compacter++: one adapter per layer, where Pfeiffer's stands.")
    layers: tuple[int, ...] = Field((), description="Only these layers, counted from 0; empty: all.")

    def keys(self, table: Table) -> dict[str, Input]:
        """Sites of the adapters -> what they read."""
        places: dict[str, Input] = {"mlp_out": "sum"} if self.plus else {"attn_out": "output", "mlp_out": "output"}
        found = adapter_sites(table, places, self.layers, name=self.name)
        for key in found:
            D = spec_of(table, key).shape[-1]
            if D % self.blocks or not D // self.reduction or D // self.reduction % self.blocks:
                raise ConfigError(
                    f"peft.blocks={self.blocks} does not divide the widths {D} and {D // self.reduction} (of the "
                    f"bottleneck, peft.reduction={self.reduction})"
                )
        return found

    def labels(self, table: Table) -> Rules:
        """All but the scale; the rule is a group of its own."""
        self.keys(table)
        groups = [("overlay/*/rule", "rule"), ("overlay/*", "compacter")]
        return [("overlay/*/scale", CONST), *groups, ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """See the module; s and t by Glorot."""
        n = self.blocks
        rule: Any = jax.random.normal(key_of(key, "rule"), (n, n, n), jnp.float32) / math.sqrt(n)
        overlay: Overlay = {}
        for k, reads in self.keys(table).items():
            overlay[k] = self.tap(layer_keys(key, k), spec_of(table, k), reads=reads, rule=None if overlay else rule)
        return overlay

    def tap(self, keys: jax.Array, spec: ParamSpec, *, reads: Input, rule: jax.Array | None) -> CompacterTap:
        """One site's adapters at step 0; `keys` [L] if it is stacked."""
        lead, D, n, k = spec.shape[:-1], spec.shape[-1], self.blocks, self.rank
        m = D // self.reduction
        p, q = D // n, m // n

        def glorot(name: str, rows: int, columns: int) -> jax.Array:
            std = math.sqrt(2 / (rows + columns))
            draw = lambda key: std * jax.random.normal(key_of(key, name), (n, rows, columns), jnp.float32)  # noqa: E731
            return jax.vmap(draw)(keys) if spec.stacked else draw(keys)

        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros((*lead, *shape), jnp.float32)

        return CompacterTap(
            scale=jnp.full(lead, self.scale, jnp.float32), reads=reads, activation=self.activation, rule=rule,
            down_left=glorot("down_left", p, k or q), down_right=glorot("down_right", k, q) if k else None,
            down_bias=zeros(m), up_left=glorot("up_left", q, k) if k else zeros(n, q, p),
            up_right=zeros(n, k, p) if k else None, up_bias=zeros(D),
        )  # fmt: skip
