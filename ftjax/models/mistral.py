"""Mistral: Llama whose layers see a sliding window (Jiang et al. 2023, arXiv:2310.06825)."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar

from ftjax.models.base import FamilyConfig
from ftjax.models.hfconfig import HFConfig
from ftjax.models.llama import Arch, Llama, LlamaConfig
from ftjax.models.transformer import decoder_heads
from ftjax.registry import register


@dc.dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """The numbers of a Mistral; `sliding_window` None is Llama."""

    sliding_window: int | None = None

    model_type: ClassVar[str] = "mistral"
    says: ClassVar[tuple[str, ...]] = ("num_key_value_heads",)
    unwritten: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias")

    @classmethod
    def extra(cls, c: HFConfig) -> dict[str, Any]:
        """Reads the window."""
        c.require("hidden_act", "silu")
        return {"sliding_window": c.int("sliding_window") if c.said("sliding_window") else None}

    @property
    def arch(self) -> Arch:
        """A window in every layer."""
        return Arch(windows=(self.sliding_window or 0,) * self.num_hidden_layers)


@register("family", "mistral")
@dc.dataclass(frozen=True)
class Mistral(Llama):
    """Mistral with one of its heads."""

    family: ClassVar[str] = "mistral"
    Config: ClassVar[type[FamilyConfig]] = MistralConfig
    heads: ClassVar[dict[str, str]] = decoder_heads("Mistral")
