"""The Python standard library as data: sources that every machine with Python has, read at run time.

    for module in modules():
        module.name, module.path, held_out(module.name)

`held_out` is the one split that everything made of it shares: by top-level package, so that a package's submodules,
which repeat each other's docstrings, stay on one side.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from ftjax.data.rows import share_of
from ftjax.errors import DataError

HELD_OUT_SHARE = 0.1
_SKIP = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "turtledemo",
    "lib2to3",
}
_SKIP |= {"ensurepip", "lib-dynload", "pydoc_data", "_pyrepl"}


@dataclass(frozen=True)
class Module:
    """A source file of the standard library."""

    name: str
    path: Path


def held_out(module: str) -> bool:
    """Whether a module (or anything made of it) belongs to the held-out split."""
    # an accelerator's Python twin has the docstrings of its public module: _pydecimal and decimal go together
    top = module.split(".")[0].lstrip("_").removeprefix("py") or module
    return share_of(f"stdlib/{top}") < HELD_OUT_SHARE


@functools.cache
def modules() -> tuple[Module, ...]:
    """All modules with sources, sorted by name; test packages, IDLE and installed packages left out.

    Raises:
      DataError: this Python has no sources of its standard library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIP.isdisjoint(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            found.append(Module(".".join(parts).removesuffix(".__init__"), path))
    if not found:
        raise DataError(f"the standard library at {root} has no .py sources; set data to a local file instead")
    return tuple(found)


@functools.cache
def identity() -> tuple[tuple[str, str], ...]:
    """What the data depend on: the version of Python and the content of its sources."""
    digest = hashlib.sha256()
    for module in modules():
        digest.update(module.name.encode() + b"\0")
        digest.update(module.path.read_bytes())
    return (("python", platform.python_version()), ("sources", digest.hexdigest()))
