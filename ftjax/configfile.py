"""Configs from files: a Python file with `get_config() -> Run`, or the `config.json` that every run writes.

    run = load("configs/quickstart.py", ["peft.rank=8", "optim.lr=3e-4"])
    load("runs/quickstart/config.json") == run

Nothing is judged while a file is executed; afterwards the whole tree is validated once, so that one message holds all
problems: first those of single fields, then, once the fields are valid, those of their combinations.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftjax import registry, schema
from ftjax.config import Run
from ftjax.errors import ConfigError, FtjaxError, did_you_mean
from ftjax.folders import missing_config
from ftjax.jsontext import caret, parse
from ftjax.overrides import apply
from ftjax.problems import problems
from ftjax.schema import Component, collecting, slot_kind, to_plain
from ftjax.words import FOREIGN, show

LABELS = ("name", "out")  # fields that say where results go, not what they are


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Reads a config, applies dotted overrides and validates the result.

    Args:
      path: a ``.py`` file with ``get_config()`` or a ``.json`` file.
      overrides: assignments such as ``"optim.lr=3e-4"``, in any order.

    Raises:
      ConfigError: the file cannot be read or executed, or the config has problems (all are listed).
    """
    title, text = str(path), _text(Path(path))
    lines: dict[str, int] = {}
    if Path(path).suffix == ".json":
        parsed = parse(text, title=title)
        plain, lines = parsed.value, parsed.lines
        if not isinstance(plain, dict):
            raise ConfigError(f"{title}: expected an object {{...}} with the fields of a run, got {show(plain)}")
    else:
        plain = _execute(text, title)
    return build(plain, overrides, title=title, lines=lines)


def build(
    plain: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    title: str,
    lines: Mapping[str, int] = types.MappingProxyType({}),
) -> Run:
    """A validated run from JSON-like data and overrides; `title` heads the errors, `lines` are source lines by path.

    Raises:
      ConfigError: with every problem found.
    """
    changed = apply({str(k): _json_like(v) for k, v in plain.items()}, overrides)
    kept = {p: n for p, n in lines.items() if not any(f"{p}.".startswith(f"{c}.") for c in changed.paths)}
    found = list(changed.problems)
    schema.refresh()
    run = None
    try:
        run = Run.model_validate_json(json.dumps(changed.plain))
    except ValidationError as e:
        found += problems(e, plain=changed.plain, lines=kept)
    if run is not None and not found:
        found = [text for part in parts(run) for text in part.check(run)]
    if run is None or found:
        raise ConfigError(title, found)
    return run


def override(run: Run, overrides: Sequence[str]) -> Run:
    """The run with dotted overrides applied, validated anew; for sweeps and notebooks.

    Raises:
      ConfigError: with every problem found.
    """
    return build(run.model_dump(mode="json"), overrides, title=f"run {run.name}")


def advice(run: Run) -> tuple[str, ...]:
    """Warnings on a valid run, e.g. a learning rate outside the usual range of its method."""
    return tuple(text for part in parts(run) for text in part.advise(run))


def parts(value: Any) -> Iterator[Component]:
    """A component and all components in it, outer ones first."""
    if isinstance(value, Component):
        yield value
        for inner in vars(value).values():
            yield from parts(inner)
    elif isinstance(value, tuple):
        for inner in value:
            yield from parts(inner)


def dump(run: Run) -> str:
    """Canonical JSON of every field, in the order of the classes; `load` makes an equal run of it."""
    return json.dumps(run.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def config_hash(run: Run) -> str:
    """12 hex digits that identify what is computed: of every field except the labels `name` and `out`."""
    data = {k: v for k, v in run.model_dump(mode="json").items() if k not in LABELS}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def _json_like(value: Any) -> Any:
    """Marks what JSON cannot say (a path, a numpy scalar, a function), so that it is reported at its place."""
    if isinstance(value, dict):
        return {str(k): _json_like(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_like(v) for v in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    return {FOREIGN: repr(value)}


# ------------------------------------------------------------------------------------------------ files
def _text(path: Path) -> str:
    if path.is_dir():
        inside = path / "config.json"
        raise ConfigError(
            f"{path} is a folder, not a config." + (f" Did you mean {str(inside)!r}?" if inside.exists() else "")
        )
    if not path.exists():
        raise ConfigError(missing_config(path))
    if path.suffix not in (".py", ".json"):
        raise ConfigError(
            f"{path}: a config is a .py file with get_config() or a .json file, not {path.suffix or 'this'!r}"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 text: byte {e.object[e.start]:#04x} at offset {e.start}") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None


def _execute(source: str, title: str) -> Any:
    """Runs a Python config and returns the plain data of its run."""
    try:
        code = compile(source, title, "exec", dont_inherit=True)
    except SyntaxError as e:
        line, column = e.lineno or 1, max(e.offset or 1, 1)
        text = e.text or (source.splitlines() or [""])[line - 1]
        raise ConfigError(caret(title, line=line, column=column, source=text, message=e.msg)) from None
    except ValueError as e:  # a NUL byte
        raise ConfigError(f"{title}: {e}") from None
    for kind in filter(None, map(slot_kind, Run.model_fields.values())):
        registry.known(kind)  # a component of ours that fails to import is no fault of the config
    # In sys.modules, because components that a config defines look their annotations up there later on.
    module = types.ModuleType("ftjax_config_" + hashlib.sha256(str(Path(title).resolve()).encode()).hexdigest()[:12])
    module.__file__ = title
    sys.modules[module.__name__] = module
    with collecting():
        _guard(title, source, lambda: exec(code, vars(module)))
        get_config = vars(module).get("get_config")
        if not callable(get_config):
            defined = [
                k
                for k, v in vars(module).items()
                if isinstance(v, types.FunctionType) and v.__module__ == module.__name__
            ]
            raise ConfigError(
                f"{title}: no get_config(). A config defines `def get_config() -> Run:`."
                + did_you_mean("get_config", defined)
            )
        run = _guard(title, source, get_config)
        if not isinstance(run, Run):
            raise ConfigError(f"{title}: get_config() returned {_kind(run)}, not a Run (ftjax.config.Run)")
        return to_plain(run)


def _guard(title: str, source: str, call: Callable[[], Any]) -> Any:
    """Calls into a config; an exception becomes one line that points into the file."""
    try:
        return call()
    except Exception as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == title]
        line = frames[-1].lineno or 0 if frames else 0
        if isinstance(e, FtjaxError):
            message = str(e)
        else:
            message = "".join(
                traceback.TracebackException.from_exception(e, compact=True).format_exception_only()
            ).strip()
        shown = source.splitlines()[line - 1].strip() if line else ""
        place = f"{title}:{line}" if line else title
        raise ConfigError(f"{place}: {message}" + (f"\n    {shown}" if shown else "")) from e


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
