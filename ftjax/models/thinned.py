"""Some layers of a pretrained model, as the start of a smaller student (Sanh et al. 2019, arXiv:1910.01108, section 3).

student layer j = teacher layer l_j,   by default l = 0, 2, 4, ...; embeddings and head as they are

    model=Thinned(path="my/bert")                              # every second layer
    model=Thinned(path="my/bert", layers=(0, 2, 4, 7, 9, 11))
"""

from __future__ import annotations

import dataclasses as dc
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from pydantic import Field

from ftjax.errors import ConfigError
from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.models.sources import Placer, Pretrained
from ftjax.params import Store, ranged
from ftjax.registry import register


def thin(model: Model, params: Store, layers: Sequence[int]) -> tuple[Model, Store]:
    """The model that has some of the layers.

    Args:
      model: any with one stack of blocks.
      params: its weights.
      layers: those that stay, from 0, ascending; empty: every second.

    Raises:
      ConfigError: no such layers, the family's blocks are not one stack, or its first layer is unlike the rest and not
        the first that stays.
    """
    names = {f.name for f in dc.fields(model.config)}
    if "num_hidden_layers" not in names:
        raise ConfigError(f"{model.family} has no plain stack of layers to choose from")
    n = model.config.num_hidden_layers
    kept = list(layers) or list(range(0, n, 2))
    if kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < n:
        raise ConfigError(
            f"model.layers={tuple(kept)}: must ascend, from 0 to at most {n - 1}; the model has {n} layers"
        )
    since = max(s.since for s in model.table.values())
    if kept[:since] != list(range(since)):
        raise ConfigError(f"model.layers={tuple(kept)}: layer 0 of {model.family} is unlike the others; keep it first")
    numbers: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if types := getattr(model.config, "layer_types", ()):
        numbers["layer_types"] = tuple(types[i] for i in kept)
    small = dc.replace(model, config=dc.replace(model.config, **numbers))
    out: Store = {}
    for key, value in params.items():
        if (r := ranged(key)) is None:
            out[key] = value
        elif at := [j for j, i in enumerate(kept) if r.start <= i < r.stop]:
            rows = np.asarray([kept[j] - r.start for j in at])
            out[str(dc.replace(r, start=at[0], stop=at[-1] + 1))] = jax.tree.map(lambda x, rows=rows: x[rows], value)
    return small, out


@register("model")
class Thinned(Pretrained):
    """Some layers of a pretrained model, e.g. every second, as the start of a smaller student."""

    name: Literal["thinned"] = "thinned"  # type: ignore[assignment]
    layers: tuple[int, ...] = Field((), description="Layers that stay, from 0, ascending; empty: every second.")

    @property
    def label(self) -> str:
        """No folder holds this base."""
        return ""

    def load(
        self, numerics: Numerics, *, seed: int, vocab: int, head: HeadSpec | None = None,
        say: Callable[[str], None] = warnings.warn, place: Placer | None = None,
    ) -> tuple[Model, Store]:  # fmt: skip
        """(model, parameters) of the layers that stay."""
        model, params = super().load(numerics, seed=seed, vocab=vocab, head=head, say=say, place=place)
        return thin(model, params, self.layers)

    def advise(self, run: Any) -> Iterator[str]:
        """An adapter has no base that another program could open."""
        if self is run.model and getattr(run.peft, "hf_codec", None) is not None:
            yield (
                f"model={self.name}, peft={run.peft.name}  no folder holds the base of this adapter; "
                "merge it, or train with peft=full"
            )
