"""Dotted overrides on a plain config: ``peft.rank=8 peft=full optim.lr=3e-4``, in any order.

    apply({"peft": {"name": "lora", "rank": 16}}, ["peft.alpha=4", "peft=lora"]).plain
    == {"peft": {"name": "lora", "alpha": "4"}}       # `peft=` starts that component from its own defaults

A value is read as its field wants it: JSON (``0.1``, ``true``, ``[1, 2]``, ``{"name": "lora"}``), else a string;
``a,b`` where the field is a list; ``none`` where the field may be empty.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from ftjax import registry
from ftjax.config import Run
from ftjax.schema import Arm, Component, arms, collecting, field_arms, to_plain


@dataclass(frozen=True)
class Overridden:
    """The config after overriding, the paths that were set, and what was wrong with the overrides themselves."""

    plain: dict[str, Any]
    paths: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def apply(plain: dict[str, Any], overrides: Sequence[str]) -> Overridden:
    """Sets each ``path=value`` on a copy of `plain`; shorter paths first, so that the order does not matter."""
    out = Overridden(normalise(copy.deepcopy(plain)))
    texts: dict[str, str] = {}
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not all(path.split(".")):
            out.problems.append(f"{item}  expected an override like optim.lr=3e-4")
        elif path in texts:
            out.problems.append(f"{path}  given twice, as {texts[path]} and {text}")
        else:
            texts[path] = text
    for path in sorted(texts, key=lambda p: p.count(".")):
        problem = _set(out.plain, path, texts[path])
        if problem:
            out.problems.append(problem)
        else:
            out.paths.append(path)
            normalise(out.plain)  # a component that came in may have slots of its own
    return out


def normalise(plain: dict[str, Any]) -> dict[str, Any]:
    """Completes in place what JSON may leave out: absent slots, and the name of a component where it is the default."""
    return _named(plain, [Arm(Run)])


def component_at(found: Sequence[Arm], node: Any) -> type[Component] | None:
    """The component class that the data at a place stands for, by its ``name`` in a slot; None if it is none."""
    for arm in found:
        name = node.get("name") if isinstance(node, dict) else None
        cls = registry.known(arm.kind).get(str(name)) if arm.kind else arm.component
        if cls is not None:
            return cls
    return None


def step(found: Sequence[Arm], node: Any, key: str | int) -> list[Arm] | None:
    """What is allowed one level below: the field `key` of the component at `node`, or an item of a list."""
    cls = component_at(found, node)
    if cls is not None:
        return field_arms(cls.model_fields[str(key)]) if key in cls.model_fields else None
    for arm in found:
        if arm.items and str(key).isdecimal():
            index = 0 if arm.items[-1] is ... else int(key)
            return arms(arm.items[index]) if index < len(arm.items) else None
    return None


def _named(node: Any, found: Sequence[Arm]) -> Any:
    if isinstance(node, list):
        return [_named(v, step(found, node, i) or []) for i, v in enumerate(node)]
    cls = component_at(found, node)
    if cls is None or not isinstance(node, dict):
        return node
    for key, info in cls.model_fields.items():
        below = field_arms(info)
        if any(arm.kind for arm in below) and not info.is_required():
            with collecting():
                default = to_plain(info.get_default(call_default_factory=True))
            if default is not None and key not in node:
                node[key] = default
            elif default is not None and isinstance(node[key], dict) and "name" not in node[key]:
                node[key] = {"name": default["name"], **node[key]}
        if key in node:
            node[key] = _named(node[key], below)
    return node


def _set(plain: dict[str, Any], path: str, text: str) -> str | None:
    """Sets one path in place; returns a problem or None."""
    *head, last = path.split(".")
    node: Any = plain
    found: Sequence[Arm] = [Arm(Run)]
    for depth, key in enumerate(head):
        below = step(found, node, key) or []
        if isinstance(node, list):
            if not (key.isdecimal() and int(key) < len(node)):
                return f"{path}  {'.'.join(head[:depth])} has {len(node)} items; the first is 0"
            node = node[int(key)]
        else:
            node[key] = _start(found, node, key) if node.get(key) is None else node[key]
            node = node[key]
        if not isinstance(node, dict | list):
            return f"{path}  {'.'.join(head[: depth + 1])} is {json.dumps(node, default=str)}, which has no fields"
        found = below
    if isinstance(node, list):
        if not (last.isdecimal() and int(last) < len(node)):
            return f"{path}  {'.'.join(head)} has {len(node)} items; the first is 0"
        node[int(last)] = parse_value(text, step(found, node, last) or [])
    else:
        node[last] = parse_value(text, step(found, node, last) or [])
    return None


def _start(found: Sequence[Arm], node: Any, key: str) -> Any:
    """What an override below an absent field changes: the default if that is a list, else an empty group."""
    cls = component_at(found, node)
    info = cls.model_fields.get(key) if cls else None
    default = to_plain(info.get_default(call_default_factory=True)) if info else None
    return default if isinstance(default, list) else {}


def parse_value(text: str, found: Sequence[Arm]) -> Any:
    """The JSON-like value that `text` means for a field with these alternatives (none: the field is unknown)."""
    allowed = [arm.type for arm in found]
    literals = [v for t in allowed if get_origin(t) is Literal for v in get_args(t)]
    if text in literals:
        return text
    if NoneType in allowed and text.lower() in ("none", "null"):
        return None
    if any(arm.kind for arm in found) and not text.lstrip().startswith(("{", "[")):
        return {"name": text}
    rows = next((arm for arm in found if arm.items), None)
    scalar_too = any(not arm.items and arm.type is not NoneType for arm in found)
    if rows is not None and not text.lstrip().startswith("[") and ("," in text or not scalar_too):
        return [
            parse_value(part.strip(), step([rows], None, i) or []) for i, part in enumerate(text.split(",")) if text
        ]
    value = _json(text)
    wants_text = str in allowed or (literals and all(isinstance(v, str) for v in literals))
    if wants_text and not isinstance(value, str) and not {int, float, bool}.intersection(allowed):
        return text  # data.path=1e5 is a name, not a number
    if int in allowed and float not in allowed and isinstance(value, float) and value.is_integer():
        return int(value)  # train.steps=1e4
    return value


def _json(text: str) -> Any:
    for read in (json.loads, int, float):  # after JSON, numbers as Python writes them: .5, 1_000, nan
        try:
            return read(text)
        except ValueError:
            continue
    return text
