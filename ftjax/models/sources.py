"""Where a run's model comes from: `Pretrained` (a folder, a hub id, or the embedded base) or `Scratch` (new weights).

model=Pretrained(path="my/llama", dtype="bfloat16")
model=Pretrained(path="my/llama", quantize=NF4())
model=Scratch(family="llama", settings=("hidden_size=192", "num_hidden_layers=6", ...), tokenizer="my/tokenizer")
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ftjax.errors import FtjaxError
from ftjax.headspec import HeadSpec
from ftjax.models import hf
from ftjax.models.base import Model, Numerics
from ftjax.models.folder import resolve
from ftjax.models.tensors import Place
from ftjax.params import Store, Table, init_leaf, key_of
from ftjax.peft.base import FROZEN, cut_for
from ftjax.quant.base import Storage, trained_lines
from ftjax.registry import register
from ftjax.safefiles import read_json
from ftjax.schema import Component, Default, Slot
from ftjax.tree import matches

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
    quantize: Annotated[Any, Slot("quant"), Field(description="How the kernels of the blocks are held.")] = Default(
        "quant", "none"
    )
    adapter: str = Field("", description="Adapter folder that training goes on from, by the same method; empty: none.")

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
            str(self.folder), dtype=self.dtype, numerics=numerics, head=head, seed=seed, say=say, place=place,
            storage=self.quantize,
        )  # fmt: skip

    def check(self, run: Any) -> Iterator[str]:
        """Quantized kernels cannot be trained. A hub id is judged when it is loaded."""
        if self.adapter and self is not run.model:
            yield f"adapter={self.adapter}  only the trained model goes on from an adapter: merge it into {self.path} first"
        file = (embedded_folder() if self.path == EMBEDDED else Path(self.path)) / "config.json"
        if self is not run.model or not self.quantize.packs or not file.is_file():
            return  # a teacher is never trained
        try:
            table = hf.model_of(read_json(file), Numerics()).table
            keys = trained_keys(run.peft, table, self.quantize)
        except FtjaxError:
            return  # of the model or of the method, and told where these are made
        place = f"peft={run.peft.name}, model.quantize={self.quantize.name}"
        yield from (f"{place}  {line}" for line in trained_lines(keys, method="the method"))


def source_of(run: Any, *, begins: bool = True) -> Any:
    """The run's model, its kernels held as the method wants them: LoftQ finds its start as they are read, if a run `begins`."""
    if not (hasattr(run.peft, "storage") and hasattr(run.model, "quantize")):
        return run.model
    held = run.peft.storage(run.model.quantize, begins=begins)
    return run.model if held is run.model.quantize else run.model.model_copy(update={"quantize": held})


def trained_keys(method: Any, table: Table, storage: Storage) -> list[str]:
    """Kernels that `storage` would quantize and `method` would train.

    Raises:
      ConfigError: the method does not fit the model.
    """
    rules = method.labels(table)
    counted: Store = {k: np.zeros(s.shape[:1], np.int8) for k, s in table.items() if storage.covers(k, s)}
    keys = cut_for(counted, {}, method, table)
    first = {k: next((name for rule, name in rules if matches(f"base/{k}", rule)), FROZEN) for k in keys}
    return [k for k, name in first.items() if name != FROZEN]


@register("model")
class Scratch(Component):
    """A new model with random weights."""

    name: Literal["scratch"] = "scratch"
    family: str = Field("llama", description="Model family, as config.json's model_type names it.")
    settings: tuple[str, ...] = Field((), description="Entries of config.json as name=value.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the exported weights.")
    tokenizer_path: str = Field("", description="Tokenizer folder; empty: a new one is trained on the data.")
    tokenizer_kind: Literal["bpe", "bpe-mask", "wordpiece"] = Field(
        "bpe", description="A new tokenizer: byte-level BPE for decoders, with a mask for RoBERTa, WordPiece for BERT."
    )
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
