"""Files of a folder that somebody else made: JSON and safetensors, nothing that can run code when opened.

    config = read_json(folder / "config.json")
    with open_tensors(folder / "model.safetensors") as f:
        w = f.get_tensor("model.norm.weight")

Every way in which such a file is usually broken has its own words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ftjax.errors import DataError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model or adapter folder.

    Raises:
      DataError: the file is absent, unreadable, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected an object, got {type(value).__name__}")
    return value


_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def stream_tensors(path: Path) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Every tensor's name, and a function that reads it, from any thread and without holding the others up.

    Raises:
      DataError: see `open_tensors`, which checks the header before anything is read by it.
    """
    with open_tensors(path) as f:
        names = list(f.keys())
    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
    for name in names:
        entry, start = header[name], 8 + size
        begin, end = entry["data_offsets"]
        if entry["dtype"] in _DTYPES:
            yield name, partial(_read, path, _DTYPES[entry["dtype"]], entry["shape"], start + begin, end - begin)
        else:
            yield name, partial(_open_and_read, path, name)


def _read(path: Path, dtype: Any, shape: list[int], start: int, size: int) -> np.ndarray:
    return np.fromfile(path, np.uint8, count=size, offset=start).view(dtype).reshape(shape)


def _open_and_read(path: Path, name: str) -> np.ndarray:
    with open_tensors(path) as f:
        return f.get_tensor(name)


def open_tensors(path: Path) -> Any:
    """Opens a safetensors file.

    Raises:
      DataError: the file is unreadable, a Git LFS pointer, a pickle, truncated, or no safetensors file.
    """
    try:
        with path.open("rb") as f:
            start = f.read(64)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    # Asked only after the opening failed: the first bytes of a good file are its header's length and may be anything.
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        if start.startswith(b"version https://git-lfs"):
            text = f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it came from"
        elif start[:1] == b"\x80" or start[:2] == b"PK":
            text = f"{path} is a pickle, which can run code when opened; ftjax reads safetensors only"
        else:
            text = f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes): {error}"
        raise DataError(text) from None
