"""Gemma 2: norms on both sides of each part, soft caps, every other layer with a window (arXiv:2408.00118).

h = h + norm(attention(norm(h)));   h = h + norm(Wd (gelu(Wg x) * Wu x)), x = norm(h);   norms multiply by 1 + w
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar

from ftjax.models.base import FamilyConfig
from ftjax.models.hfconfig import HFConfig
from ftjax.models.llama import Arch, Llama, LlamaConfig
from ftjax.models.transformer import decoder_heads
from ftjax.models.windows import FULL, SLIDING, layer_types
from ftjax.registry import register


@dc.dataclass(frozen=True)
class Gemma2Config(LlamaConfig):
    """The numbers of a Gemma 2."""

    query_pre_attn_scalar: int = 0
    sliding_window: int = 0
    layer_types: tuple[str, ...] = ()
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    model_type: ClassVar[str] = "gemma2"
    activation_key: ClassVar[str] = "hidden_activation"
    tied_unless_said: ClassVar[bool] = True
    says: ClassVar[tuple[str, ...]] = ("num_key_value_heads", "head_dim")
    unwritten: ClassVar[tuple[str, ...]] = ("mlp_bias",)

    @classmethod
    def cap(cls, c: HFConfig, name: str) -> float | None:
        """A soft cap, or null."""
        return c.float(name) if c.said(name) is not None else None

    @classmethod
    def usual_types(cls, c: HFConfig) -> tuple[str, ...]:
        """Windows in every other layer, beginning with the first."""
        return tuple(SLIDING if (i + 1) % 2 else FULL for i in range(c.int("num_hidden_layers")))

    @classmethod
    def extra(cls, c: HFConfig) -> dict[str, Any]:
        """Reads caps, windows and the scale of queries."""
        c.require("use_bidirectional_attention", False, absent_ok=True)
        c.require("hidden_act", "gelu_pytorch_tanh", absent_ok=True)  # old files name it twice; only the other is read
        c.require(cls.activation_key, "gelu_pytorch_tanh")
        caps = {k: cls.cap(c, k) for k in ("attn_logit_softcapping", "final_logit_softcapping")}
        return caps | {
            "query_pre_attn_scalar": c.int("query_pre_attn_scalar"),
            "sliding_window": c.int("sliding_window"),
            "layer_types": layer_types(c, cls.usual_types(c)),
        }

    @property
    def windows(self) -> tuple[int, ...]:
        """How far back each layer sees; 0: all."""
        return tuple(self.sliding_window if t == SLIDING else 0 for t in self.layer_types)

    @property
    def arch(self) -> Arch:
        """All that differs."""
        return Arch(
            activation="gelu_pytorch_tanh", norms="both", norm_offset=1.0, windows=self.windows,
            scale=self.query_pre_attn_scalar**-0.5, attention_cap=self.attn_logit_softcapping,
            logit_cap=self.final_logit_softcapping, embed_scale=self.hidden_size**0.5,
        )  # fmt: skip


@register("family", "gemma2")
@dc.dataclass(frozen=True)
class Gemma2(Llama):
    """Gemma 2 with one of its heads."""

    family: ClassVar[str] = "gemma2"
    Config: ClassVar[type[FamilyConfig]] = Gemma2Config
    heads: ClassVar[dict[str, str]] = decoder_heads("Gemma2")
