"""What a run holds: the part that trains (donated, checkpointed) and the part that does not.

The store of a run is ``{"base": ..., "overlay": ...}``. Labels split it once, before the first step: `State.trainable` and
`State.const` travel through the step; `Frozen` is a separate argument, never donated, returned or saved. Running statistics
(leaves of kind "stat") are taken out before that: they change without gradients, and travel as `State.mutable`. What an
objective learns itself (a projection of hidden values) is the side "objective", which is always trained and never exported.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ftjax import tree
from ftjax.errors import ConfigError
from ftjax.params import Store, Table, cut, ranged, spec_of
from ftjax.peft.base import CONST, FROZEN, Overlay, check_overlay
from ftjax.quant.base import Quantized, refuse_trained
from ftjax.tree import Rules


@struct.dataclass
class State:
    """Everything that changes, and all that a checkpoint holds.

    Attributes:
      step: optimizer steps taken, int32.
      trainable: the differentiated leaves of the store; None elsewhere.
      const: numbers of the overlay that are not trained (scales, rates); None elsewhere.
      opt: optimizer state.
      rng: base key; a step uses ``fold_in(rng, step)``.
      mutable: the model's running statistics (BatchNorm) by store key, float32; empty for language models.
      hyper: numbers of the run as arrays (see `ftjax.train.optimizer.hyper_of`).
      weighting: what is learned of the weights of several tasks (see `ftjax.objectives.weighting`); mostly empty.
      average: "count" values taken and their "mean", like `trainable` (see `ftjax.train.average`); empty when off.
    """

    step: jax.Array
    trainable: Any
    const: Any
    opt: Any
    rng: jax.Array
    mutable: Any
    hyper: Any
    weighting: Any = struct.field(default_factory=dict)
    average: Any = struct.field(default_factory=dict)


@struct.dataclass
class Frozen:
    """What never changes: the rest of the store; the reference's snapshot of trainable leaves and statistics (or None); a
    teacher's weights (or None).
    """

    store: Any
    reference: Any = None
    mutable: Any = None
    teacher: Any = None


@struct.dataclass
class Parts:
    """A store split by label; `groups` has the optimizer group of each trainable leaf, `mutable` the running statistics."""

    trainable: Any
    const: Any
    frozen: Any
    mutable: Store
    groups: Any = struct.field(pytree_node=False)
    store_labels: Any = struct.field(pytree_node=False)


def trained_borders(params: Store, labels: dict[str, str]) -> dict[str, set[int]]:
    """Layer borders at which trainability changes; stacks are cut there, so that what lies below is not differentiated."""
    at: dict[str, set[int]] = {}
    for key in params:
        if (r := ranged(key)) and labels[key] != FROZEN:
            at.setdefault(r.stack, set()).update((r.start, r.stop))
    return at


def partition(base: Store, overlay: Overlay, table: Table, rules: Rules, own: Store | None = None) -> Parts:
    """Labels a store and splits it; `own` is what the objective learns, by name.

    Raises:
      ConfigError: an overlay entry fits nothing, a rule matches nothing, a quantized weight would be trained, or nothing
        is trainable.
    """
    check_overlay(overlay, table)
    mutable = {k: v for k, v in base.items() if spec_of(table, k).kind == "stat"}
    store = {"base": {k: v for k, v in base.items() if k not in mutable}, "overlay": overlay}
    labels = tree.label(store, rules)
    if own:
        store, labels = store | {"objective": own}, labels | {"objective": dict.fromkeys(own, "objective")}
    packed = [k for k, v in store["base"].items() if isinstance(v, Quantized)]
    refuse_trained(k for k in packed if set(jax.tree.leaves(labels["base"][k])) != {FROZEN})
    trainable, rest = tree.split(store, labels, lambda name: name not in (FROZEN, CONST))
    if not jax.tree.leaves((trainable["base"], trainable["overlay"])):
        raise ConfigError("0 trainable parameters: the method's rules leave everything frozen")
    rest_labels = jax.tree.map(lambda x, name: None if x is not None else name, trainable, labels, is_leaf=_hole)
    const, frozen = tree.split(rest, rest_labels, lambda name: name == CONST)
    groups = jax.tree.map(lambda x, name: name if x is not None else None, trainable, labels, is_leaf=_hole)
    return Parts(trainable, const, frozen, mutable, groups, labels)


def whole(parts: Any, frozen: Any, mutable: Store) -> dict[str, Any]:
    """The store ``{"base": ..., "overlay": ...}`` put together again: for a model's eyes, for merging and for export.

    Args:
      parts: `State` or `Parts`, whose trainable and const leaves count.
      frozen: the rest of the store.
      mutable: running statistics.
    """
    store = tree.combine(parts.trainable, parts.const, frozen)
    return {**store, "base": {**store["base"], **mutable}}


def _hole(x: Any) -> bool:
    return x is None


def kinds_of(trainable: Any, table: Table) -> Any:
    """The kind of parameter of each trainable leaf; leaves of an overlay count as kernels, as torch's optimizers see them."""

    def kind(path: str) -> str:
        side, key = path.split("/", 1)
        return spec_of(table, key).kind if side == "base" else "kernel"

    return jax.tree.map(kind, tree.paths(trainable))


def cut_base(base: Store, rules: Rules, overlay: Overlay) -> Store:
    """The base cut at the borders of its overlay (outside jit, once, at load)."""
    from ftjax.params import bounds

    return cut(base, bounds(overlay))


def initial(parts: Parts, tx: Any, *, rng: jax.Array, mutable: Any, hyper: Any) -> State:
    """The state before the first step; what changes is in float32, whatever the base's dtype."""
    trainable, mutable = jax.tree.map(lambda x: x.astype(jnp.float32), (parts.trainable, mutable))
    return State(jnp.zeros((), jnp.int32), trainable, parts.const, tx.init(trainable), rng, mutable, hyper)
