"""What a field may hold and what it got, in words: ``"a float > 0 or none"``, ``"'ten'"``.

    describe(field_arms(Optim.model_fields["lr"])) == "a float > 0"

Used by the errors of a config and by `explain`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from ftjax import registry
from ftjax.schema import Arm, arms

FOREIGN = "<python value>"  # marks a value that is not JSON-like in the data that is validated
WORDS = {int: "an int", float: "a float", bool: "true or false", str: "a string", NoneType: "none"}
PLURALS = {int: "ints", float: "floats", bool: "booleans", str: "strings"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of"}


def describe(found: Sequence[Arm]) -> str:
    """The alternatives in words, e.g. ``"a float > 0 or none"``."""
    return " or ".join(dict.fromkeys(_describe(arm) for arm in found))


def _describe(arm: Arm) -> str:
    limits = [f"{sign} {getattr(m, key):g}" for m in arm.metadata for key, sign in BOUNDS.items() if hasattr(m, key)]
    limits += [f"at least {m.min_length} long" for m in arm.metadata if getattr(m, "min_length", None)]
    limits += [f"like {m.pattern}" for m in arm.metadata if getattr(m, "pattern", None)]
    tail = " " + " and ".join(limits) if limits and arm.type is not NoneType else ""
    if arm.kind:
        return f"a component of kind {arm.kind} ({', '.join(registry.known(arm.kind))})"
    if arm.component:
        return f"fields of {arm.component.__name__}"
    if get_origin(arm.type) is Literal:
        values = [str(v) for v in get_args(arm.type)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if arm.items:
        any_length = arm.items[-1] is ...
        first = arms(arm.items[0])
        word = PLURALS.get(first[0].type) if len(first) == 1 and not first[0].metadata else None
        size = "" if any_length else f"{len(arm.items)} "
        return f"a list of {size}{word or 'items, each ' + describe(first)}{tail}"
    return WORDS.get(arm.type, getattr(arm.type, "__name__", str(arm.type))) + tail


def show(value: Any) -> str:
    """A value as it is written in an override or in JSON."""
    if isinstance(value, dict):
        return str(value.get(FOREIGN) or value.get("name") or json.dumps(value, default=str))
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def got(value: Any) -> str:
    """A value as an error repeats it: strings quoted, the type named where it is the point."""
    if isinstance(value, bool):
        return f"{show(value)} (a bool)"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict) and FOREIGN in value:
        return short(value[FOREIGN])
    return short(repr(value) if isinstance(value, str) else show(value))


def short(text: str, most: int = 60) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."
