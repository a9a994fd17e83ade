"""Resizing the vocabulary: old logits stay, new rows are the mean, tied or not, with and without a bias."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import ConfigError
from ftjax.headspec import HeadSpec
from ftjax.models.vocab import resize_vocabulary
from ftjax.peft.base import bind
from ftjax.peft.lora import LoRA
from tests import tiny, tinymodels

FAMILIES = {"llama": "causal_lm", "gpt2": "causal_lm", "gemma2": "causal_lm", "bert": "masked_lm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_old_logits_stay(family):
    model = tinymodels.known()[family](head=HeadSpec(FAMILIES[family]))
    params = tiny.weights(model)
    larger, grown = resize_vocabulary(model, params, tiny.VOCAB + 7)
    assert larger.config.vocab_size == tiny.VOCAB + 7
    ids = {"input_ids": jnp.arange(3, 11, dtype=jnp.int32)[None]}
    before, after = model.apply(params, ids).logits, larger.apply(grown, ids).logits
    np.testing.assert_allclose(after[..., : tiny.VOCAB], before, atol=1e-6)
    np.testing.assert_allclose(grown["embed/w"][tiny.VOCAB :], np.tile(params["embed/w"].mean(0), (7, 1)), rtol=1e-6)
    assert {k: v.shape for k, v in grown.items()} == {k: s.shape for k, s in larger.table.items() if s.kind != "site"}
    again = resize_vocabulary(larger, grown, tiny.VOCAB + 7)[1]
    np.testing.assert_array_equal(again["embed/w"], grown["embed/w"])


def test_what_is_refused():
    model = tiny.llama()
    params = tiny.weights(model)
    with pytest.raises(ConfigError, match="would drop some"):
        resize_vocabulary(model, params, 10)
    overlay = LoRA(rank=2).init(tiny.jax.random.key(0), model.table, params)
    with pytest.raises(ConfigError, match="carries an adapter"):
        resize_vocabulary(model, bind(params, overlay), 200)
    image = tinymodels.known()["vit"]()
    with pytest.raises(ConfigError, match="no vocabulary"):
        resize_vocabulary(image, {}, 200)
