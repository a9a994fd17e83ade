"""The device mesh and where every array lies on it.

Axes: ``data`` splits the batch, ``fsdp`` splits the batch and the weights, ``tensor`` splits heads, feed-forward and
vocabulary. One device is the mesh of size 1 x 1 x 1. Shardings follow from the logical axes in the parameter table through
`RULES`; an axis that does not divide, or would use a mesh axis twice, is replicated and reported.

    mesh = make_mesh(run.mesh, jax.devices())
    place = Placement(mesh, axes_of_store(store, table))
    state = jax.device_put(state, place.tree(state))
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ftjax import config
from ftjax.errors import DeviceError
from ftjax.params import Table, spec_of
from ftjax.tree import path_of

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv": "tensor",
    "vocab": "tensor",
    "head": None,
    "layer": None,
    "rank": None,
    None: None,
}

Axes = tuple[str | None, ...]


def start_distributed(compute: config.Compute) -> None:
    """Joins the processes of several hosts, when the config asks for it; before any other use of JAX."""
    if compute.distributed:
        jax.distributed.initialize()


def make_mesh(mesh: config.Mesh, devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The mesh over all devices.

    Raises:
      DeviceError: the sizes do not multiply to the number of devices; shows the arithmetic and sizes that would.
    """
    sizes = {a: getattr(mesh, a) for a in AXES}
    n = len(devices)
    free = [a for a, s in sizes.items() if s == -1]
    fixed = math.prod(s for s in sizes.values() if s != -1)
    if len(free) > 1:
        raise DeviceError(f"mesh: only one axis can be -1, got {' and '.join(free)}")
    if free and fixed and n % fixed == 0:
        sizes[free[0]] = n // fixed
    if math.prod(sizes.values()) != n or 0 in sizes.values():
        text = " x ".join(f"{a}={s}" for a, s in sizes.items())
        valid = [d for d in range(1, n + 1) if n % d == 0]
        raise DeviceError(
            f"mesh {text} does not make {n} devices; each axis must divide {n}: {', '.join(map(str, valid))}"
        )
    # Explicit axes (JAX's default) would ask for a sharding at every operation; the compiler propagates ours instead.
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def check_batch(mesh: jax.sharding.Mesh, rows: int, accumulate: int) -> None:
    """Refuses a batch that does not divide over the micro-batches and devices.

    Raises:
      DeviceError: with the arithmetic and the nearest valid batch sizes.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = ways * accumulate
    if rows % unit:
        low = rows // unit * unit
        near = [str(x) for x in (low, low + unit) if x]
        raise DeviceError(
            f"train.batch={rows} rows do not divide into {accumulate} micro-batches over {ways} devices "
            f"({accumulate} x {ways} = {unit}). Nearest: {' or '.join(near)}"
        )


def axes_of_store(store: Mapping[str, Any], table: Table) -> dict[str, Axes]:
    """Logical axes of every array of ``{"base": ..., "overlay": ...}`` (or ``{"teacher": ...}``), by path."""
    found: dict[str, Axes] = {}
    for side, entries in store.items():
        for key, leaf in entries.items():
            spec = spec_of(table, key)
            if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                found[f"{side}/{key}"] = spec.axes
            else:
                found |= {f"{side}/{key}/{field}": axes for field, axes in leaf.axes(spec).items()}
    return found


def spec_for(mesh: jax.sharding.Mesh, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of one array: each mesh axis at most once, and only where it divides."""
    used: set[str] = set()
    out: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        target = RULES[axis]
        fits = target is not None and target not in used and mesh.shape[target] > 1 and size % mesh.shape[target] == 0
        out.append(target if fits else None)
        if fits and target:
            used.add(target)
    return PartitionSpec(*out)


@dc.dataclass(frozen=True)
class Placement:
    """Shardings for everything a run holds.

    Attributes:
      mesh: the devices.
      axes: logical axes by store path (see `axes_of_store`).
    """

    mesh: jax.sharding.Mesh
    axes: dict[str, Axes]

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, leading: int) -> NamedSharding:
        """Rows split over data and fsdp, after `leading` unsplit dimensions (micro-batches)."""
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * leading, BATCH))

    def of(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """One array by its path, which may end in a store path (optimizer moments lie as their parameter does)."""
        for side in ("base/", "overlay/", "teacher/"):
            at = path.find(side)
            axes = self.axes.get(path[at:]) if at >= 0 else None
            if axes is not None and len(axes) == len(shape):
                return NamedSharding(self.mesh, spec_for(self.mesh, axes, shape))
        return self.replicated

    def tree(self, tree: Any) -> Any:
        """A sharding for every leaf of a tree."""
        return jax.tree_util.tree_map_with_path(lambda p, x: self.of(path_of(p), x.shape), tree)

    def idle(self, store: Mapping[str, Any]) -> list[str]:
        """Large arrays that stay whole on every device although a mesh axis wider than 1 was meant to split them."""
        found = []
        for path, axes in self.axes.items():
            wanted = {RULES[a] for a in axes} - {None}
            leaf = store[path.split("/", 1)[0]].get(path.split("/", 1)[1])
            if leaf is None or not hasattr(leaf, "shape") or leaf.size < 1 << 16:
                continue
            got = set(spec_for(self.mesh, axes, leaf.shape)) - {None}
            found += [f"{path} {list(leaf.shape)}: {a} does not divide" for a in wanted - got if self.mesh.shape[a] > 1]
        return found
