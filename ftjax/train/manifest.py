"""The manifest of a step folder: size and sha256 of every file, under a checksum of its own.

write_atomic(path / MANIFEST, sealed({"step": 9, "metric": None, "leaves": {}, "files": hash_files(path)}))
damage = examine(path)             # None, or what is wrong
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ftjax.train.files import reason_of

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Damage:
    """Why a step folder is not used: `reason` names its place in quarantine, `text` tells the user."""

    reason: str
    text: str


def sealed(manifest: dict) -> str:
    """The manifest as text that holds its own checksum."""
    body = {k: v for k, v in manifest.items() if k != "checksum"}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"checksum": checksum}, indent=1, sort_keys=True) + "\n"


def read_manifest(path: Path) -> dict | None:
    """The manifest of a step folder, or None unless every byte of it is as `sealed` made it."""
    try:
        text = (path / MANIFEST).read_bytes().decode()
        manifest = json.loads(text)
        return manifest if sealed(manifest) == text else None
    except (OSError, ValueError, AttributeError):  # AttributeError: JSON, but not an object
        return None


def hash_files(path: Path) -> dict[str, dict]:
    """Size and sha256 of every file below `path` but the manifest; each is on the disk afterwards."""
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(path / name), names), strict=True))


def examine(path: Path) -> Damage | None:
    """Compares a step folder with its manifest, byte for byte; None when everything agrees.

    Files that the manifest does not name are ignored: file systems and backup tools leave such behind.
    """
    if not any(path.iterdir()):
        return Damage("empty", "the folder is empty")
    if not (path / MANIFEST).exists():
        return Damage("no-manifest", f"{MANIFEST} is missing, so nothing proves the files")
    manifest = read_manifest(path)
    if manifest is None:
        return Damage("manifest", f"{MANIFEST} does not agree with its own checksum")
    if manifest["step"] != int(path.name):
        return Damage("step", f"{MANIFEST} is of step {manifest['step']}")
    for name, entry in manifest["files"].items():
        if not (path / name).is_file():
            return Damage("missing-file", f"{name} is missing")
        size = (path / name).stat().st_size
        if size != entry["size"]:
            return Damage("size", f"{name} has {size} bytes, saved were {entry['size']}")
    try:
        now = hash_files(path)
    except OSError as e:
        return Damage("unreadable", reason_of(e))
    wrong = [name for name, entry in manifest["files"].items() if now[name] != entry]
    return Damage("hash", f"sha256 of {wrong[0]} differs from what was saved") if wrong else None


def _hash_file(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())  # a manifest must not survive a power cut that its files do not
        return {"size": file.tell(), "sha256": digest.hexdigest()}
