"""Generation. The package is also the function: ``ftjax.generate(model, params, tokenizer, prompts)``.

Python binds a submodule to its name in the parent as soon as anyone imports it, over whatever that name meant there.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This module, as the function `ftjax.generate.api.generate`."""

    def __call__(self, *args: Any, **options: Any) -> list[str]:
        from ftjax.generate.api import generate

        return generate(*args, **options)


sys.modules[__name__].__class__ = _Callable
