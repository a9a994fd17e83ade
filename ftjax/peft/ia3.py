"""(IA)^3: learned factors on keys, values and inputs of the feed-forward part (Liu et al. 2022, arXiv:2205.05638, 3.3).

outputs: y = (x W + b) * l,   inputs: y = (x * l) W + b,   l = 1 at the start

    peft=IA3(targets=("k_proj", "v_proj"), inputs=("down_proj",))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from ftjax.ops import dense
from ftjax.params import ParamSpec, Store, Table, spec_of, unranged
from ftjax.peft.base import Overlay, select, subset
from ftjax.peft.interop import Tensors
from ftjax.peft.modules import Module, Targets
from ftjax.peft.weights import PlainCodec, WeightMethod, lead
from ftjax.registry import register


@struct.dataclass
class RescaleOut:
    """Factors on the outputs, the bias included: `scale` [out]."""

    scale: jax.Array

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        y = dense(x, base, bias)
        return y * self.scale.astype(y.dtype)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Split as the outputs."""
        return {"scale": (*spec.axes[:-2], spec.axes[-1])}

    def merge(self, base: jax.Array) -> jax.Array:
        """W * l by columns."""
        return base * self.scale[..., None, :]

    def merge_bias(self, bias: jax.Array) -> jax.Array:
        """b * l."""
        return bias * self.scale


@struct.dataclass
class RescaleIn:
    """Factors on the inputs: `scale` [in]."""

    scale: jax.Array

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        return dense(x * self.scale.astype(x.dtype), base, bias)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Split as the inputs."""
        return {"scale": spec.axes[:-1]}

    def merge(self, base: jax.Array) -> jax.Array:
        """W * l by rows."""
        return base * self.scale[..., :, None]


class IA3Codec(PlainCodec):
    """IA3 in PEFT's format: ``ia3_l`` [out, 1], or [1, in] for feed-forward modules."""

    peft_type = "IA3"
    READ = ("feedforward_modules",)
    LACKS = ("layers_to_transform", "layers_pattern")
    NEUTRAL: ClassVar = {"init_ia3_weights": (True,)}

    def _inputs(self, config: Mapping[str, Any], name: str) -> bool:
        named = config.get("feedforward_modules") or []
        if isinstance(named, str):
            return re.fullmatch(named, name) is not None
        return any(name.endswith(n) for n in named)

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """See `ModuleCodec`."""
        inner, outer = module.spec.shape
        return {"ia3_l": (1, inner) if self._inputs(config, module.name) else (outer, 1)}

    def arrays(self, entry: Any) -> Tensors:
        """See `ModuleCodec`."""
        scale = np.asarray(entry.scale)
        return {"ia3_l": scale[None] if isinstance(entry, RescaleIn) else scale[:, None]}

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> Any:
        """See `ModuleCodec`."""
        cls = RescaleIn if self._inputs(config, module.name) else RescaleOut
        return cls(jnp.asarray(arrays["ia3_l"].reshape(-1)))

    def settings(self, method: IA3, entries: Mapping[str, Any]) -> dict[str, Any]:
        """See `ModuleCodec`."""
        inputs = [name for name, e in entries.items() if isinstance(e, RescaleIn)]
        last = {name.split(".")[-1] for name in inputs}
        plain = {name.split(".")[-1] for name, e in entries.items() if isinstance(e, RescaleOut)}
        # Short names where they are clear, as PEFT's own configurations have them.
        return {"feedforward_modules": sorted(last if not last & plain else inputs), "init_ia3_weights": True}

    def method(self, config: Mapping[str, Any], targets: Targets) -> IA3:
        """See `ModuleCodec`."""
        inputs = tuple(n for n in targets.unnumbered if self._inputs(config, n))
        outputs = tuple(n for n in targets.unnumbered if n not in inputs)
        return IA3(targets=outputs, inputs=inputs, layers=targets.layers)


@register("peft")
class IA3(WeightMethod):
    """Learned factors on outputs and inputs of weights."""

    hf_type: ClassVar[str | None] = "IA3"
    trained: ClassVar[Mapping[str, str]] = {"scale": "ia3"}
    hf_codec: ClassVar[IA3Codec] = IA3Codec()
    usual_lr: ClassVar[tuple[float, float]] = (1e-4, 5e-2)

    name: Literal["ia3"] = "ia3"
    targets: tuple[str, ...] = Field(
        ("k", "v"), description="Weights whose outputs are scaled, by name, pattern, or all-linear."
    )
    inputs: tuple[str, ...] = Field(("down",), description="Weights whose inputs are scaled, likewise.")

    def keys(self, table: Table) -> list[str]:
        """Outputs and inputs; a weight that both name has its inputs scaled."""
        both = tuple(dict.fromkeys((*self.targets, *self.inputs)))
        return [part for key in select(table, both, where="peft.targets") for part in subset(key, self.layers)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """All ones."""
        chosen = set(select(table, self.inputs, where="peft.inputs")) if self.inputs else set()
        scaled_inputs = {unranged(k) for k in chosen}
        overlay: Overlay = {}
        for k in self.keys(table):
            spec, inside = spec_of(table, k), unranged(k) in scaled_inputs
            ones = jnp.ones((*lead(spec), spec.shape[-2] if inside else spec.shape[-1]), jnp.float32)
            overlay[k] = RescaleIn(ones) if inside else RescaleOut(ones)
        return overlay
