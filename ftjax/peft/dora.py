"""DoRA: the direction of a weight adapted by LoRA, its length by a vector (Liu et al. 2024, arXiv:2402.09353, eq. 5).

W' = m * (W + s A B) / ||W + s A B||   by columns (outputs);   m = ||W|| at the start; the norm is a constant to the gradient

    peft=DoRA(rank=16, alpha=32)

At the start the adapted model equals the base but for rounding: m / ||W|| is computed, not skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from ftjax.ops import dense, materialize
from ftjax.params import ParamSpec, Store, Table, bounds, cut, spec_of
from ftjax.peft.base import Overlay
from ftjax.peft.interop import Tensors
from ftjax.peft.lora import LoRA, LoRACodec, LoRADelta, dropout, up
from ftjax.peft.modules import Module, Targets
from ftjax.registry import register
from ftjax.tree import Rules


def lengths(w: jax.Array) -> jax.Array:
    """Length of each column of a kernel [..., in, out]: [..., out]."""
    return jnp.sqrt(jnp.sum(w * w, axis=-2))


@struct.dataclass
class DoRADelta:
    """LoRA's arrays and the magnitudes `m` [out]."""

    a: jax.Array
    b: jax.Array
    m: jax.Array
    scale: jax.Array
    rate: jax.Array | None = None

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]; the bias is not scaled."""
        factor = self.factor(materialize(base)).astype(x.dtype)
        if key is not None and self.rate is not None:
            x = dropout(x, self.rate, key)
        z = x @ self.a.astype(x.dtype) * self.scale.astype(x.dtype)
        y = (dense(x, base) + up(z, self.b.astype(x.dtype))) * factor
        return y if bias is None else y + bias.astype(y.dtype)

    def factor(self, base: jax.Array) -> jax.Array:
        """m / ||W + s A B|| by columns; only m is differentiated."""
        whole = base + self.scale[..., None, None] * (self.a @ self.b)
        return self.m / jax.lax.stop_gradient(lengths(whole))

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """As LoRA's; the magnitudes as the outputs."""
        plain = LoRADelta(self.a, self.b, self.scale, self.rate).axes(spec)
        return plain | {"m": (*spec.axes[:-2], spec.axes[-1])}

    def merge(self, base: jax.Array) -> jax.Array:
        """The whole formula in float32."""
        whole = base + self.scale[..., None, None] * (self.a @ self.b)
        return whole * self.factor(base)[..., None, :]


class DoRACodec(LoRACodec):
    """LoRA's files with ``use_dora`` and ``lora_magnitude_vector`` [out]."""

    kinds: ClassVar[tuple[str, ...]] = ("kernel",)

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        absent = [] if config.get("use_dora") is True else ["use_dora  is not set"]
        return absent + super().refuse({**config, "use_dora": False})

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """See `ModuleCodec`."""
        return super().shapes(config, module) | {"lora_magnitude_vector": module.spec.shape[-1:]}

    def arrays(self, entry: Any) -> Tensors:
        """See `ModuleCodec`."""
        plain = LoRADelta(entry.a, entry.b, entry.scale)
        return super().arrays(plain) | {"lora_magnitude_vector": np.asarray(entry.m)}

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> Any:
        """See `ModuleCodec`."""
        plain = super().entry(config, module, arrays)
        return DoRADelta(plain.a, plain.b, jnp.asarray(arrays["lora_magnitude_vector"]), plain.scale, plain.rate)

    def settings(self, method: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
        """See `ModuleCodec`."""
        return super().settings(method, entries) | {"use_dora": True}

    def method(self, config: Mapping[str, Any], targets: Targets) -> DoRA:
        """See `ModuleCodec`."""
        return DoRA(**super().method(config, targets).model_dump(exclude={"name"}))


@register("peft")
class DoRA(LoRA):
    """Low-rank directions and learned lengths."""

    identity_at_init: ClassVar[bool] = False
    hf_codec: ClassVar[DoRACodec] = DoRACodec()
    kinds: ClassVar[tuple[str, ...]] = ("kernel",)

    name: Literal["dora"] = "dora"  # type: ignore[assignment]
    start: Literal["uniform", "gaussian"] = Field("uniform", description="First values of A; B is 0.")  # type: ignore[assignment]

    def labels(self, table: Table) -> Rules:
        """The magnitudes are a group of their own."""
        return [("overlay/*/m", "magnitude"), *super().labels(table)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """B = 0 and m = ||W||."""
        sizes = self.sizes(table)
        parts = cut(params, bounds(sizes))
        overlay: Overlay = {}
        for k, size in sizes.items():
            plain = self.delta(key, k, spec_of(table, k), *size, parts[k])
            m = jax.jit(lambda w: lengths(materialize(w)))(parts[k])
            overlay[k] = DoRADelta(plain.a, plain.b, m, plain.scale, plain.rate)
        return overlay
