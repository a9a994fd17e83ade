"""Pydantic's findings on a config as lines for people: the path and value, what is allowed, the nearest match.

    peft.rnak=8  unknown field of LoRA. Did you mean 'rank'? Fields: name, rank, alpha
    optim.lr=fast  expected a float > 0, got 'fast'

The place and the reason are two spaces apart, as `ConfigError` wants them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from ftjax import registry
from ftjax.config import Run
from ftjax.errors import did_you_mean, nearest
from ftjax.explain import ELSEWHERE, same_leaf
from ftjax.overrides import component_at, step
from ftjax.schema import Arm, Component
from ftjax.words import FOREIGN, describe, got, short, show

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


@dataclass(frozen=True)
class Place:
    """Where an error is: the dotted path, what is allowed there (None: unknown field) and the class that owns it."""

    path: str
    found: Sequence[Arm] | None
    owner: type[Component]


def problems(error: ValidationError, *, plain: dict[str, Any], lines: Mapping[str, int]) -> list[str]:
    """One line per wrong field: the path and value, what is allowed, the nearest match.

    Args:
      error: pydantic's findings on `plain`.
      plain: the data that was validated.
      lines: source lines by dotted path, where known.
    """
    texts: dict[str, str] = {}
    unions = set()
    for detail in error.errors():
        unknown = detail["type"] == "extra_forbidden"
        place = _locate(detail["loc"], plain, extra=unknown)
        where, value = place.path, detail["input"]
        while unknown and isinstance(value, dict) and len(value) == 1 and FOREIGN not in value:
            (key, value), *_ = value.items()  # an override below an unknown group: show it as it was typed
            where += f".{key}"
        scalar = not isinstance(value, dict | list) or FOREIGN in value or detail["type"] == "union_tag_invalid"
        if detail["type"] != "missing" and scalar:
            where += f"={short(show(value))}"
        line = lines.get(place.path)
        text = f"{where}  {_reason(detail, place)}" + (f" (line {line})" if line else "")
        texts.setdefault(place.path, text)  # one line per field: each arm of a union reports on its own
        if place.found and len(place.found) > 1:
            unions.add(place.path)
    # A list and its items are both at fault: in a union the field says it all, else the items are more precise.
    above = {path: [p for p in texts if path.startswith(f"{p}.")] for path in texts}
    vague = {p for path in texts for p in above[path]} - unions
    return [text for path, text in texts.items() if path not in vague and not unions.intersection(above[path])]


def _locate(loc: tuple[int | str, ...], plain: Any, *, extra: bool) -> Place:
    """Pydantic's location without the labels of unions, followed through the data."""
    node, owner, found = plain, Run, [Arm(Run)]
    path: list[str] = []
    keys = list(loc[:-1] if extra else loc)
    in_slot = False
    for key in keys:
        if in_slot and isinstance(node, dict) and key == node.get("name"):
            in_slot = False
            continue
        below = step(found, node, key)
        if below is None:
            continue
        owner = component_at(found, node) or owner
        if isinstance(node, list):
            node = node[int(key)] if int(key) < len(node) else None  # a list may be too short
        else:
            node = node.get(key) if isinstance(node, dict) else None
        found, in_slot = below, any(arm.kind for arm in below)
        path.append(str(key))
    if extra:
        return Place(".".join([*path, str(loc[-1])]), None, component_at(found, node) or owner)
    return Place(".".join(path), found, owner)


def _reason(detail: ErrorDetails, place: Place) -> str:
    kind, value = detail["type"], detail["input"]
    if place.found is None:
        fields = ", ".join(place.owner.model_fields)
        return f"unknown field of {place.owner.__name__}.{_meant(place)} Fields: {fields}"
    if kind == "union_tag_invalid":
        slot = next(arm.kind for arm in place.found if arm.kind)
        name, known = str(value["name"]), registry.known(slot)
        return f"unknown {slot} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}"
    if kind in ("value_error", "assertion_error"):
        return detail["msg"].partition(", ")[2]
    if kind == "missing":
        return f"is missing: {place.owner.__name__} needs {describe(place.found)}"
    choices = [str(v) for arm in place.found if get_origin(arm.type) is Literal for v in get_args(arm.type)]
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"expected {describe(place.found)}, got {got(value)}" + (f".{hint}" if hint else "")


def _meant(place: Place) -> str:
    """Where an unknown field belongs: under its name in ftjax, in its own group, or near to a name of this group."""
    name = place.path.rpartition(".")[2]
    meant = ELSEWHERE.get(name) or same_leaf(name) or next(iter(nearest(name, place.owner.model_fields, 1)), None)
    return f" Did you mean {meant!r}?" if meant else ""
