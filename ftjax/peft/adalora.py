"""AdaLoRA: a low-rank update in the form of a singular value decomposition (Zhang et al. 2023, arXiv:2303.10512, eq. 3).

y = x W + b + s * ((drop(x) A) * e) B,   A [in, r], e [r], B [r, out],   s = alpha / r

    peft=AdaLoRA(rank=12, alpha=32)

As in PEFT, s is alpha / (r + 1e-5), with the r that training began with. While training, triplets are given up until `target`
of them per weight are left on average (`ftjax.peft.adalora_budget`). Given up means e = 0: shapes stay. In files they are left
out (``rank_pattern``), and come back as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field, model_validator

from ftjax.errors import ConfigError
from ftjax.ops import dense
from ftjax.params import ParamSpec, Table, key_of, layer_keys
from ftjax.peft.adalora_budget import Budget, allocate
from ftjax.peft.base import CONST, Overlay
from ftjax.peft.interop import PREFIX, Tensors
from ftjax.peft.lora import dropout, up
from ftjax.peft.modules import Module, Targets
from ftjax.peft.weights import PlainCodec, WeightMethod, lead, wrong_number
from ftjax.registry import register
from ftjax.tree import Rules

_STD = 0.02  # of the first A and B, in the paper's code and in PEFT
_EPSILON = 1e-5  # what PEFT adds to the rank in the scale


@struct.dataclass
class AdaLoRADelta:
    """The update of one weight (all arrays lead with [layers] when stacked).

    Attributes:
      a: [in, r] float32.
      e: [r], zero at the start.
      b: [r, out].
      scale: scalar s; not trained.
      rate: dropout rate on the input; None when the method has no dropout. Not trained.
    """

    a: jax.Array
    e: jax.Array
    b: jax.Array
    scale: jax.Array
    rate: jax.Array | None = None

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]: the base's product plus the update's."""
        y = dense(x, base, bias)
        if key is not None and self.rate is not None:
            x = dropout(x, self.rate, key)
        z = x @ self.a.astype(x.dtype) * (self.e * self.scale).astype(x.dtype)
        return y + up(z, self.b.astype(x.dtype)).astype(y.dtype)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of each array: A is split as the weight's input side, B as its output side."""
        *first, inner, outer = spec.axes
        axes = {"a": (*first, inner, "rank"), "e": (*first, "rank"), "b": (*first, "rank", outer), "scale": (*first,)}
        return axes | ({"rate": (*first,)} if self.rate is not None else {})

    def merge(self, base: jax.Array) -> jax.Array:
        """W + s A diag(e) B, float32 (leading dimensions allowed)."""
        return base + (self.a * (self.e * self.scale[..., None])[..., None, :]) @ self.b


def deltas(tree: Any) -> dict[str, AdaLoRADelta]:
    """The method's entries of a tree like a run's store."""
    return {k: d for k, d in tree["overlay"].items() if isinstance(d, AdaLoRADelta)}


