"""The environment in text: versions, devices and pairs of versions that are known to break; for issues.

python run.py env
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

PACKAGES = (
    "ftjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pydantic", "transformers",
    "tokenizers", "datasets", "safetensors", "libtpu", "torch", "peft", "trl",
)  # fmt: skip
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_X64", "LIBTPU_INIT_ARGS")


@dataclass(frozen=True)
class BadPair:
    """Versions that break together although their metadata allows it."""

    broken: Callable[[tuple[int, ...], tuple[int, ...]], bool]
    text: str


# Of flax and jax, found by running them (2026-11).
FLAX_JAX = (
    BadPair(lambda flax, jax: flax <= (0, 12, 8) and jax >= (0, 11, 1), "flax <= 0.12.8 breaks on jax >= 0.11.1"),
    BadPair(lambda flax, jax: flax == (0, 12, 9) and jax == (0, 11, 2), "flax 0.12.9 breaks on jax 0.11.2"),
)


def versions() -> dict[str, str]:
    """Installed versions of what matters here, by package."""
    out = {}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def bad_pairs(installed: Mapping[str, str]) -> list[str]:
    """What is known to break among these versions, with the remedy."""
    if not {"flax", "jax"} <= installed.keys():
        return []
    flax, jax = (_numbers(installed[name]) for name in ("flax", "jax"))
    return [f"{pair.text}: pip install -U flax==0.12.12" for pair in FLAX_JAX if pair.broken(flax, jax)]


def devices() -> list[str]:
    """One line per kind of device, or why JAX cannot start."""
    try:
        import jax

        found = jax.devices()
    except Exception as e:  # a broken installation is what this report is for
        return [f"none: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"]
    kinds = dict.fromkeys((d.platform, d.device_kind) for d in found)
    return [f"{sum((d.platform, d.device_kind) == k for d in found)} x {k[0]} ({k[1]})" for k in kinds]


def report() -> str:
    """The text of `run.py env`."""
    installed = versions()
    rows = [("python", platform.python_version()), ("system", platform.platform()), ("cpus", str(os.cpu_count()))]
    rows += installed.items()
    rows += [("devices", line) for line in devices()]
    rows += [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    width = max(len(name) for name, _ in rows)
    bad = bad_pairs(installed) or ["none of the known ones"]
    return "\n".join([*(f"{name:<{width}}  {text}" for name, text in rows), *(f"bad pairs: {line}" for line in bad)])


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 12, 0) of "0.12.0.1": the first three numbers."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
