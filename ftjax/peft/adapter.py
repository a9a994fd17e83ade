"""Bottleneck adapters: a small network with a residual of its own behind, or beside, the parts of a layer.

y + s (act(x D + d) U + u),   y the output of attention or of the feed-forward part, and x
    Houlsby    y itself, behind both parts                          (Houlsby et al. 2019, arXiv:1902.00751)
    Pfeiffer   norm(y + residual), behind the feed-forward part     (Pfeiffer et al. 2020, arXiv:2005.00247)
    Parallel   the residual, beside the feed-forward part           (He et al. 2021, arXiv:2110.04366)

    peft=Pfeiffer(reduction=16)

The sum goes on as y would have: the layer's own residual and norm follow. Where no norm follows a part (Llama, GPT-2, ViT)
Pfeiffer's reads the sum without one, as in AdapterHub. U begins at zero.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from ftjax.errors import ConfigError
from ftjax.params import ParamSpec, Store, Table, layer_keys, spec_of
from ftjax.peft.adapterhub import Arrays, HubCodec, leave_out, only_layers
from ftjax.peft.base import CONST, FROZEN, Overlay, check_layers, subset
from ftjax.registry import known, register
from ftjax.schema import Component
from ftjax.tree import Rules

NONLINEARITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "leakyrelu": jax.nn.leaky_relu,
}
NonLinearity = Literal["relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu"]
_OURS = {"silu": "swish"}
BN_SETTINGS: Mapping[str, Any] = {
    "architecture": None, "original_ln_before": False, "original_ln_after": True, "ln_before": False,
    "ln_after": False, "init_weights": "bert", "is_parallel": False, "use_gating": False, "residual_before_ln": True,
    "adapter_residual_before_ln": False, "inv_adapter": None, "inv_adapter_reduction_factor": None,
    "cross_adapter": False, "dropout": 0.0, "stochastic_depth": 0.0, "phm_layer": False,
}  # fmt: skip
"""AdapterHub's settings of a bottleneck and the values that are honoured."""
PHM_SETTINGS = frozenset({
    "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity", "learn_phm", "phm_bias", "phm_c_init",
    "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule",
})  # fmt: skip
"""Those of a Compacter, which say nothing without ``phm_layer``."""
Input = Literal["output", "sum", "residual"]
"""What an adapter reads: a part's output, that added to the residual and normed, or the residual before the part."""


@struct.dataclass
class Bottleneck:
    """What every adapter does to a part's output; subclasses say how numbers become two projections.

    Attributes:
      scale: s, a scalar.
      reads: see `Input`.
      activation: a key of `NONLINEARITIES`.
    """

    scale: jax.Array
    reads: Input = struct.field(pytree_node=False)
    activation: str = struct.field(pytree_node=False)

    def project(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] through the bottleneck, [B, T, D]."""
        raise NotImplementedError

    def __call__(self, y: jax.Array, seq: Any, *, residual: jax.Array, norm: Any = None) -> jax.Array:
        """A part's output y [B, T, D] with the adapter's added; see `ftjax.params.site` for the rest."""
        return y + self.update(self.read(y, residual=residual, norm=norm))

    def read(self, y: jax.Array, *, residual: jax.Array, norm: Any = None) -> jax.Array:
        """What enters the adapter [B, T, D]."""
        if self.reads == "sum":
            x = y + residual
            return x if norm is None else norm(x)
        return y if self.reads == "output" else residual

    def update(self, x: jax.Array) -> jax.Array:
        """What the adapter makes of x [B, T, D], the scale included."""
        return self.scale.astype(x.dtype) * self.project(x)

    def act(self, x: jax.Array) -> jax.Array:
        """The non-linearity."""
        return NONLINEARITIES[self.activation](x)


@struct.dataclass
class AdapterTap(Bottleneck):
    """One adapter, [L, ...] stacked: down [D, m] and up [m, D] with biases."""

    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array

    def project(self, x: jax.Array) -> jax.Array:
        """See `Bottleneck`."""
        down, down_bias, up, up_bias = (a.astype(x.dtype) for a in (self.down, self.down_bias, self.up, self.up_bias))
        return self.act(x @ down + down_bias) @ up + up_bias

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Split as the hidden values."""
        lead = spec.axes[:-1]
        return {
            "down": (*lead, "embed", None), "down_bias": (*lead, None), "up": (*lead, None, "embed"),
            "up_bias": (*lead, "embed"), "scale": lead,
        }  # fmt: skip


def adapter_sites(table: Table, places: Mapping[str, Input], layers: tuple[int, ...], *, name: str) -> dict[str, Input]:
    """Sites of a bottleneck method -> what its adapter there reads.

    Args:
      table: of the model.
      places: sites by their last name.
      layers: only these; empty: all.
      name: of the method.

    Raises:
      ConfigError: the model has no such sites, or no such layer.
    """
    found: dict[str, Input] = {}
    for key, spec in table.items():
        place = key.rsplit("/", 1)[-1]
        if spec.kind == "site" and place in places:
            found[key] = places[place]
    if not found:
        raise ConfigError(f"peft={name}: the model has no attention or feed-forward part to put an adapter behind")
    check_layers(layers, found)
    return {part: reads for key, reads in found.items() for part in subset(key, layers)}


