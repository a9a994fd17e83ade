"""Qwen2: Llama with biases on queries, keys and values, and windows in some layers (arXiv:2407.10671)."""

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
class Qwen2Config(LlamaConfig):
    """The numbers of a Qwen2; `sliding_window` None where windows are off."""

    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()

    model_type: ClassVar[str] = "qwen2"
    says: ClassVar[tuple[str, ...]] = ("num_key_value_heads",)
    unwritten: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias", "head_dim")

    @classmethod
    def extra(cls, c: HFConfig) -> dict[str, Any]:
        """Reads the windows: from layer `max_window_layers` on, unless the file lists them."""
        c.require("hidden_act", "silu")
        layers, on = c.int("num_hidden_layers"), c.bool("use_sliding_window", implied=False)
        listed = c.raw("layer_types") is not None
        size = c.said("sliding_window") if on else c.raw("sliding_window")
        first = c.int("max_window_layers", implied=None if on and not listed else layers)
        usual = tuple(SLIDING if on and size and i >= first else FULL for i in range(layers))
        types = layer_types(c, usual)
        return {"sliding_window": size if on else None, "layer_types": types}

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        return super().to_hf() | {"use_sliding_window": self.sliding_window is not None}

    @property
    def windows(self) -> tuple[int, ...]:
        """How far back each layer sees; 0: all."""
        size = self.sliding_window or 0
        return tuple(size if t == SLIDING else 0 for t in self.layer_types)

    @property
    def arch(self) -> Arch:
        """Biases and windows."""
        return Arch(qkv_bias=True, windows=self.windows)


@register("family", "qwen2")
@dc.dataclass(frozen=True)
class Qwen2(Llama):
    """Qwen2 and Qwen2.5 with one of their heads."""

    family: ClassVar[str] = "qwen2"
    Config: ClassVar[type[FamilyConfig]] = Qwen2Config
    heads: ClassVar[dict[str, str]] = decoder_heads("Qwen2")
