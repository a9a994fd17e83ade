"""A state as the flat dictionary of arrays that orbax gets: NamedTuples, dataclasses, None holes, keys are ours alone.

leaves, rebuild = flatten(state)                      # {".opt[0].mu['w']": array, ...}
rebuild({name: unpack(...) for name in leaves})       # the same structure again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.errors import CheckpointError, did_you_mean


def flatten(tree: Any) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """`{path: leaf}` and the way back."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in pairs}
    assert len(leaves) == len(pairs), "two leaves share a path"
    return leaves, lambda arrays: jax.tree.unflatten(treedef, [arrays[name] for name in leaves])


def row(leaf: Any) -> list:
    """What the manifest says of a leaf: dtype, then shape."""
    return [str(leaf.dtype), *leaf.shape]


def is_key(leaf: Any) -> bool:
    """Whether it is a typed PRNG key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def pack(leaf: jax.Array) -> jax.Array:
    """The array that stands for a leaf in the file."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of that array, for a leaf of the template."""
    data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def unpack(leaf: Any, array: jax.Array | None, impl: str | None) -> jax.Array:
    """The leaf again; `impl` names the generator of a key."""
    if array is None:  # an empty leaf, which is not stored
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.random.wrap_key_data(array, impl=impl) if impl else array


def _show(row: list) -> str:
    return f"{row[0]}{row[1:]}"


def require_same(step: int, saved: dict[str, list], wanted: dict[str, list]) -> None:
    """Raises CheckpointError listing the first leaves that differ: the files are good, the run is another."""
    if saved == wanted:
        return
    changed = [n for n in saved if n in wanted and saved[n] != wanted[n]]
    problems = [f"{n}: saved as {_show(saved[n])}, the run has {_show(wanted[n])}" for n in changed]
    absent = [n for n in wanted if n not in saved]
    problems += [f"{n}: the run has it, the checkpoint has not.{did_you_mean(n, saved)}" for n in absent]
    problems += [f"{n}: the checkpoint has it, the run has not" for n in saved if n not in wanted]
    more = [f"and {len(problems) - 8} more"] * (len(problems) > 8)
    title = f"the checkpoint of step {step} is intact but belongs to another state ({len(problems)} leaves differ):"
    hint = "Use the config it was made with, or another run folder."
    raise CheckpointError("\n".join([title, *(f"  {p}" for p in [*problems[:8], *more]), hint]))
