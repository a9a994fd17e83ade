"""What can stand at a dotted path of a config.

    explain("optim.lr") ==
    optim.lr
      type     a float > 0
      default  0.001
      meaning  Peak learning rate. ...

A path into a slot (`peft.rank`) is answered for every component that has the field.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftjax import registry
from ftjax.config import Run
from ftjax.errors import ConfigError, nearest
from ftjax.schema import Component, arms, collecting, field_arms, slot_kind, to_plain
from ftjax.words import describe, show

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

# Names of the same thing in the trainers that people come from.
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup",
    "max_grad_norm": "optim.clip",
    "optimizer": "optim.name",
    "max_steps": "train.steps",
    "batch_size": "train.batch",
    "per_device_train_batch_size": "train.batch",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_checkpointing": "compute.remat",
    "max_seq_length": "loader.max_length",
    "max_len": "loader.max_length",
    "save_steps": "checkpoint.every",
    "eval_steps": "evaluate.every",
    "logging_steps": "train.log_every",
    "output_dir": "out",
    "neftune_noise_alpha": "train.neftune",
}


@dataclass(frozen=True)
class Found:
    """A field and the component that has it; `choice` is that component's name if it sits in a slot."""

    choice: str
    info: FieldInfo


def field_paths() -> Iterator[str]:
    """The dotted path of every field of a run, through slots too."""
    for name, info in Run.model_fields.items():
        yield name
        for _, cls in _components(info):
            yield from dict.fromkeys(f"{name}.{key}" for key in cls.model_fields)


def explain(path: str = "") -> str:
    """What can stand at a dotted path: type, default, meaning; for a group its fields; for a slot its components.

    Raises:
      ConfigError: no such path; the text names the nearest.
    """
    owners: list[tuple[str, type[Component]]] = [("", Run)]
    hits: list[Found] = []
    for depth, key in enumerate(path.split(".") if path else ()):
        chosen = [(name, cls) for name, cls in owners if name == key]
        hits = [Found(name, cls.model_fields[key]) for name, cls in owners if key in cls.model_fields]
        if not hits and chosen:  # peft.lora: one component of a slot
            owners = chosen
            continue
        if not hits:
            names = dict.fromkeys(name for _, cls in owners for name in cls.model_fields)
            here = ".".join(path.split(".")[:depth])
            guess = next(iter(nearest(key, names, 1)), "")
            best = f"{here}.{guess}".strip(".") if guess else ELSEWHERE.get(key) or same_leaf(key) or ""
            raise ConfigError(
                f"explain {path}: no field {key!r} in {here or 'a run'}."
                + (f" Did you mean {best!r}?" if best else "")
                + f" Fields: {', '.join(names)}"
            )
        owners = list(dict.fromkeys(pair for hit in hits for pair in _components(hit.info)))
    if not hits:
        return "\n".join([path or "A run", *(_fields(cls) for _, cls in owners)])
    return "\n".join([path, *_explained(hits)])


def same_leaf(name: str) -> str | None:
    """The path of the first field with this name inside a group, e.g. ``optim.lr`` for ``lr``."""
    return next((p for p in field_paths() if p.endswith(f".{name}")), None)


def _components(info: FieldInfo) -> list[tuple[str, type[Component]]]:
    """The components that a field can hold, named if they sit in a slot; those of list items too."""
    here = field_arms(info)
    out: list[tuple[str, type[Component]]] = []
    for arm in [*here, *(inner for row in here for item in row.items[:1] for inner in arms(item))]:
        out += registry.known(arm.kind).items() if arm.kind else []
        out += [("", arm.component)] if arm.component else []
    return out


def _explained(hits: Iterable[Found]) -> Iterator[str]:
    """The text on one field; owners that say the same of it are named together."""
    texts: dict[str, list[str]] = {}
    for hit in hits:
        texts.setdefault(_text(hit.info), []).append(hit.choice)
    for text, choices in texts.items():
        if any(choices):
            yield f"  of {', '.join(choices)}:"
        yield text


def _text(info: FieldInfo) -> str:
    kind = slot_kind(info)
    rows = [("type", describe(field_arms(info))), ("default", _default(info)), ("meaning", info.description or "")]
    lines = [f"  {label:<8} {text}" for label, text in rows if text]
    components = _components(info)
    if kind:
        width = max(len(name) for name, _ in components)
        lines += ["  components:", *(f"    {name:<{width}}  {first_line(cls)}" for name, cls in components)]
    else:
        lines += [_fields(cls) for _, cls in components]
    return "\n".join(lines)


def _fields(cls: type[Component]) -> str:
    rows = [
        (name, _default(info), info.description or describe(field_arms(info)))
        for name, info in cls.model_fields.items()
    ]
    names, defaults = (max(len(row[i]) for row in rows) for i in (0, 1))
    body = [f"    {name:<{names}}  {default:<{defaults}}  {meaning}" for name, default, meaning in rows]
    return "\n".join([f"  {first_line(cls)}", f"    {'field':<{names}}  {'default':<{defaults}}", *body])


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "(required)"
    with collecting():
        value = to_plain(info.get_default(call_default_factory=True))
    if isinstance(value, dict) and slot_kind(info) is None:
        return ""
    return '""' if value == "" else show(value)


def first_line(cls: type) -> str:
    """The first line of a class's own docstring."""
    return (inspect.cleandoc(cls.__doc__ or "").splitlines() or [""])[0]
