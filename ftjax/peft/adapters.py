"""Several adapters over one base at run time: switching between them, and batches whose rows each have their own.

y_i = x_i W + b + s_n x_i A_n B_n,   n = the adapter of row i   (Chen et al. 2023, arXiv:2310.18547, sec. 4)

    adapters = load_adapters(model, params, {"de": "runs/de/adapter", "fr": "runs/fr/adapter"})
    logits = model.apply(adapters.use("de"), inputs).logits
    logits = model.apply(adapters.rows(["de", "fr", None]), inputs).logits      # None: the base alone

LoRAs of unequal ranks, layers and targets are padded with zeros to common shapes, so that whichever is in use the compiled
program is the same, and so is one for batches of any mixture.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ftjax.errors import ConfigError, did_you_mean
from ftjax.ops import dense
from ftjax.params import ParamSpec, Store, Table, bounds, cut
from ftjax.peft.base import Overlay, bind
from ftjax.peft.interop import AdapterFile, load_adapter
from ftjax.peft.lora import LoRADelta

if TYPE_CHECKING:
    from ftjax.models.base import Model


@struct.dataclass
class LoRARows:
    """The updates of one weight by several LoRAs, one for each row of a batch (all arrays lead with [layers] when stacked).

    Attributes:
      a: [n, in, r] float32, ranks padded with zeros.
      b: [n, r, out] float32.
      scale: [n] float32.
      rows: [batch] int32, which of the n each row has.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    rows: jax.Array

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [batch, ..., in] -> [batch, ..., out]; nothing is dropped, adapters at run time are not in training.

        Raises:
          ConfigError: x has another number of rows than `rows` (when traced).
        """
        if x.ndim < 2 or x.shape[0] != self.rows.shape[0]:
            raise ConfigError(f"adapters for {self.rows.shape[0]} rows, but the batch is {list(x.shape)}")
        y = dense(x, base, bias)
        a, b, scale = (value.astype(x.dtype)[self.rows] for value in (self.a, self.b, self.scale))
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        update = (flat @ a * scale[:, None, None]) @ b
        return y + update.reshape(y.shape).astype(y.dtype)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Logical axes as those of LoRA, and none for the adapters' dimension."""
        *lead, inner, outer = spec.axes
        return {
            "a": (*lead, None, inner, "rank"),
            "b": (*lead, None, "rank", outer),
            "scale": (*lead, None),
            "rows": (*lead, None),
        }

    def merge(self, base: jax.Array) -> jax.Array:
        """Impossible.

        Raises:
          ConfigError: always.
        """
        raise ConfigError("rows with adapters of their own have no one merged weight: merge what use(name) gives")


@dc.dataclass(frozen=True)
class Adapters:
    """Adapters laid out over one base; make it with `load_adapters`.

    Attributes:
      table: of the model.
      base: its weights, cut wherever one of the adapters is.
      files: the adapters by name.
      bank: all of them in one overlay, `LoRARows` without rows, the last of each being zeros; None where not all are LoRAs.
    """

    table: Table
    base: Store
    files: Mapping[str, AdapterFile]
    bank: Overlay | None

    def use(self, name: str | None) -> Store:
        """The parameters with one adapter, or none, in place; LoRAs all give the same shapes.

        Raises:
          ConfigError: there is no adapter of this name.
        """
        at = self._number(name)
        file = None if name is None else self.files[name]
        base = self.base if file is None else self.base | own_weights(file, self.base)
        if self.bank is None:
            return bind(base, file.overlay if file else {})

        def one(many: LoRARows, stacked: bool) -> LoRADelta:
            return LoRADelta(*(x[:, at] if stacked else x[at] for x in (many.a, many.b, many.scale)))

        return bind(base, {k: one(many, many.scale.ndim > 1) for k, many in self.bank.items()})

    def rows(self, names: Sequence[str | None]) -> Store:
        """The parameters for a batch whose i-th row has the adapter `names[i]` (None: the base alone).

        The number of rows is part of the compiled shapes; which adapter is where is not.

        Raises:
          ConfigError: no adapter of such a name; one is no LoRA; one brings weights of the base, which all rows share.
        """
        at = jnp.asarray(np.asarray([self._number(name) for name in names], np.int32))
        if self.bank is None:
            other = next(n for n, f in self.files.items() if not is_lora(f.overlay))
            raise ConfigError(f"adapter {other!r} is no LoRA: rows of one batch can only have LoRAs of their own")
        own = [n for n in dict.fromkeys(names) if n is not None and self.files[n].saved]
        if own:
            raise ConfigError(f"adapter {own[0]!r} brings {next(iter(self.files[own[0]].saved))}, which all rows share")

        def placed(many: LoRARows) -> LoRARows:
            return dc.replace(many, rows=jnp.broadcast_to(at, (*many.scale.shape[:-1], len(at))))

        return bind(self.base, {k: placed(many) for k, many in self.bank.items()})

    def _number(self, name: str | None) -> int:
        if name is not None and name not in self.files:
            hint = did_you_mean(name, self.files)
            raise ConfigError(f"no adapter is called {name!r}.{hint} There are: {', '.join(self.files) or 'none'}")
        return len(self.files) if name is None else list(self.files).index(name)


