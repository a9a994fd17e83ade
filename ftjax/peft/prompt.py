"""Prompt tuning: n learned vectors before the input (Lester et al. 2021, arXiv:2104.08691).

    peft=Prompt(tokens=16, start="vocabulary")
    peft=Prompt(tokens=16, start="text", text="Classify the sentiment of this review:")

On families with learned positions or a norm behind the embedding the vectors stand after these; PEFT puts them before, so
that files agree for rotary families only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.errors import ConfigError
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
    start: Literal["random", "vocabulary", "text"] = Field(
        "vocabulary",
        description="Initial vectors: drawn with the embedding's spread, or embeddings of drawn tokens, or of a text's.",
    )
    text: str = Field("", description="start=text: the text; cut to, or repeated up to, as many tokens.")

    @property
    def text_for_start(self) -> str:
        """The text whose token ids `init` asks for."""
        return self.text if self.start == "text" else ""

    def labels(self, table: Table) -> Rules:
        """The vectors."""
        width(table, self.name)
        return [(f"overlay/{SITE}/embeddings", "prompt"), ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store, ids: Sequence[int] = ()) -> Overlay:
        """See `start`; `ids` are those of `text_for_start`.

        Raises:
          ConfigError: they are asked for and there are none.
        """
        dim, key = width(table, self.name), key_of(key, SITE)
        if self.start == "random":
            std = jnp.std(jnp.asarray(params["embed/w"], jnp.float32))
            return {SITE: PromptTap(std * jax.random.normal(key, (self.tokens, dim), jnp.float32))}
        if self.start == "text":
            if not len(ids):
                raise ConfigError("peft.start=text needs token ids of peft.text: as a library, give init(ids=...)")
            chosen = jnp.asarray([ids[i % len(ids)] for i in range(self.tokens)], jnp.int32)
            return {SITE: PromptTap(jnp.asarray(params["embed/w"], jnp.float32)[chosen])}
        rows = jax.random.randint(key, (self.tokens,), 0, table["embed/w"].shape[0])
        return {SITE: PromptTap(jnp.asarray(params["embed/w"], jnp.float32)[rows])}

    def check(self, run: Any) -> Iterator[str]:
        """A text is there where one is asked for, and not where it would be ignored."""
        if (self.start == "text") != bool(self.text.strip()):
            yield f"peft.start={self.start!r}, peft.text={self.text!r}  a text belongs to start=text, and that needs one"
