"""What a story model forgets: its loss on stories that the untouched model wrote (temperature 1)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ftjax
from ftjax.data.tokenizer import load_tokenizer
from ftjax.generate.api import generate_ids, prompt_ids
from ftjax.generate.sampling import Sampling


def stories(model: str, n: int) -> jnp.ndarray:
    """n stories of the base model, as token rows [n, T]."""
    network, params = ftjax.load_pretrained(model)
    tokenizer = load_tokenizer(model)
    prompt = prompt_ids(tokenizer, "Once upon a time")
    answers = generate_ids(
        network, params, tokenizer, [prompt] * n, Sampling(max_new_tokens=200, temperature=1.0, seed=7)
    )
    length = min(len(prompt) + len(a) for a in answers)
    return jnp.asarray([np.concatenate([prompt, a])[:length] for a in answers], jnp.int32)


def story_loss(network: Any, params: Any, rows: jnp.ndarray) -> float:
    """Mean loss per token of the rows."""

    @jax.jit
    def loss(params: Any, rows: jax.Array) -> jax.Array:
        return network.apply(params, {"input_ids": rows}).nll(jnp.roll(rows, -1, 1)).nll[:, :-1].mean()

    return float(loss(params, rows))
