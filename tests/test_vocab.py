"""Resizing the vocabulary: old logits stay, new rows are the mean, tied or not, with and without a bias."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import ConfigError
from ftjax.headspec import HeadSpec
from ftjax.models import hf
from ftjax.models.vocab import resize_vocabulary
from ftjax.params import cut
from ftjax.peft.base import bind
from ftjax.peft.lora import LoRA
from ftjax.peft.prompt import Prompt
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


@pytest.mark.parametrize("tied", [True, False])
def test_cut_stacks_and_bfloat16(tied):
    """What else there is stays the array it was; the mean is taken in float32."""
    model = tiny.llama(tie_word_embeddings=tied)
    params = {k: v.astype(jnp.bfloat16) for k, v in tiny.weights(model).items()}
    _, grown = resize_vocabulary(model, params, tiny.VOCAB + 3)
    changed = {k for k, v in grown.items() if v is not params[k]}
    assert changed == ({"embed/w"} if tied else {"embed/w", "head/w"})
    want = np.asarray(params["embed/w"].astype(jnp.float32)).mean(0)
    assert grown["embed/w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(grown["embed/w"][-1].astype(jnp.float32), want, rtol=2**-8)
    pieces = resize_vocabulary(model, cut(params, {"layers": [1, 3]}), tiny.VOCAB + 3)[1]
    assert set(pieces) == set(grown)
    for name, value in grown.items():
        np.testing.assert_array_equal(pieces[name], value)


def test_a_classifier_grows_at_its_embedding_alone():
    model = tiny.llama(head=HeadSpec("sequence_classification", ("a", "b")))
    params = tiny.weights(model)
    larger, grown = resize_vocabulary(model, params, tiny.VOCAB + 3)
    assert {k for k, v in grown.items() if v is not params[k]} == {"embed/w"} and larger.head == model.head


def test_what_is_refused(tmp_path):
    model = tiny.llama()
    params = tiny.weights(model)
    with pytest.raises(ConfigError, match="would drop some"):
        resize_vocabulary(model, params, 10)
    overlay = LoRA(rank=2).init(tiny.jax.random.key(0), model.table, params)
    with pytest.raises(ConfigError, match="carries an adapter"):
        resize_vocabulary(model, bind(params, overlay), 200)
    soft = Prompt(tokens=2).init(tiny.jax.random.key(0), model.table, params)
    with pytest.raises(ConfigError, match="input/tap carries an adapter"):
        resize_vocabulary(model, bind(params, soft), 200)
    with pytest.raises(ConfigError, match="hold adapters .input/tap"):
        hf.save(model, bind(params, soft), tmp_path)
    image = tinymodels.known()["vit"]()
    with pytest.raises(ConfigError, match="no vocabulary"):
        resize_vocabulary(image, {}, 200)
