"""An evaluation beside the run's own, chosen on the command line: ``evals=NAME field=value ...``.

    request = requested(["evals=lm_eval", "tasks=arc_easy,hellaswag", "limit=100"])
    measured = request.measure(model, params, tokenizer, template="")
    print(measured.table)

An evaluation is a `Component` registered with ``@register("eval")`` that has `measure` and `label`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from pydantic import ValidationError

from ftjax import registry, schema
from ftjax.errors import ConfigError, did_you_mean
from ftjax.overrides import parse_value
from ftjax.params import Store
from ftjax.schema import Component, field_arms

CHOICE = "evals"  # the word that names the evaluation


@dataclass(frozen=True)
class Measured:
    """What an evaluation found: a table for people, and all of it as JSON-like data."""

    table: str
    record: dict[str, Any]


class Evaluation(Protocol):
    """An evaluation of a language model."""

    @property
    def label(self) -> str:
        """What its file is called, without the suffix."""
        ...

    def measure(self, model: Any, params: Store, tokenizer: Any, *, template: str) -> Measured:
        """Evaluates a model, adapters in place; `template` is Jinja text or empty."""
        ...


def asks(words: Sequence[str]) -> bool:
    """Whether the words choose an evaluation."""
    return any(w.startswith(CHOICE + "=") for w in words)


def requested(words: Sequence[str]) -> Evaluation:
    """The evaluation that the words ask for; all of them are its fields.

    Raises:
      ConfigError: no such evaluation, or fields that are wrong; all of them are named.
    """
    texts: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key or key in texts:
            raise ConfigError(f"eval: {word}  " + ("given twice" if key in texts else "expected field=value"))
        texts[key] = text
    name = texts.pop(CHOICE)
    cls: Any = registry.get("eval", name)
    fields = {k: f for k, f in cls.model_fields.items() if k != "name"}
    unknown = [
        f"{k}  unknown field.{did_you_mean(k, fields)} Fields: {', '.join(fields)}" for k in texts.keys() - fields
    ]
    if unknown:
        raise ConfigError(f"{CHOICE}={name}", sorted(unknown))
    plain = {k: parse_value(text, field_arms(fields[k])) for k, text in texts.items()}
    schema.refresh()
    try:
        return cast(Evaluation, cls.model_validate_json(json.dumps(plain)))
    except ValidationError as e:
        wrong = {str(d["loc"][0]): d["msg"] for d in e.errors()}
        lines = [f"{k}{f'={texts[k]}' if k in texts else ''}  {message}" for k, message in wrong.items()]
        raise ConfigError(f"{CHOICE}={name}", lines) from None


def as_json(component: Component) -> dict[str, Any]:
    """The fields of a request, for its record."""
    return component.model_dump(mode="json")
