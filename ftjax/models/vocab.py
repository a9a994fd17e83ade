"""More tokens than a model was trained with; new rows of the embedding and the head begin at the mean of the old ones.

    model, params = resize_vocabulary(model, params, len(tokenizer))

The mean (Hewitt 2021) keeps the new tokens' logits near the average one, so that they take little probability at first.
transformers draws around that mean, with a spread of 3e-5 of theirs; here the rows are the mean itself, and resizing twice
gives the same. So does the head's bias, as in transformers, except that BERT's becomes 0 there.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax.numpy as jnp

from ftjax.errors import ConfigError
from ftjax.models.base import Model
from ftjax.ops import Adapted, Weight
from ftjax.params import Store, join


def resize_vocabulary(model: Model, params: Store, size: int) -> tuple[Model, Store]:
    """The model with `size` tokens.

    Args:
      model: any language model or classifier over tokens.
      params: plain weights, their stacks cut or not; merge adapters first.
      size: number of tokens, at least as many as now.

    Returns:
      (model, params): logits of the old tokens are unchanged; stacks are whole. `model.config.vocab_size` is `size`, and
      everything but the embedding and the vocabulary head (with its bias) is the array that was given.

    Raises:
      ConfigError: fewer tokens than now, no vocabulary, or adapters in `params`.
    """
    old = getattr(model.config, "vocab_size", None)
    if old is None:
        raise ConfigError(f"{model.family} has no vocabulary")
    if size < old:
        raise ConfigError(f"the model has {old} tokens; making it {size} would drop some, which is not done")
    table, params = model.table, join(params)
    foreign = [k for k, v in params.items() if k not in table or table[k].kind == "site" or isinstance(v, Weight)]
    if foreign:
        raise ConfigError(f"{foreign[0]} carries an adapter: call ftjax.merge first, or resize before it is bound")
    larger = dc.replace(model, config=dc.replace(model.config, vocab_size=size))
    grown: Store = {}
    for key, value in params.items():
        want = larger.table[key].shape
        grown[key] = value if want == table[key].shape else _extended(value, want)
    return larger, grown


def untie(model: Model, params: Store) -> tuple[Model, Store]:
    """The same model with an output head of its own, which begins as the table of tokens.

    Args:
      model: whose head is the transpose of its embedding.
      params: its weights, adapters in place or not; one on the lookup of the embedding stays there, and can be merged then.

    Returns:
      (model, params): logits are unchanged; saved, the folder says that the head is not tied.

    Raises:
      ConfigError: the head is no such one.
    """
    fields = {f.name for f in dc.fields(model.config)}
    loose = model
    if "tie_word_embeddings" in fields and model.config.tie_word_embeddings:
        loose = dc.replace(model, config=dc.replace(model.config, tie_word_embeddings=False))
    if set(loose.table) - set(model.table) != {"head/w"}:
        raise ConfigError(f"the head {model.head.kind!r} of this {model.family} is not tied to the embedding")
    held = params["embed/w"]
    rows = held.base if isinstance(held, Adapted) else held
    return loose, {**params, "head/w": jnp.array(rows.T)}


def _extended(value: Any, shape: tuple[int, ...]) -> Any:
    """The array grown along its one longer dimension by rows that are the mean of those there."""
    axis = next(i for i, (a, b) in enumerate(zip(value.shape, shape, strict=True)) if a != b)
    mean = jnp.mean(value, axis=axis, keepdims=True, dtype=jnp.float32).astype(value.dtype)
    more = shape[axis] - value.shape[axis]
    return jnp.concatenate([value, jnp.repeat(mean, more, axis=axis)], axis=axis)
