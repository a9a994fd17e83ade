"""Where a model's files are: a local folder or a hub id, and the safetensors shards in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ftjax.errors import DataError
from ftjax.safefiles import read_json, stream_tensors

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


def resolve(path_or_id: str) -> Path:
    """A local folder as it is; a hub id (``owner/name``) is downloaded, safetensors and JSON only.

    Raises:
      DataError: neither a folder nor a reachable hub id.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{path_or_id} is a file; a model is a folder with config.json and model.safetensors")
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        raise DataError(f"no model folder at {path_or_id}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"no folder {path_or_id!r}, and the hub does not give it either: {reason}") from None


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or the shards that the index names.

    Raises:
      DataError: there are none; a named shard is absent or lies outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if single.exists():
            return [single]
        pickles = [n for n in _PICKLES if (folder / n).exists()]
        also = f" ({pickles[0]} is a pickle, which ftjax does not open; convert it to safetensors)" if pickles else ""
        raise DataError(f"{folder} has no model.safetensors{also}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise DataError(f"{index} has no weight_map from tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or any(c in name for c in "/\\:"):
            raise DataError(f"{index}: shard {name!r} points outside the folder")
        if not (folder / name).exists():
            raise DataError(f"{index} names {name}, which is not there")
    return [folder / name for name in names]


def stream(files: list[Path]) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Every tensor's name, and a function that reads it."""
    for path in files:
        yield from stream_tensors(path)
