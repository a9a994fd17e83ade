"""Encoded examples on disk, keyed by everything that decides them, so that a stale entry can never be used.

    cache = Cache("gsm8k", {"data": {...}, "tokenizer": "3f2a...", "loader": {...}})
    entry = cache.load()                       # None is a miss; cache.status says why
    cache.store(arrays, meta)

An entry is one ``.npz`` without pickled objects, written under a temporary name and renamed. Place:
``~/.cache/ftjax/data``, or ``FTJAX_CACHE``; an empty ``FTJAX_CACHE`` switches the cache off.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Entry:
    """What was stored: arrays by name, and JSON-like data."""

    arrays: dict[str, np.ndarray]
    meta: Any


class Cache:
    """One entry of the cache.

    Args:
      name: what the entry is of, for its file name and for the reason of a miss.
      parts: everything that decides the content, as JSON-like data.

    Attributes:
      status: "off", "hit", or "miss (why)"; set by `load`.
    """

    def __init__(self, name: str, parts: dict[str, Any]):
        self.parts = flatten({**parts, "code": code_version()})
        self.status = "off"
        root = os.environ.get("FTJAX_CACHE", "~/.cache/ftjax/data")
        self.folder = Path(root).expanduser() if root else None
        self.name = name
        self.key = hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:24]

    def load(self) -> Entry | None:
        """The entry, or None; a damaged file counts as none and is overwritten later."""
        if self.folder is None:
            return None
        path = self.folder / f"{self.name}-{self.key}.npz"
        if not path.exists():
            self.status = f"miss ({self._why()})"
            return None
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {k: file[k] for k in file.files}
            entry = Entry(arrays, json.loads(arrays.pop("meta").tobytes()))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            self.status = "miss (the stored file is damaged)"
            return None
        self.status = "hit"
        return entry

    def store(self, arrays: dict[str, np.ndarray], meta: Any) -> None:
        """Writes the entry; a full or read-only disk only costs the cache."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            data = {**arrays, "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
            self._replace(f"{self.name}-{self.key}.npz", lambda f: np.savez(f, **data))
            self._replace(f"{self.name}.last.json", lambda f: f.write(json.dumps(self.parts, indent=1).encode()))
        except OSError as e:
            self.status = f"{self.status}; not stored: {e.strerror}"

    def _replace(self, name: str, write: Any) -> None:
        assert self.folder is not None
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".partial-")
        try:
            with os.fdopen(handle, "wb") as f:
                write(f)
            os.replace(temporary, self.folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _why(self) -> str:
        assert self.folder is not None
        last = self.folder / f"{self.name}.last.json"
        try:
            old = json.loads(last.read_text())
        except (OSError, ValueError):
            return "nothing stored yet"
        changed = [k for k in {**old, **self.parts} if old.get(k) != self.parts.get(k)]
        return f"changed: {', '.join(changed[:5])}" if changed else "the stored file is gone"


def flatten(parts: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    if not isinstance(parts, dict):
        return {prefix: parts}
    return {
        k: v
        for name, part in parts.items()
        for k, v in flatten(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


@cache
def code_version() -> str:
    """A hash of the code that encodes: this package's sources and the versions of the libraries under it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for package in ("transformers", "tokenizers", "jinja2"):
        digest.update(version(package).encode())
    return digest.hexdigest()[:16]
