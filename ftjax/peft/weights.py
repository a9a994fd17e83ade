"""What methods on single weights share: targets, layers, labels, one delta per weight, and files with a few arrays each.

@register("peft")
class IA3(WeightMethod):
    trained = {"scale": "ia3"}
    def delta(self, key, path, spec, base): ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.params import ParamSpec, Store, Table, bounds, cut, key_of, ranged, spec_of, unranged
from ftjax.peft.base import CONST, FROZEN, Overlay, check_layers, select, subset
from ftjax.peft.interop import Tensors, check_settings
from ftjax.peft.modules import ModuleCodec, per_module
from ftjax.schema import Component
from ftjax.tree import Rules


class WeightMethod(Component):
    """A method that puts one delta on each targeted weight."""

    mergeable: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = True
    hf_type: ClassVar[str | None] = None
    usual_lr: ClassVar[tuple[float, float]] = (5e-5, 2e-2)
    trained: ClassVar[Mapping[str, str]]
    """Leaf of a delta -> optimizer group."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Leaves of a delta that are not trained."""

    targets: tuple[str, ...] = Field(
        ("all-linear",), min_length=1, description="Weights by name (q_proj or q), pattern, or all-linear."
    )
    layers: tuple[int, ...] = Field((), description="Only these layers, counted from 0; empty: all.")

    def keys(self, table: Table) -> list[str]:
        """Store keys that get a delta."""
        check_layers(self.layers, table)
        return [part for key in select(table, self.targets, where="peft.targets") for part in subset(key, self.layers)]

    def labels(self, table: Table) -> Rules:
        """Trained leaves by group, the others fixed, the base frozen."""
        rules = [(f"overlay/*/{leaf}", group) for leaf, group in self.trained.items()]
        return [*rules, *((f"overlay/*/{leaf}", CONST) for leaf in self.fixed), ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """A delta per weight; what is drawn depends on the path and the absolute layer only."""
        keys = self.keys(table)
        parts = cut(params, bounds(keys))
        return {k: self.delta(key_of(key, unranged(k)), k, spec_of(table, k), parts.get(k)) for k in keys}

    def delta(self, key: jax.Array, path: str, spec: ParamSpec, base: Any) -> Any:
        """The delta of one weight (all its layers) at step 0."""
        raise NotImplementedError


def draw(key: jax.Array, path: str, name: str, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Uniform numbers within `bound`, per layer by its absolute number: [(layers,) *shape]."""
    key = key_of(key, name)

    def one(k: jax.Array) -> jax.Array:
        return jax.random.uniform(k, shape, jnp.float32, -bound, bound)

    r = ranged(path)
    if r is None:
        return one(key)
    return jax.vmap(lambda i: one(jax.random.fold_in(key, i)))(jnp.arange(r.start, r.stop))


def kaiming(fan_in: int) -> float:
    """The bound that torch's kaiming_uniform_ with a = sqrt 5 gives."""
    return 1 / math.sqrt(fan_in)


def lead(spec: ParamSpec) -> tuple[int, ...]:
    """The layer dimension of a spec's arrays, if any."""
    return spec.shape[:1] if spec.stacked else ()


class PlainCodec(ModuleCodec):
    """A codec whose configuration has numbers to check and little else. Subclasses give `READ` and `NEUTRAL`."""

    READ: ClassVar[tuple[str, ...]] = ()
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    LACKS: ClassVar[tuple[str, ...]] = ()
    """Fields of the targets that PEFT's configuration of this type does not know."""
    _TARGETS: ClassVar[tuple[str, ...]] = (
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    )  # fmt: skip

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`; where the type knows no layer subsets, every module is named."""
        settings, tensors = super().encode(overlay, table, method)
        if "layers_to_transform" in self.LACKS and settings["layers_to_transform"]:
            settings["target_modules"] = sorted(name for name in per_module(overlay, table))
        return {k: v for k, v in settings.items() if k not in self.LACKS}, tensors

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        return check_settings(config, read=(*self.READ, *self._TARGETS), neutral=self.NEUTRAL)


def wrong_number(config: Mapping[str, Any], name: str, *, whole: bool = False) -> list[str]:
    """A line if a setting is not a number above 0."""
    value = config.get(name)
    good = type(value) is int if whole else type(value) in (int, float)
    if good and value is not None and 0 < value < math.inf:
        return []
    return [f"{name}={value!r}  expected {'a whole number' if whole else 'a number'} above 0"]
