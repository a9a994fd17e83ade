"""Any update of weights as a LoRA of chosen rank, with what is lost; and a merged adapter taken off again.

D = U S V^T,   A = U_r,   B = S_r V_r^T,   error = |D - A B| / |D| in the Frobenius norm   (Eckart and Young 1936)

    made = to_lora(bound, model.table, rank=16)              # LoHa, LoKr, OFT, VeRA, DoRA, sparse ... in place
    made = to_lora(tuned, model.table, rank=16, base=params) # the difference of two plain models
    print(max(made.errors.values()), made.left)
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import ConfigError
from ftjax.ops import materialize
from ftjax.params import Store, Table, bounds, cut, spec_of
from ftjax.peft.base import Overlay, unbind
from ftjax.peft.interop import AdapterFile
from ftjax.peft.lora import LoRADelta
from ftjax.peft.merges import lora_file, low_rank
from ftjax.peft.modules import per_module


@dc.dataclass(frozen=True)
class Converted:
    """A LoRA in the place of another update.

    Attributes:
      file: to save with `save_adapter`.
      errors: by module, the part of the update's Frobenius norm that the rank cannot hold (0: exact).
      left: store keys of what changed beside kernels (norms, biases, embeddings) and is not in the LoRA.
    """

    file: AdapterFile
    errors: dict[str, float]
    left: tuple[str, ...]


def to_lora(params: Store, table: Table, rank: int, *, base: Store | None = None, base_path: str = "") -> Converted:
    """The LoRA of a rank that is nearest to an update, weight by weight.

    Args:
      params: a base with adapters in place (`bind`), or plain weights where `base` is given.
      table: of the model.
      rank: at most; a weight narrower than that gets its own width.
      base: plain weights that the update is a difference from.
      base_path: the base model's name for the file.

    Raises:
      ConfigError: an entry changes values, not a weight; a bias is changed by the adapter; nothing changed; rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"rank={rank} is below 1")
    updates, left = _adapted(params, table) if base is None else _difference(params, base, table)
    if not updates:
        raise ConfigError("no kernel differs from the base: there is nothing to make a LoRA of")
    overlay: Overlay = {}
    errors: dict[str, jax.Array] = {}
    for key, update in updates.items():
        one = _nearest(rank)
        overlay[key], errors[key] = jax.lax.map(one, update) if update.ndim > 2 else one(update)
    named = {name: float(e) for name, (_, e) in per_module(errors, table).items()}
    return Converted(lora_file(overlay, table, base_path), named, left)


def _nearest(rank: int) -> Any:
    def one(update: jax.Array) -> tuple[LoRADelta, jax.Array]:
        a, b = low_rank(update, rank)
        size = jnp.linalg.norm(update)
        error = jnp.linalg.norm(update - a @ b) / jnp.where(size > 0, size, 1)
        return LoRADelta(a, b, jnp.float32(1)), error

    return one


def _adapted(params: Store, table: Table) -> tuple[Store, tuple[str, ...]]:
    """What the adapters in place add to their weights, by key."""
    base, overlay = unbind(params, table)
    updates: Store = {}
    for key, delta in overlay.items():
        if key not in base:
            raise ConfigError(f"{key} changes values, not a weight: it is no update that a LoRA could hold")
        bias = base.get(key.removesuffix("/w") + "/b")
        if bias is not None and hasattr(delta, "merge_bias"):
            raise ConfigError(f"the adapter on {key} changes its bias too, which a LoRA has no place for")
        weight = materialize(base[key])
        updates[key] = delta.merge(weight) - weight
    return updates, ()


def _difference(tuned: Store, base: Store, table: Table) -> tuple[Store, tuple[str, ...]]:
    """(differences of kernels that are not all zero, keys of the other weights that differ)."""
    at = bounds(tuned, base)
    tuned, base = cut(tuned, at), cut(base, at)
    if missing := sorted(set(tuned) ^ set(base)):
        raise ConfigError(f"{missing[0]} is in one of the two models only")
    updates, left = {}, []
    for key, value in tuned.items():
        update = materialize(value) - materialize(base[key])
        if not bool(jnp.any(update != 0)):
            continue
        if spec_of(table, key).kind == "kernel":
            updates[key] = update
        else:
            left.append(key)
    return updates, tuple(left)


def unmerge(params: Mapping[str, Any], overlay: Overlay) -> Store:
    """The base again, of plain weights into which an adapter was merged; in float32 up to rounding.

    In a narrower dtype merging has rounded the sum, and the base comes back only as near as that: keep the base instead.

    Raises:
      ConfigError: the adapter is not an addition to the weight (IA3, OFT, DoRA), or sits where there is none.
    """
    overlay = {k: e.spread(overlay) if hasattr(e, "spread") else e for k, e in overlay.items()}
    at = bounds(params, overlay)
    out, parts = cut(params, at), cut(overlay, at)
    for key, delta in parts.items():
        if key not in out or not hasattr(delta, "merge"):
            raise ConfigError(f"{key} changes values, not a weight: nothing of it was merged")
        weight = materialize(out[key])
        update = delta.merge(jnp.zeros_like(weight))
        again = np.asarray(delta.merge(weight) - weight - update)
        size = float(jnp.abs(weight).max() + jnp.abs(update).max())
        if not (np.abs(again) <= 1e-5 * size).all():
            raise ConfigError(
                f"the adapter on {key} is no addition to its weight and cannot be subtracted: keep the base"
            )
        out[key] = (weight - update).astype(out[key].dtype)
    return out
