"""Pytrees by path: label leaves by rules, split a tree by label and combine the parts again.

    labels = label(store, [("overlay/*/a", "lora_a"), ("base/*", "frozen")])
    trainable, rest = split(store, labels, lambda l: l != "frozen")
    assert combine(trainable, rest) == store

The parts keep the shape of the whole, with None where the other part has the leaf; None is an empty subtree to JAX, so
`jax.grad` and optax see only what is there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ftjax.errors import ConfigError, nearest

Rules = Sequence[tuple[str, str]]


def path_of(keys: Sequence[Any]) -> str:
    """The path of a leaf as text: ``overlay/layers[0:4]/q/w/a``."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def paths(tree: Any) -> Any:
    """The same tree with each leaf replaced by its path."""
    return jax.tree_util.tree_map_with_path(lambda p, _: path_of(p), tree)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """All leaves of a tree by path, in order."""
    return {path_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def matches(path: str, pattern: str) -> bool:
    """Shell-style matching in which only ``*`` and ``?`` are special: keys hold brackets themselves."""
    return fnmatch.fnmatchcase(path, pattern.replace("[", "[[]"))


def label(tree: Any, rules: Rules) -> Any:
    """The same tree with each leaf replaced by the label of the first rule that matches its path.

    Raises:
      ConfigError: a leaf without a rule, or a rule that is the first match of nothing (most likely a typo).
    """
    used: set[int] = set()

    def one(path: str) -> str:
        for i, (pattern, name) in enumerate(rules):
            if matches(path, pattern):
                used.add(i)
                return name
        raise ConfigError(f"no rule covers the parameter {path}. Rules: {', '.join(p for p, _ in rules)}")

    labels = jax.tree.map(one, paths(tree))
    idle = [rules[i][0] for i in range(len(rules)) if i not in used]
    if idle:
        known = list(leaves_by_path(tree))
        raise ConfigError("patterns that match no parameter", [unmatched(p, known) for p in idle])
    return labels


def unmatched(pattern: str, known: Sequence[str]) -> str:
    """The line of an error for a pattern that matches nothing: the five nearest paths."""
    near = nearest(pattern, known, 5) or list(known[:5])
    return f"{pattern!r} matches nothing. Nearest: {', '.join(near)}"


def split(tree: Any, labels: Any, keep: Callable[[str], bool]) -> tuple[Any, Any]:
    """(leaves whose label passes `keep`, the others), each with None in the other's places."""
    chosen = jax.tree.map(lambda name, x: x if keep(name) else None, labels, tree)
    others = jax.tree.map(lambda name, x: None if keep(name) else x, labels, tree)
    return chosen, others


def combine(*parts: Any) -> Any:
    """The inverse of `split`: at each place the first part that has a leaf there."""
    return jax.tree.map(lambda *xs: next((x for x in xs if x is not None), None), *parts, is_leaf=lambda x: x is None)


def nbytes(tree: Any) -> int:
    """Bytes of all array leaves (shapes are enough)."""
    return sum(int(x.size) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def count(tree: Any) -> int:
    """Number of entries of all array leaves."""
    return sum(int(x.size) for x in jax.tree.leaves(tree))
