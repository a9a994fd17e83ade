"""Names of components: one table per kind, filled by importing every module of a package.

    @register("peft")
    class LoRA(Component):
        name: Literal["lora"] = "lora"

A kind is a folder: the first question about a kind imports all modules of that folder, so a new file is known at once.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator

from ftjax.errors import ConfigError, did_you_mean

PACKAGES = {
    "model": "ftjax.models",
    "family": "ftjax.models",
    "peft": "ftjax.peft",
    "objective": "ftjax.objectives",
    "data": "ftjax.data.tasks",
    "regime": "ftjax.regimes",
    "eval": "ftjax.evals",
    "quant": "ftjax.quant",
    "weighting": "ftjax.objectives",
}

_tables: dict[str, dict[str, type]] = {kind: {} for kind in PACKAGES}
_discovered: set[str] = set()
_listeners: list[Callable[[], None]] = []


def register(kind: str, name: str | None = None) -> Callable[[type], type]:
    """Class decorator: enters the class under `name`, by default the value of its field ``name``.

    Raises:
      ValueError: the kind is unknown, the class has no name, or the name is taken by another class.
    """
    if kind not in _tables:
        raise ValueError(f"unknown kind {kind!r}. Kinds: {', '.join(_tables)}")

    def enter(cls: type) -> type:
        field = getattr(cls, "model_fields", {}).get("name")
        key = name or (field.default if field else None)
        if not isinstance(key, str):
            raise ValueError(f'{cls.__qualname__} needs a field like `name: Literal["x"] = "x"`')
        taken = _tables[kind].get(key)
        # The same class again is a module or a config that was executed twice: the later definition counts.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{kind} {key!r} is already {taken.__module__}.{taken.__qualname__}")
        _tables[kind][key] = cls
        _notify()
        return cls

    return enter


def _notify() -> None:
    for notify in _listeners:
        notify()


def on_change(notify: Callable[[], None]) -> None:
    """Calls `notify` after each registration (the config schema is rebuilt then)."""
    _listeners.append(notify)


def known(kind: str) -> dict[str, type]:
    """All classes of one kind by name, after importing the kind's package."""
    if kind not in _discovered:
        _discovered.add(kind)
        try:
            package = importlib.import_module(PACKAGES[kind])
            for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        except BaseException:  # a half-read package must not pass for a known one when the caller goes on
            _discovered.discard(kind)
            raise
    return dict(sorted(_tables[kind].items()))


def get(kind: str, name: str) -> type:
    """The class registered as `name`.

    Raises:
      ConfigError: no such name; the text lists the known ones and the nearest.
    """
    table = known(kind)
    if name not in table:
        raise ConfigError(f"unknown {kind} {name!r}.{did_you_mean(name, table)} Known: {', '.join(table)}")
    return table[name]


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """Within this block the tables start empty and no package is read; for tests of the mechanism."""
    global _tables, _discovered
    saved = _tables, _discovered
    _tables, _discovered = {kind: {} for kind in PACKAGES}, set(PACKAGES)
    _notify()
    try:
        yield
    finally:
        _tables, _discovered = saved
        _notify()
