"""VeRA: random projections that all weights share, and two trained vectors per weight (Kopiczko et al. 2024, arXiv:2310.11454).

y = x W + b + ((drop(x) P * d) Q) * e,   P [in, r] and Q [r, out] drawn once;   e = 0 at the start, d a constant

    peft=VeRA(rank=256, targets=("q_proj", "v_proj"))

A weight narrower than the widest target uses the first rows of P and the first columns of Q, as in PEFT. A layer is computed
from what is its own, so that every weight holds a copy of its part of P and Q: rank * (in + out) numbers of float32. They are
drawn again from the run's seed when a run goes on, and are no part of its checkpoints.
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

from ftjax.errors import ConfigError, DataError, listing
from ftjax.ops import dense
from ftjax.params import ParamSpec, Store, Table, key_of, spec_of
from ftjax.peft.base import CONST, FROZEN, Overlay
from ftjax.peft.interop import Tensors
from ftjax.peft.lora import dropout, up
from ftjax.peft.modules import Module, Targets, per_module
from ftjax.peft.weights import PlainCodec, WeightMethod, lead, wrong_number
from ftjax.registry import register
from ftjax.tree import Rules


@struct.dataclass
class VeRADelta:
    """The update of one weight (all arrays lead with [layers] when stacked).

    Attributes:
      d: [r] float32, factors between the projections (the paper's d).
      e: [out] float32, factors on the outputs (the paper's b), zero at the start.
      p: [in, r] float32, this weight's rows of the shared projection; not trained.
      q: [r, out] float32, likewise.
      rate: dropout rate on the input; None when the method has no dropout. Not trained.
    """

    d: jax.Array
    e: jax.Array
    p: jax.Array
    q: jax.Array
    rate: jax.Array | None = None

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]: the base's product plus the projected one."""
        y = dense(x, base, bias)
        if key is not None and self.rate is not None:
            x = dropout(x, self.rate, key)
        z = x @ self.p.astype(x.dtype) * self.d.astype(x.dtype)
        return y + (up(z, self.q.astype(x.dtype)) * self.e.astype(x.dtype)).astype(y.dtype)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of each array: P is split as the weight's input side, Q and e as its output side."""
        *first, inner, outer = spec.axes
        axes = {"d": (*first, "rank"), "e": (*first, outer), "p": (*first, inner, "rank"), "q": (*first, "rank", outer)}
        return axes | ({"rate": (*first,)} if self.rate is not None else {})

    def merge(self, base: jax.Array) -> jax.Array:
        """W + P diag(d) Q diag(e), float32 (leading dimensions allowed)."""
        return base + (self.p * self.d[..., None, :]) @ (self.q * self.e[..., None, :])


class VeRACodec(PlainCodec):
    """VeRA in PEFT's format: ``vera_lambda_d`` [r] and ``vera_lambda_b`` [out] per module, ``vera_A`` and ``vera_B`` once."""

    peft_type = "VERA"
    READ = ("r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection", "init_weights")
    NEUTRAL: ClassVar = {"bias": ("none",)}
    _SHARED: ClassVar = {"A": "base_model.vera_A", "B": "base_model.vera_B"}

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        lines = super().refuse(config) + wrong_number(config, "r", whole=True)
        rate = config.get("vera_dropout", 0.0)
        if type(rate) not in (int, float) or not 0 <= rate < 1:
            lines.append(f"vera_dropout={rate!r}  expected a number of at least 0 and below 1")
        if not config.get("save_projection", True):
            lines.append(
                "save_projection=False  the projections vera_A and vera_B are not in the file, and torch's random numbers "
                "cannot be drawn again here: save the adapter with save_projection=True"
            )
        return lines

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """See `ModuleCodec`; the shared projections are read by `decode`."""
        return {"vera_lambda_d": (config["r"],), "vera_lambda_b": (module.spec.shape[1],)}

    def arrays(self, entry: VeRADelta) -> Tensors:
        """See `ModuleCodec`."""
        return {"vera_lambda_d": np.asarray(entry.d), "vera_lambda_b": np.asarray(entry.e)}

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> VeRADelta:
        """See `ModuleCodec`; the parts of the projections are put in by `decode`."""
        r, rate = config["r"], config.get("vera_dropout") or None
        return VeRADelta(
            d=jnp.asarray(arrays["vera_lambda_d"]),
            e=jnp.asarray(arrays["vera_lambda_b"]),
            p=jnp.zeros((0, r)),
            q=jnp.zeros((r, 0)),
            rate=None if rate is None else jnp.float32(rate),
        )

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`.

        Raises:
          ConfigError: the weights do not share one pair of projections.
        """
        settings, tensors = super().encode(overlay, table, method)
        entries = [entry for _, entry in per_module(overlay, table).values()]
        p = max((np.asarray(e.p) for e in entries), key=len)
        q = max((np.asarray(e.q) for e in entries), key=lambda x: x.shape[1])
        for e in entries:
            if not (np.array_equal(e.p, p[: len(e.p)]) and np.array_equal(e.q, q[:, : e.q.shape[1]])):
                raise ConfigError("peft=vera: the weights have unlike projections, for which the file has no place")
        return settings, tensors | {self._SHARED["A"]: p.T, self._SHARED["B"]: q.T}

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """See `Codec`."""
        tensors = dict(tensors)
        a, b = (tensors.pop(name, None) for name in self._SHARED.values())
        if a is None or b is None:
            raise DataError(f"the projections {' and '.join(self._SHARED.values())} are not in the file")
        method, overlay = super().decode(config, tensors, table, params)
        specs = {key: spec_of(table, key) for key in overlay}
        inner, outer = (max(s.shape[side] for s in specs.values()) for side in (-2, -1))
        fits = {"A": (a.shape, (config["r"], inner)), "B": (b.shape, (outer, config["r"]))}
        problems = [
            f"misshapen  {self._SHARED[x]} {list(found)}, expected {list(wanted)}"
            for x, (found, wanted) in fits.items()
            if found != wanted
        ]
        if problems:
            raise DataError(listing("the adapter does not fit the model", problems))
        p, q = jnp.asarray(a.T), jnp.asarray(b.T)
        return method, {key: _sharing(entry, p, q, specs[key]) for key, entry in overlay.items()}

    def settings(self, method: VeRA, entries: Mapping[str, Any]) -> dict[str, Any]:
        """See `ModuleCodec`; PEFT wants a number for its generator although nothing is drawn from it."""
        return {"r": method.rank, "d_initial": method.d_initial, "vera_dropout": method.dropout, "bias": "none",
                "projection_prng_key": 0, "save_projection": True, "init_weights": True}  # fmt: skip

    def method(self, config: Mapping[str, Any], targets: Targets) -> VeRA:
        """See `ModuleCodec`."""
        return VeRA(
            rank=config["r"],
            dropout=float(config.get("vera_dropout", 0.0)),
            d_initial=float(config.get("d_initial", 0.1)),
            targets=targets.unnumbered,
            layers=targets.layers,
        )


def _sharing(entry: VeRADelta, p: jax.Array, q: jax.Array, spec: ParamSpec) -> VeRADelta:
    """An entry with its parts of the projections P [widest in, r] and Q [r, widest out]."""
    first, (inner, outer) = lead(spec), spec.unstacked.shape
    p, q = p[:inner], q[:, :outer]
    return dc.replace(entry, p=jnp.broadcast_to(p, (*first, *p.shape)), q=jnp.broadcast_to(q, (*first, *q.shape)))


@register("peft")
class VeRA(WeightMethod):
    """Trained vectors around random projections that all weights share."""

    hf_type: ClassVar[str | None] = "VERA"
    trained: ClassVar[Mapping[str, str]] = {"d": "vera", "e": "vera"}
    hf_codec: ClassVar[VeRACodec] = VeRACodec()
    usual_lr: ClassVar[tuple[float, float]] = (1e-4, 5e-2)

    name: Literal["vera"] = "vera"
    rank: int = Field(
        256, gt=0, description="Width r of the projections; only r + out numbers of a weight are trained."
    )
    d_initial: float = Field(0.1, description="First value of the factors between the projections.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate on the input of the first projection.")

    def labels(self, table: Table) -> Rules:
        """The projections count as frozen: they are as large as LoRA's arrays and never change."""
        still = [("overlay/*/p", FROZEN), ("overlay/*/q", FROZEN)]
        return [*still, *([("overlay/*/rate", CONST)] if self.dropout else []), *super().labels(table)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """One draw for all weights, uniform as PEFT's; e = 0."""
        specs = {k: spec_of(table, k) for k in self.keys(table)}
        inner, outer = (max(s.shape[side] for s in specs.values()) for side in (-2, -1))
        p, q = (
            jax.random.uniform(key_of(key, name), shape, jnp.float32, -bound, bound)
            for name, shape, bound in (
                ("p", (inner, self.rank), math.sqrt(6 / inner)),
                ("q", (self.rank, outer), math.sqrt(6 / self.rank)),
            )
        )
        return {k: _sharing(self.delta(key, k, spec, None), p, q, spec) for k, spec in specs.items()}

    def delta(self, key: jax.Array, path: str, spec: ParamSpec, base: Any) -> VeRADelta:
        """The trained vectors; the projections are put in by `init`."""
        first, r = lead(spec), self.rank
        return VeRADelta(
            d=jnp.full((*first, r), self.d_initial, jnp.float32),
            e=jnp.zeros((*first, spec.shape[-1]), jnp.float32),
            p=jnp.zeros((*first, 0, r)),
            q=jnp.zeros((*first, r, 0)),
            rate=jnp.full(first, self.dropout, jnp.float32) if self.dropout else None,
        )
