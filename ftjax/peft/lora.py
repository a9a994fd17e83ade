"""LoRA: a low-rank update beside a frozen weight (Hu et al. 2021, arXiv:2106.09685, eq. 3).

y = x W + b + s * drop(x) A B,   A [in, r], B [r, out],   s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)

    peft=LoRA(rank=16, alpha=32, targets=("q_proj", "v_proj"))

Where A and B begin as a part of W (``start="pissa"`` or ``"olora"``), that part A0 B0 is taken off again: y = x W + b +
s (drop(x) A B - x A0 B0). The base stays as it is, and the result is a LoRA of rank 2 r over it.

Convolutions and embeddings have updates of their own: `ftjax.peft.lora_layers`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field, field_validator

from ftjax.errors import ConfigError
from ftjax.ops import dense
from ftjax.params import ParamSpec, Store, Table, bounds, cut, spec_of, unranged
from ftjax.peft import loftq
from ftjax.peft.base import CONST, FROZEN, Overlay, check_layers, select, subset
from ftjax.peft.interop import Tensors, check_settings
from ftjax.peft.lora_layers import LoRAConv, LoRAEmbed, dropout
from ftjax.peft.lora_start import DRAWS, FROM_QUANTIZED, FROM_WEIGHT, from_weight
from ftjax.peft.modules import Module, ModuleCodec, Targets, for_module
from ftjax.quant.base import Storage
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
      a0: [in, r] what A was at the start, if B was not zero there; None else. Not trained.
      b0: [r, out] likewise.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    rate: jax.Array | None = None
    a0: jax.Array | None = None
    b0: jax.Array | None = None

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]: the base's product plus the low-rank one."""
        y = dense(x, base, bias)
        return y + self.update(x, key).astype(y.dtype)

    def update(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> the low-rank product [..., out] alone."""
        kept = x if key is None or self.rate is None else dropout(x, self.rate, key)
        update = self._product(kept, self.a, self.b)
        if self.a0 is not None and self.b0 is not None:
            update = update - self._product(x, self.a0, self.b0)
        return update

    def _product(self, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return up(x @ a.astype(x.dtype) * self.scale.astype(x.dtype), b.astype(x.dtype))

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of each array: A is split as the weight's input side, B as its output side."""
        *lead, inner, outer = spec.axes
        axes = {"a": (*lead, inner, "rank"), "b": (*lead, "rank", outer), "scale": (*lead,), "rate": (*lead,)}
        axes |= {"a0": axes["a"], "b0": axes["b"]}
        return {name: axes[name] for name in axes if getattr(self, name) is not None}

    def merge(self, base: jax.Array) -> jax.Array:
        """W + s (A B - A0 B0), float32 (leading dimensions allowed)."""
        product = self.a @ self.b
        if self.a0 is not None and self.b0 is not None:
            product = product - self.a0 @ self.b0
        return base + self.scale[..., None, None] * product

    @staticmethod
    def largest_rank(spec: ParamSpec) -> int:
        """Beyond which the update gains nothing."""
        return min(spec.unstacked.shape)

    @staticmethod
    def file_shapes(spec: ParamSpec, rank: int) -> dict[str, tuple[int, ...]]:
        """Arrays of one layer in PEFT's file."""
        inner, outer = spec.shape
        return {"lora_A.weight": (rank, inner), "lora_B.weight": (outer, rank)}

    def to_file(self) -> Tensors:
        """One layer as the file has it."""
        return {"lora_A.weight": np.asarray(self.a).T, "lora_B.weight": np.asarray(self.b).T}

    @classmethod
    def from_file(cls, arrays: Tensors, scale: jax.Array, rate: jax.Array | None) -> LoRADelta:
        """The inverse of `to_file`."""
        a, b = (jnp.asarray(arrays[f"lora_{x}.weight"].T) for x in "AB")
        return cls(a, b, scale, rate)

    def plain(self) -> LoRADelta:
        """The same update as a pair alone: of twice the rank, [A A0] and [B; -B0], where there are two pairs."""
        if self.a0 is None or self.b0 is None:
            return self
        a, b = jnp.concatenate([self.a, self.a0], -1), jnp.concatenate([self.b, -self.b0], -2)
        return LoRADelta(a, b, self.scale, self.rate)


@jax.custom_vjp
def up(z: jax.Array, b: jax.Array) -> jax.Array:
    """z [..., r] times B [r, out].

    Only the order of factors in B's gradient is special: z^T dy, where JAX writes (dy^T z)^T. They are equal, but for
    the latter the CPU compiler transposes all of dy in memory first (7 % of a small model's step).
    """
    return z @ b


def _up_forward(z: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return z @ b, (z, b)


def _up_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    z, b = residuals
    rows = tuple(range(z.ndim - 1))
    return dy @ b.T, jax.lax.dot_general(z, dy, ((rows, rows), ((), ())))


up.defvjp(_up_forward, _up_backward)

DELTAS: dict[str, type[Any]] = {"kernel": LoRADelta, "conv": LoRAConv, "embed": LoRAEmbed}
"""The update by kind of weight."""


class LoRACodec(ModuleCodec):
    """LoRA in PEFT's format: two arrays per module, ``lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r] if linear."""

    peft_type = "LORA"
    kinds: ClassVar[tuple[str, ...]] = tuple(DELTAS)

    _READ = (
        "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "eva_config", "qalora_group_size",
    )  # fmt: skip
    # PiSSA, OLoRA, CorDA and LoftQ also change the base's weights, which an adapter folder does not hold; PEFT writes them as
    # plain LoRA, of twice the rank, with path_initial_model_for_weight_conversion.
    _NEUTRAL: ClassVar = {
        "bias": ("none",),
        "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
        "megatron_core": ("megatron.core",),
    }

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        lines = check_settings(config, read=self._READ, neutral=self._NEUTRAL)
        patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
        if wrong := [f"{k}={v!r}  expected an object" for k, v in patterns.items() if not isinstance(v, dict)]:
            return wrong
        ranks = {"r": config.get("r"), **patterns["rank_pattern"]}
        alphas = {"lora_alpha": config.get("lora_alpha"), **patterns["alpha_pattern"]}
        lines += [f"{k}={v!r}  expected an integer above 0" for k, v in ranks.items() if type(v) is not int or v < 1]
        bad = {k: v for k, v in alphas.items() if type(v) not in (int, float) or not 0 < v < math.inf}
        lines += [f"{k}={v!r}  expected a number above 0" for k, v in bad.items()]
        rate, rslora = config.get("lora_dropout", 0.0), config.get("use_rslora", False)
        if type(rate) not in (int, float) or not 0 <= rate < 1:
            lines.append(f"lora_dropout={rate!r}  expected a number of at least 0 and below 1")
        return lines + ([] if type(rslora) is bool else [f"use_rslora={rslora!r}  expected true or false"])

    def _rank(self, config: Mapping[str, Any], name: str) -> int:
        return for_module(name, config.get("rank_pattern"), config["r"])

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """See `ModuleCodec`."""
        return DELTAS[module.spec.kind].file_shapes(module.spec, self._rank(config, module.name))

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`; two pairs are written as one."""
        overlay = {k: d.plain() if isinstance(d, LoRADelta) else d for k, d in overlay.items()}
        return super().encode(overlay, table, method)

    def arrays(self, entry: Any) -> Tensors:
        """See `ModuleCodec`."""
        return entry.to_file()

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> Any:
        """See `ModuleCodec`."""
        rank = self._rank(config, module.name)
        alpha = for_module(module.name, config.get("alpha_pattern"), config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        rate = config.get("lora_dropout") or None
        fixed = jnp.float32(scale), None if rate is None else jnp.float32(rate)
        return DELTAS[module.spec.kind].from_file(arrays, *fixed)

    def settings(self, method: LoRA, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Ranks and scales are the overlay's own: a sweep may have varied them, or padded the ranks with zeros."""
        ranks = {name: entry.a.shape[-1] for name, entry in entries.items()}
        alphas = {
            name: _decimal(entry.scale, math.sqrt(ranks[name]) if method.rslora else ranks[name])
            for name, entry in entries.items()
        }
        r, alpha = _usual(ranks.values(), method.rank), _usual(alphas.values(), method.alpha)
        rate = next((x for e in entries.values() if (x := getattr(e, "rate", None)) is not None), None)
        return {
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": 0.0 if rate is None else float(_decimal(rate, 1)),
            "use_rslora": method.rslora,
            "rank_pattern": {name: x for name, x in ranks.items() if x != r},
            "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
            "use_dora": False,
            "bias": "none",
            "init_lora_weights": True,
            "modules_to_save": None,
        }

    def method(self, config: Mapping[str, Any], targets: Targets) -> LoRA:
        """See `ModuleCodec`."""
        return LoRA(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=targets.unnumbered,
            layers=targets.layers,
            rslora=config.get("use_rslora", False),
        )


def _usual(values: Iterable[Any], expected: Any) -> Any:
    """The value that needs no pattern: the expected one where it occurs, else the most frequent."""
    counted = Counter(values)
    return next((v for v in counted if v == expected), counted.most_common(1)[0][0])


def _decimal(x: Any, factor: float) -> float:
    """The shortest decimal number d with float32(d / factor) == x; an int where it is whole."""
    exact = float(x) * factor
    shortest = next(d for n in range(1, 18) if np.float32((d := float(f"{exact:.{n}g}")) / factor) == x)
    return int(shortest) if shortest.is_integer() else shortest


@register("peft")
class LoRA(Component):
    """Low-rank update beside each targeted weight."""

    mergeable: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = True
    hf_type: ClassVar[str | None] = "LORA"
    usual_lr: ClassVar[tuple[float, float]] = (5e-5, 2e-2)
    hf_codec: ClassVar[LoRACodec] = LoRACodec()
    kinds: ClassVar[tuple[str, ...]] = tuple(DELTAS)
    """Of weights that can be targets."""

    name: Literal["lora"] = "lora"
    rank: int = Field(8, gt=0, description="Rank r of the update.")
    alpha: float = Field(16.0, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate on the input of A.")
    targets: tuple[str, ...] = Field(
        ("all-linear",),
        min_length=1,
        description="Weights by name (q_proj or q), pattern, or all-linear (where there are none, all convolutions).",
    )
    layers: tuple[int, ...] = Field((), description="Only these layers, counted from 0; empty: all.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    ranks: tuple[tuple[str, int], ...] = Field(
        (),
        description="Ranks of some of the targets: pairs of a name or pattern and a rank; the first that fits counts.",
    )
    alphas: tuple[tuple[str, float], ...] = Field((), description="Alphas of some of the targets, likewise.")
    start: Literal["uniform", "gaussian", "pissa", "olora", "loftq"] = Field(
        "uniform",
        description="First values of A, with B = 0; or of both, as a part of the weight, or as what quantizing it took away.",
    )
    loftq_iterations: int = Field(
        1, gt=0, description="Turns of loftq; beyond the first the base is quantized anew, for this adapter alone."
    )
    train_a: bool = Field(True, description="Whether A is trained; if not, it is LoRA-FA (arXiv:2308.03303).")

    @field_validator("ranks", "alphas", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """A mapping, or JSON's lists, as pairs."""
        rows = value.items() if isinstance(value, dict) else value
        return tuple(tuple(x) if isinstance(x, list) else x for x in rows) if isinstance(rows, Iterable) else value

    @field_validator("ranks", "alphas")
    @classmethod
    def _above_zero(cls, value: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        for name, number in value:
            if number <= 0:
                raise ValueError(f"{name}: {number} is not above 0")
        return value

    def keys(self, table: Table) -> list[str]:
        """Store keys that get an update."""
        return list(self.sizes(table))

    def sizes(self, table: Table) -> dict[str, tuple[int, float]]:
        """Rank and scale by store key.

        Raises:
          ConfigError: a layer, a name or a rank that the model does not have.
        """
        check_layers(self.layers, table)
        chosen = select(table, self.targets, where="peft.targets", kinds=self.kinds)
        self._check_kinds(table, chosen)
        ranks = self._own(table, chosen, "ranks", self.rank)
        alphas = self._own(table, chosen, "alphas", self.alpha)
        sizes: dict[str, tuple[int, float]] = {}
        for key in chosen:
            rank, smallest = ranks[key], DELTAS[table[key].kind].largest_rank(table[key])
            if rank > smallest:
                raise ConfigError(f"peft.rank={rank} exceeds {smallest}, the smaller side of {unranged(key)}")
            scale = alphas[key] / (math.sqrt(rank) if self.rslora else rank)
            sizes |= dict.fromkeys(subset(key, self.layers), (rank, scale))
        return sizes

    def _check_kinds(self, table: Table, chosen: list[str]) -> None:
        """Refuses settings that a chosen convolution or embedding has no use for."""
        other = {table[k].kind: k for k in chosen if table[k].kind != "kernel"}
        if other and self.start not in DRAWS:
            raise ConfigError(f"peft.start={self.start!r} is for matrices, which {next(iter(other.values()))} is not")
        if "embed" in other and not self.train_a:
            raise ConfigError(f"peft.train_a=False: A of {other['embed']} begins at zero and B would learn nothing")

    def _own(self, table: Table, chosen: list[str], field: str, usual: Any) -> dict[str, Any]:
        """The numbers of one field by target; those that no pair names have the usual one."""
        found: dict[str, Any] = {}
        for name, number in getattr(self, field):
            hit = [key for key in select(table, (name,), where=f"peft.{field}", kinds=self.kinds) if key in chosen]
            if not hit:
                raise ConfigError(f"peft.{field}: {name!r} is not among the targets")
            found = dict.fromkeys(hit, number) | found
        return dict.fromkeys(chosen, usual) | found

    def labels(self, table: Table) -> Rules:
        """A and B are groups of their own, so that they can learn at different rates (LoRA+)."""
        dropped = self.dropout and any(spec_of(table, k).kind != "embed" for k in self.keys(table))
        still = ["scale"] + (["rate"] if dropped else []) + (["a0", "b0"] if self.start in FROM_WEIGHT else [])
        const = [(f"overlay/*/{leaf}", CONST) for leaf in still]
        a = "lora_a" if self.train_a else CONST
        return [("overlay/*/a", a), ("overlay/*/b", "lora_b"), *const, ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """An update of zero, so that the adapted model equals the base."""
        sizes = self.sizes(table)
        parts = cut(params, bounds(sizes)) if self.start not in DRAWS else {}
        return {k: self.delta(key, k, spec_of(table, k), *size, parts.get(k)) for k, size in sizes.items()}

    def delta(self, key: jax.Array, path: str, spec: ParamSpec, rank: int, scale: float, base: Any) -> Any:
        """The update of one weight at step 0."""
        lead = spec.shape[:1] if spec.stacked else ()
        fixed = jnp.full(lead, scale, jnp.float32), jnp.full(lead, self.dropout, jnp.float32) if self.dropout else None
        if self.start in FROM_WEIGHT:
            a, b = from_weight(self.start, base, rank, scale, stacked=spec.stacked)
            return LoRADelta(a, b, *fixed, jnp.copy(a), jnp.copy(b))
        if self.start in FROM_QUANTIZED:
            return LoRADelta(*loftq.start(self, path, base, scale), *fixed)
        if spec.kind != "kernel":
            return DELTAS[spec.kind].begin(key, path, spec, rank, *fixed, DRAWS[self.start])
        b = jnp.zeros((*lead, rank, spec.shape[-1]), jnp.float32)
        return LoRADelta(DRAWS[self.start](key, path, spec, rank), b, *fixed)

    def storage(self, quantize: Storage, *, begins: bool = True) -> Storage:
        """How the base is to be held: as asked, or as LoftQ has it, with what it found for `init` where a run `begins`."""
        plain = self.start not in FROM_QUANTIZED or not (begins or self.loftq_iterations > 1)
        return quantize if plain else loftq.LoftQ(storage=quantize, method=self)

    def check(self, run: Any) -> Iterable[str]:
        """The start may need a quantized base."""
        packs = getattr(getattr(run.model, "quantize", None), "packs", False)
        if self.start in FROM_QUANTIZED and not packs:
            yield f"{loftq.refusal(self)}, and model.quantize is none"