class BottleneckCodec(HubCodec):
    """A bottleneck method in AdapterHub's format."""

    read = PHM_SETTINGS | {"reduction_factor", "non_linearity", "scaling", "leave_out", "init_weights", "dropout"}

    def __init__(self, method: str, *, parts: tuple[bool, bool], **settings: Any):
        self.method = method
        self.settings = {**BN_SETTINGS, "mh_adapter": parts[0], "output_adapter": parts[1], **settings}

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        lines = super().refuse(config)
        for name, kinds in (("reduction_factor", (int, float)), ("scaling", (int, float))):
            value = config.get(name, 1.0)
            if not isinstance(value, kinds) or (name == "reduction_factor" and value != int(value)):
                lines.append(f"{name}={value!r}  is not supported; expected one whole number for all layers")
        act = str(config.get("non_linearity"))
        if _OURS.get(act, act) not in NONLINEARITIES:
            lines.append(f"non_linearity={act!r}  is not supported; supported: {', '.join(NONLINEARITIES)}")
        return lines

    def config_of(self, method: Any, overlay: Overlay, table: Table) -> dict[str, Any]:
        """See `HubCodec`."""
        return {
            "reduction_factor": method.reduction, "non_linearity": method.activation, "scaling": method.scale,
            "leave_out": leave_out(method.layers, table),
        }  # fmt: skip

    def method_of(self, config: Mapping[str, Any], table: Table) -> Any:
        """See `HubCodec`."""
        act = config["non_linearity"]
        return known("peft")[self.method](
            **self.settings_of(config),
            reduction=int(config["reduction_factor"]), activation=_OURS.get(act, act),
            scale=float(config.get("scaling", 1.0)), layers=only_layers(config.get("leave_out"), table),
        )  # fmt: skip

    def settings_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that only this method has."""
        return {}

    def arrays(self, tap: Any) -> Arrays:
        """See `HubCodec`."""
        return {
            "adapter_down.0.weight": tap.down.swapaxes(-1, -2), "adapter_down.0.bias": tap.down_bias,
            "adapter_up.weight": tap.up.swapaxes(-1, -2), "adapter_up.bias": tap.up_bias,
        }  # fmt: skip

    def tap_of(self, arrays: Arrays, like: Any) -> Any:
        """See `HubCodec`."""
        return dc.replace(
            like, down=arrays["adapter_down.0.weight"].swapaxes(-1, -2), down_bias=arrays["adapter_down.0.bias"],
            up=arrays["adapter_up.weight"].swapaxes(-1, -2), up_bias=arrays["adapter_up.bias"],
        )  # fmt: skip


class BottleneckAdapter(Component):
    """What the three have in common."""

    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = True
    hf_type: ClassVar[str | None] = None
    usual_lr: ClassVar[tuple[float, float]] = (1e-5, 1e-2)
    places: ClassVar[Mapping[str, Input]]

    name: str
    reduction: int = Field(16, gt=0, description="Width of the hidden values over that of the bottleneck.")
    activation: NonLinearity = Field("relu", description="Non-linearity of the bottleneck.")
    scale: float = Field(1.0, gt=0, description="Factor on what the adapter adds.")
    layers: tuple[int, ...] = Field((), description="Only these layers, counted from 0; empty: all.")

    def keys(self, table: Table) -> dict[str, Input]:
        """Sites of the adapters -> what they read."""
        return adapter_sites(table, self.places, self.layers, name=self.name)

    def labels(self, table: Table) -> Rules:
        """All but the scale."""
        self.keys(table)
        return [("overlay/*/scale", CONST), ("overlay/*", "adapter"), ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """D as torch draws a linear layer's, the rest zero, so that the adapted model equals the base."""
        return {
            k: self.tap(layer_keys(key, k), spec_of(table, k), reads=reads) for k, reads in self.keys(table).items()
        }

    def tap(self, keys: jax.Array, spec: ParamSpec, *, reads: Input) -> AdapterTap:
        """One site's adapters at step 0; `keys` [L] if it is stacked."""
        lead, D = spec.shape[:-1], spec.shape[-1]
        m, bound = max(1, D // self.reduction), D**-0.5

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.uniform(key, (D, m), jnp.float32, -bound, bound)

        return AdapterTap(
            scale=jnp.full(lead, self.scale, jnp.float32), reads=reads, activation=self.activation,
            down=jax.vmap(draw)(keys) if spec.stacked else draw(keys),
            down_bias=jnp.zeros((*lead, m), jnp.float32), up=jnp.zeros((*lead, m, D), jnp.float32),
            up_bias=jnp.zeros((*lead, D), jnp.float32),
        )  # fmt: skip


@register("peft")
class Houlsby(BottleneckAdapter):
    """Adapters behind attention and behind the feed-forward part."""

    places: ClassVar[Mapping[str, Input]] = {"attn_out": "output", "mlp_out": "output"}
    hf_codec: ClassVar[BottleneckCodec] = BottleneckCodec("houlsby", parts=(True, True))
    name: Literal["houlsby"] = "houlsby"
    activation: NonLinearity = Field("swish", description="Non-linearity of the bottleneck.")


@register("peft")
class Pfeiffer(BottleneckAdapter):
    """One adapter behind the feed-forward part, which reads what the layer would have given."""

    places: ClassVar[Mapping[str, Input]] = {"mlp_out": "sum"}
    hf_codec: ClassVar[BottleneckCodec] = BottleneckCodec("pfeiffer", parts=(False, True), original_ln_before=True)
    name: Literal["pfeiffer"] = "pfeiffer"


@register("peft")
class Parallel(BottleneckAdapter):
    """One adapter beside the feed-forward part, which reads the same residual stream."""

    places: ClassVar[Mapping[str, Input]] = {"mlp_out": "residual"}
    hf_codec: ClassVar[BottleneckCodec] = BottleneckCodec("parallel", parts=(False, True), is_parallel=True)
    name: Literal["parallel"] = "parallel"
    reduction: int = Field(2, gt=0, description="Width of the hidden values over that of the bottleneck.")
    scale: float = Field(4.0, gt=0, description="Factor on what the adapter adds.")
