"""Gates: how much of a combined method's contribution each token gets, learned (UniPELT, Mao et al. 2021, arXiv:2110.07577).

g(x) = sigmoid(w . x + c),   x what enters the module
    LoRA      y + g(x) s x A B
    adapter   y + g(x) s (act(x D + d) U + u)
    prefix    attention(q, [g P_K; K], [g P_V; V]), x the hidden values that q is projected from

    peft=Combine(methods=(LoRA(targets=("q", "v")), Prefix(tokens=10), Pfeiffer()), gates=True)

Every token has a gate of its own. The paper and AdapterHub take the mean over a row's tokens, padding included: a causal
decoder would so tell earlier tokens of later ones, a cached step would differ from the whole text, and packed examples and
padding would change each other's answers. A token's own gate does none of that, in decoders and encoders alike.

As in AdapterHub, w is drawn with standard deviation 0.02, and a prefix has one gate for keys and values. Both replace LoRA's
scale by the gate; here s remains, and 1 (``alpha`` equal to ``rank``) is their form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ftjax.errors import ConfigError, DataError, listing
from ftjax.ops import dense
from ftjax.params import ParamSpec, Table, layer_keys, ranged, spec_of
from ftjax.peft.adapter import Bottleneck
from ftjax.peft.adapterhub import layer_names
from ftjax.peft.base import Overlay
from ftjax.peft.interop import PREFIX, Tensors
from ftjax.peft.lora import LoRADelta
from ftjax.peft.lora_layers import LoRAConv, LoRAEmbed
from ftjax.peft.prefix_projection import ProjectedPrefix
from ftjax.peft.prefix_tap import PrefixTap
from ftjax.peft.soft import SITE

STD = 0.02


@struct.dataclass
class Gate:
    """w [D] and c [], [L, D] and [L] stacked."""

    w: jax.Array
    c: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., 1] between 0 and 1, float32."""
        return jax.nn.sigmoid(x.astype(jnp.float32) @ self.w[:, None] + self.c)


@struct.dataclass
class Gated:
    """An entry of a method's overlay and its gate.

    Attributes:
      inner: the entry as the method made it.
      gate: its gate.
    """

    inner: Any
    gate: Gate

    uniform_bias: ClassVar[bool] = True
    """Whether c begins as torch draws a linear layer's, or at zero: AdapterHub's choices."""

    def spread(self, overlay: Mapping[str, Any]) -> Gated:
        """See `ftjax.peft.base.bind`."""
        return self.replace(inner=self.inner.spread(opened(overlay))) if hasattr(self.inner, "spread") else self  # type: ignore[attr-defined]

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Those of the entry; w is split as the hidden values."""
        lead = spec.axes[:1] if spec.stacked else ()
        own = {f"inner/{name}": axes for name, axes in self.inner.axes(spec).items()}
        return own | {"gate/w": (*lead, self.reads(spec)), "gate/c": lead}

    def reads(self, spec: ParamSpec) -> str | None:
        """The logical axis of the values that the gate reads."""
        return "embed"


@struct.dataclass
class GatedDelta(Gated):
    """A weight's update under a gate."""

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]; dropout is the update's alone, the gate reads x."""
        y = dense(x, base, bias)
        update = self.inner.update(x, key)
        return y + (self.gate(x).astype(update.dtype) * update).astype(y.dtype)

    def merge(self, base: jax.Array) -> jax.Array:
        """Impossible.

        Raises:
          ConfigError: always.
        """
        raise ConfigError(
            "a gate is another for every token: a gated update has no one merged weight. Keep the adapter"
        )

    def reads(self, spec: ParamSpec) -> str | None:
        """See `Gated`."""
        return spec.axes[-2]


@struct.dataclass
class GatedAdapter(Gated):
    """A bottleneck under a gate, which reads what the bottleneck reads."""

    uniform_bias: ClassVar[bool] = False

    def __call__(self, y: jax.Array, seq: Any, *, residual: jax.Array, norm: Any = None) -> jax.Array:
        """See `Bottleneck`."""
        x = self.inner.read(y, residual=residual, norm=norm)
        return y + self.gate(x).astype(y.dtype) * self.inner.update(x)


@struct.dataclass
class GatedPrefix(Gated):
    """A prefix under a gate, which scales its keys and values as the token that asks sees them."""

    @property
    def columns(self) -> int:
        """See `PrefixTap`."""
        return self.inner.columns

    def __call__(self, kv: Any, seq: Any, *, hidden: jax.Array) -> Any:
        """The layer's keys and values with the prefix in front, and the gates [B, T, S] of all of them."""
        gate, rest = self.gate(hidden), kv.k.shape[1]
        whole = self.inner(kv, seq)
        ours = jnp.broadcast_to(gate, (*gate.shape[:2], whole.k.shape[1] - rest))
        return whole.replace(gates=jnp.concatenate([ours, jnp.ones((*gate.shape[:2], rest), gate.dtype)], axis=-1))


KINDS: Mapping[type[Any], type[Gated]] = {
    LoRADelta: GatedDelta, Bottleneck: GatedAdapter, PrefixTap: GatedPrefix, ProjectedPrefix: GatedPrefix,
}  # fmt: skip
"""Entries that can have a gate. All other methods stand beside them without one."""