class AdaLoRACodec(PlainCodec):
    """AdaLoRA in PEFT's format: ``lora_A`` [k, in], ``lora_E`` [k, 1], ``lora_B`` [out, k]; k of r are left by the pattern."""

    peft_type = "ADALORA"
    READ = (
        "init_r", "lora_alpha", "lora_dropout", "rank_pattern", "r", "target_r", "tinit", "tfinal", "deltaT", "beta1",
        "beta2", "orth_reg_weight", "total_step", "eva_config", "qalora_group_size",
    )  # fmt: skip
    NEUTRAL: ClassVar = {"bias": ("none",), "init_lora_weights": (True,), "megatron_core": ("megatron.core",)}

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        lines = super().refuse(config) + wrong_number(config, "init_r", whole=True) + wrong_number(config, "lora_alpha")
        rate, rank = config.get("lora_dropout", 0.0), config.get("init_r")
        if type(rate) not in (int, float) or not 0 <= rate < 1:
            lines.append(f"lora_dropout={rate!r}  expected a number of at least 0 and below 1")
        pattern = config.get("rank_pattern") or {}
        if not isinstance(pattern, dict):
            return [*lines, f"rank_pattern={pattern!r}  expected an object"]
        for name, kept in pattern.items():
            if not isinstance(kept, list) or len(kept) != rank or not all(type(x) is bool for x in kept):
                lines.append(f"rank_pattern: {name}  expected {rank} times true or false")
        return lines

    def _kept(self, config: Mapping[str, Any], module: Module) -> np.ndarray:
        """[r] booleans: the triplets that are in the file."""
        pattern = config.get("rank_pattern") or {}
        return np.array(pattern.get(f"{module.name}.lora_E") or [True] * config["init_r"])

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """See `ModuleCodec`."""
        (inner, outer), k = module.spec.shape, int(self._kept(config, module).sum())
        return {"lora_A": (k, inner), "lora_E": (k, 1), "lora_B": (outer, k)}

    def arrays(self, entry: Any) -> Tensors:
        """See `ModuleCodec`."""
        a, e, b = (np.asarray(x) for x in (entry.a, entry.e, entry.b))
        return {"lora_A": a.T, "lora_E": e[:, None], "lora_B": b.T}

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`; what is pruned is left out, unless nothing has been trained yet."""
        settings, tensors = super().encode(overlay, table, method)
        kept = {n.removeprefix(PREFIX): x[:, 0] != 0 for n, x in tensors.items() if n.endswith(".lora_E")}
        if all(k.all() for k in kept.values()) or not any(k.any() for k in kept.values()):
            return settings, tensors
        for name, keep in kept.items():
            place = PREFIX + name.removesuffix("lora_E")
            for array, side in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
                tensors[place + array] = np.compress(keep, tensors[place + array], axis=side)
        return settings | {"rank_pattern": {name: keep.tolist() for name, keep in kept.items()}}, tensors

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> AdaLoRADelta:
        """See `ModuleCodec`."""
        kept, rate = self._kept(config, module), config.get("lora_dropout") or None
        (inner, outer), rank = module.spec.shape, config["init_r"]
        a, e, b = np.zeros((inner, rank), np.float32), np.zeros(rank, np.float32), np.zeros((rank, outer), np.float32)
        a[:, kept], e[kept], b[kept] = arrays["lora_A"].T, arrays["lora_E"][:, 0], arrays["lora_B"].T
        scale = jnp.float32(config["lora_alpha"] / (rank + _EPSILON))
        return AdaLoRADelta(
            jnp.asarray(a), jnp.asarray(e), jnp.asarray(b), scale, None if rate is None else jnp.float32(rate)
        )

    def settings(self, method: AdaLoRA, entries: Mapping[str, Any]) -> dict[str, Any]:
        """See `ModuleCodec`; the steps in all, which the method does not know, are the fewest that PEFT lets pass.

        Raises:
          ConfigError: the weights have unlike ranks or scales, for which the file has no place.
        """
        usual = np.float32(method.alpha / (method.rank + _EPSILON))
        if any(x.a.shape[-1] != method.rank or np.float32(x.scale) != usual for x in entries.values()):
            raise ConfigError("peft=adalora: the file has no place for ranks and scales other than the method's own")
        return {
            "init_r": method.rank, "target_r": method.target, "lora_alpha": method.alpha, "lora_dropout": method.dropout,
            "tinit": method.hold, "tfinal": method.settle, "deltaT": method.every, "beta1": method.beta1,
            "beta2": method.beta2, "orth_reg_weight": method.orth, "total_step": method.hold + method.settle + 1,
            "rank_pattern": None, "bias": "none", "init_lora_weights": True,
        }  # fmt: skip

    def method(self, config: Mapping[str, Any], targets: Targets) -> AdaLoRA:
        """See `ModuleCodec`."""
        return AdaLoRA(
            rank=config["init_r"], alpha=float(config["lora_alpha"]), dropout=float(config.get("lora_dropout", 0.0)),
            targets=targets.unnumbered, layers=targets.layers,
            **{ours: config[name] for name, ours in _SCHEDULE.items() if name in config},
            target=min(config.get("target_r", config["init_r"]), config["init_r"]),
        )  # fmt: skip


_SCHEDULE = {
    "tinit": "hold", "tfinal": "settle", "deltaT": "every", "beta1": "beta1", "beta2": "beta2",
    "orth_reg_weight": "orth",
}  # fmt: skip
"""PEFT's names of the schedule's numbers -> ours."""


@register("peft")
class AdaLoRA(WeightMethod):
    """A singular value decomposition beside each targeted weight."""

    hf_type: ClassVar[str | None] = "ADALORA"
    trained: ClassVar[Mapping[str, str]] = {"a": "adalora", "e": "adalora", "b": "adalora"}
    fixed: ClassVar[tuple[str, ...]] = ("scale",)
    hf_codec: ClassVar[AdaLoRACodec] = AdaLoRACodec()

    name: Literal["adalora"] = "adalora"
    rank: int = Field(12, gt=0, description="Triplets r of every update at the start.")
    target: int = Field(8, gt=0, description="Triplets of an update at the end, on average over all of them.")
    hold: int = Field(0, ge=0, description="First steps, before the budget falls.")
    settle: int = Field(0, ge=0, description="Last steps, at the final budget.")
    every: int = Field(1, gt=0, description="Steps from one choice of triplets to the next.")
    beta1: float = Field(0.85, gt=0, lt=1, description="Decay of the mean sensitivity of each number.")
    beta2: float = Field(0.85, gt=0, lt=1, description="Decay of the mean uncertainty of the sensitivity.")
    orth: float = Field(0.5, ge=0, description="Factor of the term that keeps A's columns and B's rows orthonormal.")
    alpha: float = Field(16.0, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate on the input of A.")

    @model_validator(mode="after")
    def _falls(self) -> AdaLoRA:
        if self.target > self.rank:
            raise ValueError(f"target={self.target} exceeds rank={self.rank}: the budget only falls")
        return self

    def check(self, run: Any) -> Iterable[str]:
        """The schedule's ends need a step between them."""
        if self.hold + self.settle >= run.train.steps:
            yield (
                f"peft.hold={self.hold}, peft.settle={self.settle}  leave no step of train.steps={run.train.steps} in which "
                "the budget could fall"
            )

    def around(self, tx: Any, hyper: Mapping[str, Any], step: jax.Array) -> Any:
        """The optimizer, which keeps the budget."""
        budget = Budget(self.target, self.hold, self.settle, self.every, self.beta1, self.beta2, self.orth)
        return allocate(tx, budget, total=hyper["total"], step=step, entries_of=deltas)

    def labels(self, table: Table) -> Rules:
        """One group; the rate of dropout is fixed where there is one."""
        return [*([("overlay/*/rate", CONST)] if self.dropout else []), *super().labels(table)]

    def delta(self, key: jax.Array, path: str, spec: ParamSpec, base: Any) -> AdaLoRADelta:
        """A and B normal, e = 0, so that the adapted model equals the base."""
        first, (inner, outer), r = lead(spec), spec.unstacked.shape, self.rank

        def normal(name: str, shape: tuple[int, int]) -> jax.Array:
            keys = layer_keys(key_of(key, name), path)

            def draw(k: jax.Array) -> jax.Array:
                return _STD * jax.random.normal(k, shape, jnp.float32)

            return jax.vmap(draw)(keys) if first else draw(keys)

        return AdaLoRADelta(
            a=normal("a", (inner, r)), e=jnp.zeros((*first, r), jnp.float32), b=normal("b", (r, outer)),
            scale=jnp.full(first, self.alpha / (r + _EPSILON), jnp.float32),
            rate=jnp.full(first, self.dropout, jnp.float32) if self.dropout else None,
        )  # fmt: skip
