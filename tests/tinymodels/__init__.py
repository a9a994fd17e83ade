"""One file per family: ``model(numerics=None, head=None)`` gives a tiny one, with `tests.tiny.VOCAB` tokens at most."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


def known() -> dict[str, Callable[..., Any]]:
    """Builders by family, as the files are called."""
    names = [m.name for m in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}").model for name in names}