def kind_of(entry: Any) -> type[Gated] | None:
    """The entry's gated form; None: it has none."""
    return next((gated for kind, gated in KINDS.items() if isinstance(entry, kind)), None)


def check(overlay: Overlay, methods: str) -> None:
    """Refuses what would be without a gate in silence.

    Args:
      overlay: of all methods, without gates.
      methods: their names, for the message.

    Raises:
      ConfigError: no entry can have a gate, or a LoRA's update reads no hidden values of tokens.
    """
    for key, entry in overlay.items():
        if isinstance(entry, LoRAConv | LoRAEmbed):
            raise ConfigError(
                f"peft.gates: {key} is no matrix that hidden values enter: give lora other targets, or gates=false"
            )
    if not any(kind_of(entry) for entry in overlay.values()):
        raise ConfigError(
            f"peft.gates: none of the methods ({methods}) has a gate. LoRA, prefix tuning and bottleneck adapters have"
        )


def closed(key: jax.Array, overlay: Overlay, table: Table) -> Overlay:
    """The overlay with a gate at every entry that can have one, at step 0."""
    return {k: _begin(key, k, entry, table) for k, entry in overlay.items()}


def opened(overlay: Mapping[str, Any]) -> Overlay:
    """The overlay without its gates."""
    return {k: entry.inner if isinstance(entry, Gated) else entry for k, entry in overlay.items()}


def _begin(key: jax.Array, path: str, entry: Any, table: Table) -> Any:
    kind = kind_of(entry)
    if kind is None:
        return entry
    width, stacked = _width(table, path), spec_of(table, path).stacked

    def draw(k: jax.Array) -> Gate:
        w, c = jax.random.split(k)
        bound = width**-0.5 if kind.uniform_bias else 0.0
        return Gate(
            STD * jax.random.normal(w, (width,), jnp.float32), jax.random.uniform(c, (), jnp.float32, -bound, bound)
        )

    keys = layer_keys(key, f"{path}/gate")
    return kind(entry, jax.vmap(draw)(keys) if stacked else draw(keys))


def _width(table: Table, key: str) -> int:
    """Of the values that an entry's gate reads."""
    spec = spec_of(table, key)
    if spec.kind != "site":
        return spec.shape[-2]
    return table[SITE].shape[-1] if key.endswith("/attn_kv") else spec.shape[-1]


# In files ---------------------------------------------------------------------------------------------------------------


def to_file(overlay: Overlay, table: Table) -> Tensors:
    """Every gate as a linear layer of torch: ``<module>.gate.weight`` [1, D] and ``.gate.bias`` [1], layer by layer.

    The module is that of the adapted weight in the checkpoint, or a layer and the site: ``model.layers.0.attn_kv``.
    """
    tensors: Tensors = {}
    for key, entry in overlay.items():
        if isinstance(entry, Gated):
            w, c = np.asarray(jax.device_get(entry.gate.w)), np.asarray(jax.device_get(entry.gate.c))
            for at, name in _names(key, table):
                tensors |= {f"{name}.weight": w[at][None], f"{name}.bias": c[at][None]}
    return {name: np.asarray(x, np.float32) for name, x in tensors.items()}


def from_file(overlay: Overlay, tensors: Tensors, table: Table) -> Overlay:
    """Removes the gates of a plain overlay from a file's tensors and puts them in place.

    Raises:
      DataError: one is missing or misshapen.
    """
    out: Overlay = {}
    problems = []
    for key, entry in overlay.items():
        kind = kind_of(entry)
        if kind is None:
            out[key] = entry
            continue
        width, found = _width(table, key), []
        for _, name in _names(key, table):
            for part, shape in (("weight", (1, width)), ("bias", (1,))):
                value = tensors.pop(f"{name}.{part}", None)
                if value is None or value.shape != shape:
                    what = "missing  " if value is None else f"misshapen {list(value.shape)},"
                    problems.append(f"{name}.{part}  {what} expected {list(shape)}")
                    value = np.zeros(shape, np.float32)
                found.append(value[0])
        w, c = (np.stack(found[i::2]) for i in range(2))
        stacked = spec_of(table, key).stacked
        out[key] = kind(entry, Gate(*(jnp.asarray(x if stacked else x[0]) for x in (w, c))))
    if problems:
        raise DataError(listing("the gates do not fit the model", problems))
    return out


def _names(key: str, table: Table) -> Iterator[tuple[Any, str]]:
    """(index in the stack, or `()`; the gate's name in the file) of each layer of an entry."""
    spec, r = spec_of(table, key), ranged(key)
    module = spec.hf.removesuffix(".weight")
    if spec.kind == "site":
        module = f"{layer_names(table, key)[0].split('{}')[0]}{{}}.{key.rsplit('/', 1)[-1]}"
    if r is None:
        yield (), f"{PREFIX}{module}.gate"
    else:
        yield from ((i, f"{PREFIX}{module.format(r.start + i)}.gate") for i in range(r.stop - r.start))
