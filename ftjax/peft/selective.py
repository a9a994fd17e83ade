"""Methods that train some of the base's own weights: what they share, `Partial` and `BitFit` (see also `ftjax.peft.norms`).

    peft=Partial(last=2)                               # the last two layers
    peft=Partial(parts=("norm/*", "layers/q/*"))       # by pattern over the table's names
    peft=BitFit()                                      # every bias (Ben Zaken et al. 2021, arXiv:2106.10199)

Stacks are cut where training begins, so that nothing below the lowest trained layer is differentiated. What was trained is
exported as a whole model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax
from pydantic import Field

from ftjax.errors import ConfigError, nearest
from ftjax.params import Store, Table, ranged, unranged
from ftjax.peft.base import FROZEN, Overlay
from ftjax.registry import register
from ftjax.schema import Component
from ftjax.tree import Rules, matches


class Selective(Component):
    """A method without an overlay: `chosen` says which weights are trained."""

    mergeable: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = True
    hf_type: ClassVar[str | None] = None
    usual_lr: ClassVar[tuple[float, float]] = (1e-5, 1e-2)

    def chosen(self, table: Table) -> list[str]:
        """Patterns over store keys (``layers[2:4]/*``).

        Raises:
          ConfigError: nothing would be trained.
        """
        raise NotImplementedError

    def borders(self, table: Table) -> dict[str, set[int]]:
        """Where stacks must be cut for the patterns to be whole keys: nowhere, unless layers are told apart."""
        return {}

    def labels(self, table: Table) -> Rules:
        """The chosen weights in one group, the rest frozen."""
        return [*((f"base/{pattern}", "selected") for pattern in self.chosen(table)), ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """Nothing is laid over the base."""
        return {}


def weights(table: Table) -> dict[str, Any]:
    """The table without sites and running statistics."""
    return {k: s for k, s in table.items() if s.kind not in ("site", "stat")}


@register("peft")
class Partial(Selective):
    """The last layers, and parts by name."""

    name: Literal["partial"] = "partial"
    last: int = Field(1, ge=0, description="Trained layers, counted from the end of every stack; 0: none as such.")
    parts: tuple[str, ...] = Field((), description="Further weights: patterns over names such as norm/* or layers/q/w.")

    def _stacks(self, table: Table) -> dict[str, int]:
        found: dict[str, int] = {}
        for key in weights(table):
            if r := ranged(key):
                found[r.stack] = max(found.get(r.stack, 0), r.stop)
        return found

    def borders(self, table: Table) -> dict[str, set[int]]:
        """Before the first trained layer of each stack."""
        return {stack: {max(n - self.last, 0)} for stack, n in self._stacks(table).items()} if self.last else {}

    def chosen(self, table: Table) -> list[str]:
        """The last layers by their range, then the parts."""
        stacks, names = self._stacks(table), list(dict.fromkeys(unranged(k) for k in weights(table)))
        if self.last and not stacks and not self.parts:
            raise ConfigError(
                f"peft.last={self.last}: the model has no stack of layers; name its parts in peft.parts. "
                f"Names: {', '.join(names[:8])} ..."
            )
        patterns = [f"{stack}[{max(n - self.last, 0)}:{n}]/*" for stack, n in stacks.items()] if self.last else []
        problems = []
        for part in self.parts:
            hit = [k for k in weights(table) if matches(k, part) or matches(unranged(k), part)]
            if not hit:
                near = ", ".join(nearest(part, names, 5))
                problems.append(f"peft.parts={part!r} matches no weight. Nearest: {near or ', '.join(names[:5])}")
            for key in hit:
                r = ranged(key)
                pattern = f"{r.stack}[*]/{r.rest}" if r else key
                patterns += [pattern] if pattern not in patterns else []
        if problems:
            raise ConfigError("parts that match no weight", problems)
        if not patterns:
            raise ConfigError("peft=partial trains nothing: set peft.last or peft.parts")
        return _distinct(patterns, stacks, self.last)


def _distinct(patterns: list[str], stacks: dict[str, int], last: int) -> list[str]:
    """The patterns without those that the last layers cover wholly (a rule that matches nothing first is an error)."""
    whole = {stack for stack, n in stacks.items() if last >= n}
    return [p for p in patterns if not ("[*]/" in p and p.split("[")[0] in whole)]


@register("peft")
class BitFit(Selective):
    """Every bias of the model (arXiv:2106.10199)."""

    name: Literal["bitfit"] = "bitfit"

    def chosen(self, table: Table) -> list[str]:
        """Leaves of kind "bias", norms' included."""
        return _by_kind(table, ("bias",), "bitfit")


def _by_kind(table: Table, kinds: tuple[str, ...], name: str) -> list[str]:
    heads = ("head/", "heads/")
    return spelled([k for k, s in table.items() if s.kind in kinds and not k.startswith(heads)], table, kinds, name)


def spelled(keys: Iterable[str], table: Table, kinds: tuple[str, ...], name: str) -> list[str]:
    """Patterns that cover whole keys; an error that names the method where there are none."""
    found = []
    for key in keys:
        r = ranged(key)
        found.append(f"{r.stack}[*]/{r.rest}" if r else key)
    if not found:
        there = sorted({s.kind for s in weights(table).values()})
        raise ConfigError(
            f"peft={name}: the model has no {' or '.join(kinds)}. Kinds of its weights: {', '.join(there)}"
        )
    return list(dict.fromkeys(found))
