"""OLMo 2: norms after each part instead of before it, and over all queries and keys (arXiv:2501.00656)."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar

from ftjax.models.base import FamilyConfig
from ftjax.models.hfconfig import HFConfig
from ftjax.models.llama import Arch, Llama, LlamaConfig
from ftjax.registry import register


@dc.dataclass(frozen=True)
class Olmo2Config(LlamaConfig):
    """The numbers of an OLMo 2."""

    model_type: ClassVar[str] = "olmo2"
    unwritten: ClassVar[tuple[str, ...]] = ("mlp_bias", "head_dim")

    @classmethod
    def extra(cls, c: HFConfig) -> dict[str, Any]:
        """Nothing beyond Llama's."""
        c.require("hidden_act", "silu")
        return {}

    @property
    def arch(self) -> Arch:
        """Norms after, in float32."""
        return Arch(norms="after", norm_offset=0.0, qk_norm="all")


@register("family", "olmo2")
@dc.dataclass(frozen=True)
class Olmo2(Llama):
    """OLMo 2 with one of its heads."""

    family: ClassVar[str] = "olmo2"
    Config: ClassVar[type[FamilyConfig]] = Olmo2Config
    heads: ClassVar[dict[str, str]] = {
        "causal_lm": "Olmo2ForCausalLM",
        "sequence_classification": "Olmo2ForSequenceClassification",
        "value": "Olmo2ForSequenceClassification",
    }
