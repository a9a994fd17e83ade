"""LoHa: the elementwise product of two low-rank updates, of rank up to r^2 (Hyeon-Woo et al. 2021, arXiv:2108.06098, eq. 2).

y = x (W + s (P1 Q1) * (P2 Q2)) + b,   P [in, r], Q [r, out],   s = alpha / r;   P2 = 0 at the start

    peft=LoHa(rank=8, alpha=8)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from ftjax.ops import dense
from ftjax.params import ParamSpec
from ftjax.peft.interop import Tensors
from ftjax.peft.modules import Module, Targets, for_module
from ftjax.peft.weights import PlainCodec, WeightMethod, draw, kaiming, lead, wrong_number
from ftjax.registry import register


@struct.dataclass
class LoHaDelta:
    """The four factors and the scale; `p2` is zero at the start."""

    p1: jax.Array
    q1: jax.Array
    p2: jax.Array
    q2: jax.Array
    scale: jax.Array

    def update(self) -> jax.Array:
        """What is added to the weight [..., in, out], float32."""
        return self.scale[..., None, None] * (self.p1 @ self.q1) * (self.p2 @ self.q2)

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        return dense(x, base, bias) + x @ self.update().astype(x.dtype)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """The sides of each factor as those of the weight."""
        *first, inner, outer = spec.axes
        p, q = (*first, inner, "rank"), (*first, "rank", outer)
        return {"p1": p, "q1": q, "p2": p, "q2": q, "scale": (*first,)}

    def merge(self, base: jax.Array) -> jax.Array:
        """W + the update."""
        return base + self.update()


class LoHaCodec(PlainCodec):
    """LoHa in PEFT's format: ``hada_w1_a`` [out, r], ``hada_w1_b`` [r, in], and the same with 2."""

    peft_type = "LOHA"
    LACKS = ("fan_in_fan_out",)
    READ = ("r", "alpha", "rank_pattern", "alpha_pattern")
    NEUTRAL: ClassVar = {"init_weights": (True,), "rank_dropout": (0.0,), "module_dropout": (0.0,)}

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        return super().refuse(config) + wrong_number(config, "r", whole=True) + wrong_number(config, "alpha")

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """See `ModuleCodec`."""
        (inner, outer), r = module.spec.shape, for_module(module.name, config.get("rank_pattern"), config["r"])
        return {f"hada_w{i}_{side}": (outer, r) if side == "a" else (r, inner) for i in (1, 2) for side in "ab"}

    def arrays(self, entry: LoHaDelta) -> Tensors:
        """See `ModuleCodec`."""
        pairs = {"1": (entry.q1, entry.p1), "2": (entry.q2, entry.p2)}
        return {
            f"hada_w{i}_{side}": np.asarray(x).T
            for i, both in pairs.items()
            for side, x in zip("ab", both, strict=True)
        }

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> LoHaDelta:
        """See `ModuleCodec`."""
        rank = for_module(module.name, config.get("rank_pattern"), config["r"])
        alpha = for_module(module.name, config.get("alpha_pattern"), config["alpha"])
        q1, p1, q2, p2 = (jnp.asarray(arrays[f"hada_w{i}_{side}"].T) for i in (1, 2) for side in "ab")
        return LoHaDelta(p1, q1, p2, q2, jnp.float32(alpha / rank))

    def settings(self, method: LoHa, entries: Mapping[str, Any]) -> dict[str, Any]:
        """See `ModuleCodec`."""
        return {"r": method.rank, "alpha": method.alpha, "init_weights": True, "rank_dropout": 0.0, "module_dropout": 0.0,
                "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip

    def method(self, config: Mapping[str, Any], targets: Targets) -> LoHa:
        """See `ModuleCodec`."""
        return LoHa(rank=config["r"], alpha=float(config["alpha"]), targets=targets.unnumbered, layers=targets.layers)


@register("peft")
class LoHa(WeightMethod):
    """Elementwise product of two low-rank updates."""

    hf_type: ClassVar[str | None] = "LOHA"
    trained: ClassVar[Mapping[str, str]] = {"p1": "loha", "q1": "loha", "p2": "loha", "q2": "loha"}
    fixed: ClassVar[tuple[str, ...]] = ("scale",)
    hf_codec: ClassVar[LoHaCodec] = LoHaCodec()

    name: Literal["loha"] = "loha"
    rank: int = Field(8, gt=0, description="Rank r of each factor; the product's is up to r squared.")
    alpha: float = Field(8.0, gt=0, description="The update is scaled by alpha / rank.")

    def delta(self, key: jax.Array, path: str, spec: ParamSpec, base: Any) -> LoHaDelta:
        """Kaiming draws as PEFT's, but for P2 = 0."""
        inner, outer = spec.unstacked.shape
        r = self.rank
        return LoHaDelta(
            draw(key, path, "p1", (inner, r), kaiming(inner)),
            draw(key, path, "q1", (r, outer), kaiming(r)),
            jnp.zeros((*lead(spec), inner, r), jnp.float32),
            draw(key, path, "q2", (r, outer), kaiming(r)),
            jnp.full(lead(spec), self.alpha / self.rank, jnp.float32),
        )