def load_adapters(model: Model, params: Store, adapters: Mapping[str, str | Path | AdapterFile]) -> Adapters:
    """Lays several adapters over one base, to be used in turn or row by row.

    Args:
      model: the base; only its table is read.
      params: its parameters, plain or quantized.
      adapters: by a name of your choice, folders (PEFT's or AdapterHub's format), or adapters in memory, such as
        `merge_adapters` gives.

    Raises:
      DataError: a folder does not fit the model.
    """
    files = {
        name: adapter if isinstance(adapter, AdapterFile) else load_adapter(adapter, model.table, params)
        for name, adapter in adapters.items()
    }
    overlays = [file.overlay for file in files.values()]
    return Adapters(model.table, cut(params, bounds(*overlays)), files, bank(overlays) if lora_only(overlays) else None)


def bank(overlays: Sequence[Overlay]) -> Overlay:
    """LoRAs on the union of their weights, stacked and padded: `LoRARows` of no rows yet, with zeros behind the last."""
    at = bounds(*overlays)
    parts = [cut({k: d.plain() for k, d in overlay.items()}, at) for overlay in overlays]
    out: Overlay = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        given = [part.get(key) for part in parts]
        like = next(d for d in given if d is not None)
        rank = max(d.a.shape[-1] for d in given if d is not None)
        nothing = LoRADelta(jnp.zeros_like(like.a[..., :0]), jnp.zeros_like(like.b[..., :0, :]), 0 * like.scale)
        padded = [_padded(nothing if d is None else d, rank) for d in [*given, None]]
        axis = like.scale.ndim
        a, b, scale = (jnp.stack([getattr(d, x) for d in padded], axis) for x in ("a", "b", "scale"))
        out[key] = LoRARows(a, b, scale, jnp.zeros((*like.scale.shape, 0), jnp.int32))
    return out


def _padded(delta: LoRADelta, rank: int) -> LoRADelta:
    """The same update with zeros up to a rank."""
    more, lead = rank - delta.a.shape[-1], [(0, 0)] * delta.scale.ndim
    a, b = jnp.pad(delta.a, [*lead, (0, 0), (0, more)]), jnp.pad(delta.b, [*lead, (0, more), (0, 0)])
    return LoRADelta(a, b, delta.scale)


def is_lora(overlay: Overlay) -> bool:
    """Whether all entries are plain LoRA updates."""
    return all(isinstance(d, LoRADelta) for d in overlay.values())


def lora_only(overlays: Sequence[Overlay]) -> bool:
    """Whether there are adapters and all are LoRAs."""
    return bool(overlays) and all(is_lora(o) for o in overlays)


def own_weights(file: AdapterFile, base: Store) -> Store:
    """Weights of the base that an adapter brings along, in the base's dtype and cuts."""
    parts = cut(file.saved, bounds(base))
    return {k: jnp.asarray(v, base[k].dtype) for k, v in parts.items()}
