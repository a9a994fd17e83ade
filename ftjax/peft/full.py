"""Full fine-tuning: every weight of the base is trained; the overlay is empty."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax

from ftjax.params import Store, Table
from ftjax.peft.base import Overlay
from ftjax.registry import register
from ftjax.schema import Component
from ftjax.tree import Rules


@register("peft")
class Full(Component):
    """All weights trained."""

    mergeable: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = True
    hf_type: ClassVar[str | None] = None
    usual_lr: ClassVar[tuple[float, float]] = (1e-6, 5e-3)

    name: Literal["full"] = "full"

    def labels(self, table: Table) -> Rules:
        """One group."""
        return [("base/*", "full")]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """Nothing is laid over the base."""
        return {}
