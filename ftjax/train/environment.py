"""What a run was computed with: versions, devices, commit. Bits repeat only where these are equal."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pydantic",
    "transformers",
    "datasets",
)


def environment() -> dict[str, Any]:
    """The present environment as JSON: nothing in it names the machine or its user."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": jax.process_count(),
        "commit": commit(Path(__file__).parent),
    }


def commit(folder: Path) -> str | None:
    """The git commit of a source folder, with ``+changes`` when files differ from it; None outside of git."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + "+changes" * bool(_git(folder, "status", "--porcelain", "--untracked-files=no", "."))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
