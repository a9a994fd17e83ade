"""Where a run's model comes from: `Pretrained` (a folder, a hub id, or the embedded base) or `Scratch` (new weights).

model=Pretrained(path="my/llama", dtype="bfloat16")
model=Scratch(family="llama", settings=("hidden_size=192", "num_hidden_layers=6", ...), tokenizer="my/tokenizer")
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.headspec import HeadSpec
from ftjax.models import hf
from ftjax.models.base import Model, Numerics
from ftjax.models.folder import resolve
from ftjax.models.tensors import Place
from ftjax.params import Store, init_leaf, key_of
from ftjax.registry import register
from ftjax.schema import Component

EMBEDDED = "embedded"
Placer = Callable[[Model], Place]


def embedded_folder() -> Path:
    """The small Llama that comes with the package."""
    return Path(__file__).parent.parent / "assets" / "base"


@register("model")
class Pretrained(Component):
    """A model folder in Hugging Face layout, a hub id, or the embedded base."""

    name: Literal["pretrained"] = "pretrained"
    path: str = Field(EMBEDDED, min_length=1, description="Folder, hub id, or 'embedded' for the model in the package.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the frozen weights.")

    @property
    def folder(self) -> Path:
        """The local folder; a hub id is downloaded."""
        return embedded_folder() if self.path == EMBEDDED else resolve(self.path)

    @property
    def tokenizer(self) -> Path | None:
        """Where the tokenizer lies."""
        return self.folder

    @property
    def label(self) -> str:
        """The base as an exported adapter names it."""
        return str(self.folder) if self.path == EMBEDDED else self.path

    def load(
        self, numerics: Numerics, *, seed: int, vocab: int, head: HeadSpec | None = None,
        say: Callable[[str], None] = warnings.warn, place: Placer | None = None,
    ) -> tuple[Model, Store]:  # fmt: skip
        """(model, parameters); `say` is told of a head that is not in the files."""
        return hf.load(
            str(self.folder), dtype=self.dtype, numerics=numerics, head=head, seed=seed, say=say, place=place
        )


@register("model")
class Scratch(Component):
    """A new model with random weights."""

    name: Literal["scratch"] = "scratch"
    family: str = Field("llama", description="Model family, as config.json's model_type names it.")
    settings: tuple[str, ...] = Field((), description="Entries of config.json as name=value.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the exported weights.")
    tokenizer_path: str = Field("", description="Tokenizer folder; empty: a byte-level BPE trained on the data.")
    vocab: int = Field(4096, gt=256, description="Size of a newly trained vocabulary.")

    @property
    def tokenizer(self) -> Path | None:
        """Where the tokenizer lies; None when it is to be trained."""
        return Path(self.tokenizer_path) if self.tokenizer_path else None

    @property
    def label(self) -> str:
        """There is no base to name."""
        return ""

    def load(
        self, numerics: Numerics, *, seed: int, vocab: int, head: HeadSpec | None = None,
        say: Callable[[str], None] = warnings.warn, place: Placer | None = None,
    ) -> tuple[Model, Store]:  # fmt: skip
        """(model, parameters drawn from the seed by path)."""
        settings: dict[str, Any] = {"model_type": self.family, "vocab_size": vocab}
        for item in self.settings:
            name, _, value = item.partition("=")
            try:
                settings[name] = json.loads(value)
            except json.JSONDecodeError:
                settings[name] = value
        model = hf.model_of(settings, numerics, head)
        rng = key_of(jax.random.key(seed), "model")
        put: Any = place(model) if place else (lambda _, x: x)
        specs = {k: s for k, s in model.table.items() if s.kind != "site"}
        return model, {k: put(k, init_leaf(rng, k, s, jnp.float32)) for k, s in specs.items()}
