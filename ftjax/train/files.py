"""Files that survive a crash: written whole or not at all, and lines of JSON that keep every bit of a number."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Replaces `path` by `text`: a reader, or the next start after a kill, sees the old file or the new one.

    Raises:
      OSError: nothing was changed.
    """
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path) -> Any:
    """The JSON value in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def reason_of(error: BaseException | None) -> str:
    """An exception as one line for a user: the system's own words where it has them."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if code := re.search(
        r"os_error_code='(\d+)'", str(error)
    ):  # tensorstore wraps the system's error in a page of text
        return os.strerror(int(code[1]))
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
