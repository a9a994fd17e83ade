"""Qwen3: Qwen2 without biases, with a norm on the queries and keys of each head (arXiv:2505.09388)."""

from __future__ import annotations

import dataclasses as dc
from typing import ClassVar

from ftjax.models.base import FamilyConfig
from ftjax.models.llama import Arch, Llama
from ftjax.models.qwen2 import Qwen2Config
from ftjax.models.transformer import decoder_heads
from ftjax.registry import register


@dc.dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """The numbers of a Qwen3."""

    model_type: ClassVar[str] = "qwen3"
    says: ClassVar[tuple[str, ...]] = ("num_key_value_heads", "head_dim")
    unwritten: ClassVar[tuple[str, ...]] = ("mlp_bias",)

    @property
    def arch(self) -> Arch:
        """Norms of queries and keys."""
        return Arch(qk_norm="head", windows=self.windows)


@register("family", "qwen3")
@dc.dataclass(frozen=True)
class Qwen3(Llama):
    """Qwen3 with one of its heads."""

    family: ClassVar[str] = "qwen3"
    Config: ClassVar[type[FamilyConfig]] = Qwen3Config
    heads: ClassVar[dict[str, str]] = decoder_heads("Qwen3")
