"""One model under the heads of several tasks: the backbone once, ``heads/<task>/...`` beside each other.

    model, params = load_several(source, numerics, heads, seed=0, vocab=0, say=print)
    part, seen = model.view("intent", params)             # the family's own model, with the head of that task
    part.apply(seen, inputs).logits

A task that predicts tokens uses the vocabulary head of the pretrained model (``head/...``), which several tasks may share.
Everything but the head is shared, BERT's pooler included. A family needs to know nothing of this.
"""

from __future__ import annotations

import dataclasses as dc
import zlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.errors import ConfigError
from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.ops import Adapted
from ftjax.params import Store, Table, init_leaf, key_of


@dc.dataclass(frozen=True)
class TaskHead:
    """A task, its head, and the task whose head that is."""

    task: str
    spec: HeadSpec
    owner: str

    def key(self, key: str) -> str:
        """Where the run's store has what the family's table calls `key`."""
        own = key.startswith("head/") and not self.spec.is_vocabulary
        return f"heads/{self.owner}/{key.removeprefix('head/')}" if own else key


@dc.dataclass(frozen=True)
class Several:
    """A model with a head per task; whatever is not said here is as the family says of `base`.

    Attributes:
      base: the model with the vocabulary head where a task has it, else with the first task's.
      tasks: heads by task.
    """

    base: Model
    tasks: tuple[TaskHead, ...]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    @cached_property
    def models(self) -> dict[str, Model]:
        """The family's model of each task."""
        return {t.task: dc.replace(self.base, head=t.spec) for t in self.tasks}

    @cached_property
    def table(self) -> Table:
        """Shared parameters and sites, and every head."""
        found: Table = {}
        for t in self.tasks:
            for key, spec in self.models[t.task].table.items():
                at = t.key(key)
                found.setdefault(at, spec if at == key else dc.replace(spec, hf=f"heads.{t.owner}.{spec.hf}"))
        return found

    @property
    def always_trained(self) -> tuple[str, ...]:
        """Every head of a task, which is nothing without training."""
        return ("heads/*",) if any(k.startswith("heads/") for k in self.table) else ()

    def view(self, task: str, params: Store) -> tuple[Model, Store]:
        """The model of one task and what it reads; dropout masks differ between tasks."""
        t = next(t for t in self.tasks if t.task == task)
        mine, out = f"heads/{t.owner}/", {}
        for key, value in params.items():
            if key.startswith("heads/"):
                if key.startswith(mine) and not t.spec.is_vocabulary:
                    out["head/" + key.removeprefix(mine)] = _own(value, task)
            elif t.spec.is_vocabulary or not key.startswith("head/"):
                out[key] = _own(value, task)
        return self.models[task], out


def _own(value: Any, task: str) -> Any:
    if not isinstance(value, Adapted) or value.key is None:
        return value
    number = jnp.uint32(zlib.crc32(task.encode()))
    fold = jax.random.fold_in
    key = jax.vmap(fold, (0, None))(value.key, number) if value.key.ndim else fold(value.key, number)
    return Adapted(value.base, value.delta, key)


def views(model: Any, params: Store) -> dict[str, tuple[Model, Store]]:
    """The model and parameters of every task by name; of a plain model one, without a name."""
    if isinstance(model, Several):
        return {t.task: model.view(t.task, params) for t in model.tasks}
    return {"": (model, params)}


def load_several(
    source: Any, numerics: Numerics, heads: tuple[TaskHead, ...], *, seed: int, vocab: int, say: Callable[[str], None]
) -> tuple[Several, Store]:
    """Loads a model and puts the heads on it; new heads are drawn by their path, so that tasks do not move each other's.

    Args:
      source: a component registered under "model".
      numerics: how to compute.
      heads: of the tasks.
      seed: of the new heads.
      vocab: size of the vocabulary, for a source that needs it.
      say: told of new heads.

    Raises:
      ConfigError: the family has no such head; names the task.
    """
    first = next((t for t in heads if t.spec.is_vocabulary), heads[0])
    model, params = _load(source, numerics, first, heads, seed, vocab, say)
    several = Several(model, heads)
    try:
        _ = several.models
    except ConfigError:
        for t in heads:
            _named(heads, t, lambda t=t: dc.replace(model, head=t.spec))
        raise
    store = {first.key(k): v for k, v in params.items() if first.spec.is_vocabulary or not k.startswith("head/")}
    rng, made = key_of(jax.random.key(seed), "model"), []
    for t in heads:
        mine = several.models[t.task].table
        lacking = [k for k, s in mine.items() if s.kind != "site" and t.key(k) not in store]
        if any(not k.startswith("head/") for k in lacking):  # a pooler, which only this kind of head has
            _, more = _load(source, numerics, t, heads, seed, vocab, say)
            store |= {k: v for k, v in more.items() if k in lacking and not k.startswith("head/")}
        fresh = [t.key(k) for k in lacking if k.startswith("head/")]
        store |= {k: init_leaf(rng, k, several.table[k], jnp.float32) for k in fresh}
        made += fresh
    if made:
        say(f"new heads, drawn from seed {seed}: {', '.join(made)}")
    return several, store


def _load(source: Any, numerics: Numerics, head: TaskHead, heads: Any, seed: int, vocab: int, say: Any) -> Any:
    def tell(line: str) -> None:
        if "no weights for head/" not in line:  # of these heads none is taken from the files
            say(line)

    return _named(heads, head, lambda: source.load(numerics, seed=seed, vocab=vocab, head=head.spec, say=tell))


def _named(heads: tuple[TaskHead, ...], head: TaskHead, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(f"objective.tasks.{heads.index(head)}.objective  task {head.task!r}: {error}") from None
