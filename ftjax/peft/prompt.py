"""Prompt tuning: n learned vectors before the input (Lester et al. 2021, arXiv:2104.08691).

    peft=Prompt(tokens=16, start="vocabulary")

On families with learned positions or a norm behind the embedding the vectors stand after these; PEFT puts them before, so
that files agree for rotary families only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.params import Store, Table, key_of
from ftjax.peft.base import FROZEN, Overlay
from ftjax.peft.soft import SITE, PromptTap, SoftCodec, width
from ftjax.registry import register
from ftjax.schema import Component
from ftjax.tree import Rules


class PromptCodec(SoftCodec):
    """Prompt tuning in PEFT's format."""

    peft_type = "PROMPT_TUNING"
    READ = (
        *SoftCodec.READ,
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    )

    def settings_of(self, method: Any) -> dict[str, Any]:
        """See `SoftCodec`; where the vectors came from no longer matters."""
        return {"prompt_tuning_init": "RANDOM"}

    def method_of(self, config: Mapping[str, Any]) -> Prompt:
        """See `SoftCodec`."""
        return Prompt(tokens=config["num_virtual_tokens"])


@register("peft")
class Prompt(Component):
    """Learned vectors before the input."""

    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False
    hf_type: ClassVar[str | None] = "PROMPT_TUNING"
    usual_lr: ClassVar[tuple[float, float]] = (1e-4, 0.5)
    hf_codec: ClassVar[PromptCodec] = PromptCodec()

    name: Literal["prompt"] = "prompt"
    tokens: int = Field(16, gt=0, description="Number of virtual tokens.")
    start: Literal["random", "vocabulary"] = Field(
        "vocabulary", description="Initial vectors: drawn with the embedding's spread, or embeddings of drawn tokens."
    )

    def labels(self, table: Table) -> Rules:
        """The vectors."""
        width(table, self.name)
        return [(f"overlay/{SITE}/embeddings", "prompt"), ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """See `start`."""
        dim, key = width(table, self.name), key_of(key, SITE)
        if self.start == "random":
            std = jnp.std(jnp.asarray(params["embed/w"], jnp.float32))
            return {SITE: PromptTap(std * jax.random.normal(key, (self.tokens, dim), jnp.float32))}
        rows = jax.random.randint(key, (self.tokens,), 0, table["embed/w"].shape[0])
        return {SITE: PromptTap(jnp.asarray(params["embed/w"], jnp.float32)[rows])}
