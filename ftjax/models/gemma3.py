"""Gemma 3, text only: Gemma 2 with norms of queries and keys, no caps, five local layers to a global one (arXiv:2503.19786).

Local and global layers have rotary bases of their own; only the global ones are scaled for long contexts.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar

from ftjax.models.base import FamilyConfig
from ftjax.models.gemma2 import Gemma2, Gemma2Config
from ftjax.models.hfconfig import HFConfig
from ftjax.models.llama import Arch
from ftjax.models.rope import Rope, rope_of, rope_settings
from ftjax.models.windows import FULL, SLIDING
from ftjax.registry import register


@dc.dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """The numbers of a Gemma 3 text model; `rope` is that of the global layers."""

    local_rope: Rope | None = None

    model_type: ClassVar[str] = "gemma3_text"
    unwritten: ClassVar[tuple[str, ...]] = ("mlp_bias", "local_rope")

    @classmethod
    def cap(cls, c: HFConfig, name: str) -> float | None:
        """A soft cap; absent means none here."""
        return c.float(name) if c.raw(name) is not None else None

    @classmethod
    def usual_types(cls, c: HFConfig) -> tuple[str, ...]:
        """A global layer after every five local ones, or after `sliding_window_pattern` - 1."""
        period = c.int("sliding_window_pattern", implied=6)
        return tuple(SLIDING if (i + 1) % period else FULL for i in range(c.int("num_hidden_layers")))

    @classmethod
    def read_rope(cls, c: HFConfig) -> Rope:
        """The global layers' settings."""
        both = c.mapping("rope_parameters")
        given = both.get(FULL) if both else c.mapping("rope_scaling")
        return rope_of(c, given or {}, theta=c.raw("rope_theta"))

    @classmethod
    def extra(cls, c: HFConfig) -> dict[str, Any]:
        """Reads the local layers' settings too."""
        for name in ("sliding_window_pattern", "_sliding_window_pattern"):
            c.raw(name)
        given = c.mapping("rope_parameters").get(SLIDING) or {}
        local = rope_of(c, given, theta=c.raw("rope_local_base_freq"))
        return super().extra(c) | {"local_rope": local}

    def write_rope(self) -> dict[str, Any]:
        """Both layers' settings."""
        assert self.local_rope is not None
        return {"rope_parameters": {FULL: rope_settings(self.rope), SLIDING: rope_settings(self.local_rope)}}

    @property
    def arch(self) -> Arch:
        """Gemma 2's, norms of queries and keys, local rotary settings."""
        return dc.replace(super().arch, qk_norm="head", local_rope=self.local_rope)


@register("family", "gemma3_text")
@dc.dataclass(frozen=True)
class Gemma3(Gemma2):
    """Gemma 3's text model with one of its heads."""

    family: ClassVar[str] = "gemma3_text"
    Config: ClassVar[type[FamilyConfig]] = Gemma3Config
    heads: ClassVar[dict[str, str]] = {
        "causal_lm": "Gemma3ForCausalLM",
        "sequence_classification": "Gemma3TextForSequenceClassification",
        "value": "Gemma3TextForSequenceClassification",
    }
