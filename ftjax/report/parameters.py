"""What is trained and what is not: tensors, entries, bytes and share per optimizer group.

report = parameter_report(table, parts.trainable, parts.const, parts.frozen, parts.groups)
report.trainable, report.total
console.parameters(report)
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Mapping
from typing import Any

from ftjax import tree
from ftjax.params import Table, ranged, spec_of
from ftjax.quant.base import Quantized
from ftjax.report.grid import Grid
from ftjax.report.units import percent, size

FROZEN, QUANTIZED, FIXED = "frozen", "frozen, quantized", "fixed numbers"
UNTRAINED = (FROZEN, QUANTIZED, FIXED)
MASTER_BYTES = 4  # trained leaves are held in float32, whatever the base's dtype


@dc.dataclass(frozen=True)
class GroupRow:
    """One optimizer group, or what is not trained.

    Attributes:
      name: of the group.
      tensors: as a model file counts them, one per layer.
      entries: numbers in them.
      bytes: as held in training.
      modules: names of the modules they belong to.
    """

    name: str
    tensors: int
    entries: int
    bytes: int
    modules: tuple[str, ...] = ()


@dc.dataclass(frozen=True)
class ParameterReport:
    """Rows for the frozen part, the method's fixed numbers and each optimizer group."""

    rows: tuple[GroupRow, ...]

    @property
    def total(self) -> int:
        """Entries of everything."""
        return sum(r.entries for r in self.rows)

    @property
    def trainable(self) -> int:
        """Entries of the optimizer groups."""
        return sum(r.entries for r in self.rows if r.name not in UNTRAINED)

    @property
    def frozen(self) -> int:
        """Entries that are not trained."""
        return self.total - self.trainable

    def grid(self) -> Grid:
        """The report as a table."""
        trained = [r for r in self.rows if r.name not in UNTRAINED]
        totals = [_sum("trainable", trained), _sum("all", self.rows)]
        header = ("group", "tensors", "entries", "share", "bytes", "modules")
        rows = tuple(self._cells(r) for r in (*self.rows, *totals))
        return Grid("parameters", header, rows, totals=2, words=frozenset({0, 5}))

    def _cells(self, r: GroupRow) -> tuple[str, ...]:
        share = percent(r.entries, self.total)
        return (r.name, f"{r.tensors:,}", f"{r.entries:,}", share, size(r.bytes), _names(r.modules))


def parameter_report(table: Table, trainable: Any, const: Any, frozen: Any, groups: Any) -> ParameterReport:
    """Counts a store that `partition` has split.

    Args:
      table: of the model; gives the modules their names.
      trainable: the trained leaves; shapes are enough here and below.
      const: numbers of the overlay that are not trained.
      frozen: the rest.
      groups: name of the optimizer group of each trained leaf.
    """
    names = tree.leaves_by_path(groups)
    by_group: dict[str, dict[str, Any]] = {}
    for path, leaf in tree.leaves_by_path(trainable).items():
        by_group.setdefault(names[path], {})[path] = leaf
    trained = [_row(name, leaves, table, MASTER_BYTES) for name, leaves in sorted(by_group.items())]
    base = {k: v for k, v in frozen["base"].items() if isinstance(v, Quantized)}
    plain = {**frozen, "base": {k: v for k, v in frozen["base"].items() if k not in base}}
    still = {FROZEN: tree.leaves_by_path(plain), FIXED: tree.leaves_by_path(const)}
    rest = [_row(name, leaves, None, None) for name, leaves in still.items() if leaves]
    return ParameterReport((*rest[:1], *_quantized(base), *rest[1:], *trained))


def _quantized(base: Mapping[str, Any]) -> list[GroupRow]:
    """What few bits stand for, and what they take."""
    tensors, entries = sum(_layers(f"base/{k}") for k in base), sum(v.entries for v in base.values())
    return [GroupRow(QUANTIZED, tensors, entries, tree.nbytes(base))] if base else []


def _row(name: str, leaves: Mapping[str, Any], table: Table | None, itemsize: int | None) -> GroupRow:
    tensors = sum(_layers(path) for path in leaves)
    nbytes = sum(int(x.size) * (itemsize or x.dtype.itemsize) for x in leaves.values())
    modules = tuple(dict.fromkeys(_module(path, table) for path in leaves)) if table else ()
    return GroupRow(name, tensors, tree.count(leaves), nbytes, modules)


def _layers(path: str) -> int:
    r = ranged(path.split("/", 1)[1])
    return r.stop - r.start if r else 1


def _module(path: str, table: Table) -> str:
    """The module of a leaf as its model file names it: ``q_proj`` of ``overlay/layers[0:4]/q/w/a``."""
    key = path.split("/", 1)[1]
    while key:  # a leaf inside of a weight or an overlay entry lies below the entry's own path
        try:
            spec = spec_of(table, key)
        except KeyError:
            key = key.rpartition("/")[0]
            continue
        parts = spec.hf.split(".")
        return parts[-2] if len(parts) > 1 else key.split("/")[-2 if "/" in key else -1]
    return path


def _sum(name: str, rows: Iterable[GroupRow]) -> GroupRow:
    rows = tuple(rows)
    return GroupRow(name, sum(r.tensors for r in rows), sum(r.entries for r in rows), sum(r.bytes for r in rows))


def _names(modules: tuple[str, ...], most: int = 8) -> str:
    more = len(modules) - most
    return " ".join(modules[:most]) + (f" and {more} more" if more > 0 else "")
