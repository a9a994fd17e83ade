"""LoKr: a Kronecker product of two small matrices, the larger one low-rank where that pays (Yeh 2023, arXiv:2309.14859).

y = x (W + s C (x) D) + b,   C [in1, out1], D [in2, out2],   s = alpha / r;   C = 0 at the start

    peft=LoKr(rank=8, alpha=8)
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
from ftjax.params import ParamSpec, Table
from ftjax.peft.base import select
from ftjax.peft.interop import Tensors
from ftjax.peft.modules import Module, Targets
from ftjax.peft.weights import PlainCodec, WeightMethod, draw, kaiming, lead, wrong_number
from ftjax.registry import register
from ftjax.tree import Rules


def factors(n: int) -> tuple[int, int]:
    """The two divisors of n whose sum is least, the smaller first, as PEFT finds them."""
    return max(((m, n // m) for m in range(1, int(n**0.5) + 1) if n % m == 0), key=lambda p: p[0])


@struct.dataclass
class LoKrDelta:
    """The factors: `c` [in1, out1], and `d` [in2, out2] or `p` [in2, r] times `q` [r, out2]."""

    c: jax.Array
    scale: jax.Array
    d: jax.Array | None = None
    p: jax.Array | None = None
    q: jax.Array | None = None

    def larger(self) -> jax.Array:
        """The second factor [..., in2, out2]."""
        if self.d is not None:
            return self.d
        assert self.p is not None and self.q is not None
        return self.p @ self.q

    def update(self) -> jax.Array:
        """s C (x) D [..., in, out], float32."""
        c, d = self.c, self.larger()
        product = c[..., :, None, :, None] * d[..., None, :, None, :]
        shape = (c.shape[-2] * d.shape[-2], c.shape[-1] * d.shape[-1])
        return self.scale[..., None, None] * product.reshape(*c.shape[:-2], *shape)

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]; the product is applied factor by factor."""
        c, d = self.c.astype(x.dtype), (self.larger() * self.scale).astype(x.dtype)
        parts = x.reshape(*x.shape[:-1], c.shape[-2], d.shape[-2])
        y = jnp.einsum("...ij,io,jp->...op", parts, c, d)
        return dense(x, base, bias) + y.reshape(*x.shape[:-1], -1)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Small: not split."""
        first = spec.axes[:-2]
        names = [n for n in ("c", "d", "p", "q") if getattr(self, n) is not None]
        return {"scale": first} | dict.fromkeys(names, (*first, None, None))

    def merge(self, base: jax.Array) -> jax.Array:
        """W + the update."""
        return base + self.update()


class LoKrCodec(PlainCodec):
    """LoKr in PEFT's format: ``lokr_w1`` [out1, in1], ``lokr_w2`` [out2, in2] or its factors ``_a`` and ``_b``."""

    peft_type = "LOKR"
    LACKS = ("fan_in_fan_out",)
    READ = ("r", "alpha")
    NEUTRAL: ClassVar = {
        "init_weights": (True,), "rank_dropout": (0.0,), "module_dropout": (0.0,), "decompose_factor": (-1,)
    }  # fmt: skip

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        return super().refuse(config) + wrong_number(config, "r", whole=True) + wrong_number(config, "alpha")

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """See `ModuleCodec`."""
        (in1, in2), (out1, out2) = (factors(n) for n in module.spec.shape)
        r = config["r"]
        if low_rank(r, in2, out2):
            return {"lokr_w1": (out1, in1), "lokr_w2_a": (out2, r), "lokr_w2_b": (r, in2)}
        return {"lokr_w1": (out1, in1), "lokr_w2": (out2, in2)}

    def arrays(self, entry: LoKrDelta) -> Tensors:
        """See `ModuleCodec`."""
        second = {"lokr_w2": entry.d} if entry.d is not None else {"lokr_w2_a": entry.q, "lokr_w2_b": entry.p}
        return {"lokr_w1": np.asarray(entry.c).T} | {k: np.asarray(v).T for k, v in second.items()}

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> LoKrDelta:
        """See `ModuleCodec`."""
        a = {k: jnp.asarray(v.T) for k, v in arrays.items()}
        scale = jnp.float32(config["alpha"] / config["r"])
        return LoKrDelta(a["lokr_w1"], scale, a.get("lokr_w2"), a.get("lokr_w2_b"), a.get("lokr_w2_a"))

    def settings(self, method: LoKr, entries: Mapping[str, Any]) -> dict[str, Any]:
        """See `ModuleCodec`."""
        return {"r": method.rank, "alpha": method.alpha, "init_weights": True, "rank_dropout": 0.0,
                "module_dropout": 0.0, "decompose_both": False, "decompose_factor": -1}  # fmt: skip

    def method(self, config: Mapping[str, Any], targets: Targets) -> LoKr:
        """See `ModuleCodec`."""
        return LoKr(rank=config["r"], alpha=float(config["alpha"]), targets=targets.unnumbered, layers=targets.layers)


def low_rank(rank: int, inner: int, outer: int) -> bool:
    """Whether the second factor is a product of rank r, by PEFT's rule."""
    return rank < max(inner, outer) / 2


@register("peft")
class LoKr(WeightMethod):
    """Kronecker product of two small matrices."""

    hf_type: ClassVar[str | None] = "LOKR"
    trained: ClassVar[Mapping[str, str]] = {"c": "lokr", "d": "lokr", "p": "lokr", "q": "lokr"}
    fixed: ClassVar[tuple[str, ...]] = ("scale",)
    hf_codec: ClassVar[LoKrCodec] = LoKrCodec()

    name: Literal["lokr"] = "lokr"
    rank: int = Field(8, gt=0, description="Rank r of the larger factor.")
    alpha: float = Field(8.0, gt=0, description="The update is scaled by alpha / rank.")

    def labels(self, table: Table) -> Rules:
        """The factors that occur for these shapes."""
        shapes = [table[k].unstacked.shape for k in select(table, self.targets, where="peft.targets")]
        low = [low_rank(self.rank, factors(i)[1], factors(o)[1]) for i, o in shapes]
        absent = ({"d"} if all(low) else set()) | ({"p", "q"} if not any(low) else set())
        return [r for r in super().labels(table) if r[0].rsplit("/", 1)[-1] not in absent]

    def delta(self, key: jax.Array, path: str, spec: ParamSpec, base: Any) -> LoKrDelta:
        """C = 0, the rest as PEFT draws it."""
        (in1, in2), (out1, out2) = (factors(n) for n in spec.unstacked.shape)
        first, r = lead(spec), self.rank
        c, scale = jnp.zeros((*first, in1, out1), jnp.float32), jnp.full(first, self.alpha / r, jnp.float32)
        if not low_rank(r, in2, out2):
            return LoKrDelta(c, scale, d=draw(key, path, "d", (in2, out2), kaiming(in2)))
        p, q = draw(key, path, "p", (in2, r), kaiming(in2)), draw(key, path, "q", (r, out2), kaiming(r))
        return LoKrDelta(c, scale, p=p, q=q)
