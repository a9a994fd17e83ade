"""Phi-3: Llama with one matrix for queries, keys and values, one for gate and up (Abdin et al. 2024, arXiv:2404.14219).

The fused matrices stay whole, as adapters on them in the ecosystem are. Long-context (longrope) checkpoints are refused.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar

from ftjax.models.base import FamilyConfig
from ftjax.models.hfconfig import HFConfig
from ftjax.models.llama import Arch, Llama, LlamaConfig
from ftjax.models.transformer import decoder_heads
from ftjax.registry import register


@dc.dataclass(frozen=True)
class Phi3Config(LlamaConfig):
    """The numbers of a Phi-3."""

    sliding_window: int | None = None
    original_max_position_embeddings: int | None = None

    model_type: ClassVar[str] = "phi3"
    rotates_in_part: ClassVar[bool] = True
    unwritten: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias", "head_dim")

    @classmethod
    def extra(cls, c: HFConfig) -> dict[str, Any]:
        """Reads the window; the dropout rates of the base are not applied."""
        c.require("hidden_act", "silu")
        for rate in ("resid_pdrop", "embd_pdrop"):
            c.float(rate, implied=0.0)
        window = c.raw("sliding_window")
        original = c.int("original_max_position_embeddings") if c.raw("original_max_position_embeddings") else None
        return {"sliding_window": window, "original_max_position_embeddings": original}

    @property
    def arch(self) -> Arch:
        """Fused matrices, a window in every layer."""
        return Arch(fused=True, windows=(self.sliding_window or 0,) * self.num_hidden_layers)


@register("family", "phi3")
@dc.dataclass(frozen=True)
class Phi3(Llama):
    """Phi-3 with one of its heads."""

    family: ClassVar[str] = "phi3"
    Config: ClassVar[type[FamilyConfig]] = Phi3Config
    heads: ClassVar[dict[str, str]] = decoder_heads("Phi3")
