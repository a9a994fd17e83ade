"""A tiny Llama."""

from __future__ import annotations

from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from tests import tiny


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """4 layers, 32 wide, 4 heads over 2 key heads."""
    return tiny.llama(numerics, head=head)
