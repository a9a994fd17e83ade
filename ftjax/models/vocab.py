"""More tokens than a model was trained with: new rows of the embedding and the head begin at the mean of the old ones.

    model, params = resize_vocabulary(model, params, len(tokenizer))

The mean (Hewitt 2021) keeps the new tokens' logits near the average one, so that they take little probability at first.
transformers draws around that mean; here the rows are the mean itself, and resizing twice gives the same.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax.numpy as jnp

from ftjax.errors import ConfigError
from ftjax.models.base import Model
from ftjax.ops import Weight
from ftjax.params import Store


def resize_vocabulary(model: Model, params: Store, size: int) -> tuple[Model, Store]:
    """The model with `size` tokens.

    Args:
      model: any language model or classifier over tokens.
      params: plain weights; merge adapters first.
      size: number of tokens, at least as many as now.

    Returns:
      (model, params): logits of the old tokens are unchanged.

    Raises:
      ConfigError: fewer tokens than now, no vocabulary, or adapters in `params`.
    """
    old = getattr(model.config, "vocab_size", None)
    if old is None:
        raise ConfigError(f"{model.family} has no vocabulary")
    if size < old:
        raise ConfigError(f"the model has {old} tokens; making it {size} would drop some, which is not done")
    larger = dc.replace(model, config=dc.replace(model.config, vocab_size=size))
    grown: Store = {}
    for key, spec in model.table.items():
        if spec.kind == "site":
            continue
        value = params[key]
        want = larger.table[key].shape
        if isinstance(value, Weight):
            raise ConfigError(f"{key} carries an adapter: call ftjax.merge first")
        grown[key] = value if want == spec.shape else _extended(value, want)
    return larger, grown


def _extended(value: Any, shape: tuple[int, ...]) -> Any:
    """The array grown along its one longer dimension by rows that are the mean of those there."""
    axis = next(i for i, (a, b) in enumerate(zip(value.shape, shape, strict=True)) if a != b)
    mean = jnp.mean(value.astype(jnp.float32), axis=axis, keepdims=True).astype(value.dtype)
    more = shape[axis] - value.shape[axis]
    return jnp.concatenate([value, jnp.repeat(mean, more, axis=axis)], axis=axis)
