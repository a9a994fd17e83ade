"""Learned positions end: a run whose examples go on is refused, and what goes on all the same is NaN, not the last place."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.config import Loader, Run
from ftjax.data.new_tokenizer import train_tokenizer
from ftjax.data.rows import Row
from ftjax.data.tasks.local import Local
from ftjax.errors import ConfigError
from ftjax.generate.api import generate_ids
from ftjax.generate.sampling import Sampling
from ftjax.models import hf
from ftjax.models.gpt2 import GPT2, GPT2Config
from ftjax.models.sources import Pretrained
from ftjax.peft.base import bind
from ftjax.peft.lora import LoRA
from ftjax.peft.prefix import Prefix
from ftjax.peft.prompt import Prompt
from ftjax.train.setup import check_places, prepare
from tests import tiny, tinymodels


def gpt2(vocab: int, places: int) -> GPT2:
    return GPT2(
        GPT2Config(
            vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=places, layer_norm_eps=1e-5, activation="gelu_new", initializer_range=0.1,
            tie_word_embeddings=True, scale_by_head=True, scale_by_layer=False, rates=(), bos_token_id=1,
            eos_token_id=(2,), pad_token_id=None,
        )
    )  # fmt: skip


class Examples(SimpleNamespace):
    """What `check_places` looks at."""

    def __len__(self) -> int:
        return len(self.lengths)


def examples(*lengths: int) -> Examples:
    return Examples(lengths=np.array(lengths, np.int32))


@pytest.mark.parametrize(
    "family, room", [("gpt2", 64), ("bert", 64), ("distilbert", 64), ("roberta", 62), ("llama", None), ("vit", None)]
)
def test_how_many_places(family, room):
    model = tinymodels.known()[family]()
    assert getattr(model, "places", None) == room
    check_places(model, {}, examples(3, room or 9999), examples())
    if room:
        with pytest.raises(
            ConfigError, match=f"65 tokens, but {family} learned positions for {room}. Set .*={room} or"
        ):
            check_places(model, {}, examples(3), examples(65))


@pytest.mark.parametrize("method", [Prompt(tokens=5), Prefix(tokens=5)])
def test_virtual_tokens_take_places(method):
    model = tinymodels.known()["gpt2"]()
    overlay = method.init(jax.random.key(0), model.table, tiny.weights(model))
    check_places(model, overlay, examples(59))
    with pytest.raises(ConfigError, match=r"60 tokens, .* for 64, of which virtual tokens take 5. Set .*=59 or less"):
        check_places(model, overlay, examples(60))


def test_beyond_the_table_is_nan():
    model = gpt2(tiny.VOCAB, 12)
    params = tiny.weights(model)
    ids = jnp.full((3, 14), 5, jnp.int32)
    want = model.apply(params, {"input_ids": ids[:1, :12]}).logits[0]
    # all columns real; as many as there are places, padded on the left; on the right
    mask = jnp.asarray([[1] * 14, [0] * 2 + [1] * 12, [1] * 12 + [0] * 2], jnp.int32)
    logits = model.apply(params, {"input_ids": ids, "attention_mask": mask}).logits
    assert np.isnan(logits[0, -1]).all()
    np.testing.assert_allclose(logits[1, 2:], want, atol=1e-5)
    np.testing.assert_allclose(logits[2, :12], want, atol=1e-5)


@pytest.mark.parametrize("method", [Prompt(tokens=5), Prefix(tokens=5)])
def test_answers_end_where_places_do(method):
    model = gpt2(tiny.VOCAB, 16)
    params = tiny.weights(model)
    params = bind(params, method.init(jax.random.key(0), model.table, params))
    tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=0)
    prompt = np.arange(3, 7, dtype=np.int32)
    with pytest.warns(UserWarning, match="context of 16 less 5 for the soft prompt: its answer ends after 7"):
        (answer,) = generate_ids(model, params, tokenizer, [prompt], Sampling(max_new_tokens=12))
    assert len(answer) == 7
    logits = model.apply(params, {"input_ids": jnp.asarray(np.concatenate([prompt, answer]), jnp.int32)[None]}).logits[
        0
    ]
    assert logits[3:-1].argmax(-1).tolist() == answer


def test_a_run_is_refused(tmp_path):
    """Found before compiling, with the number to set; with that number it goes on."""
    rows = [{"prompt": f"{i} ", "completion": "one two three four five six seven eight"} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train_tokenizer("bpe", [Row(r, "") for r in rows], 270, tmp_path / "base")
    vocab = len(json.loads((tmp_path / "base" / "tokenizer.json").read_text())["model"]["vocab"])
    model = gpt2(vocab + 3, 16)
    hf.save(model, tiny.weights(model), tmp_path / "base")

    def run(length: int) -> Run:
        return Run(
            name="x", out=str(tmp_path / "run"), model=Pretrained(path=str(tmp_path / "base")), peft=LoRA(rank=2),
            data=Local(path=str(tmp_path / "data.jsonl"), eval_share=0.25), loader=Loader(max_length=length),
        )  # fmt: skip

    with pytest.raises(ConfigError, match="gpt2 learned positions for 16. Set loader.max_length=16 or less"):
        prepare(run(40), say=lambda _: None)
    assert prepare(run(16), say=lambda _: None).batches.length == 16


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_an_encoder_beyond_its_table_is_nan(family):
    model = tinymodels.known()[family]()
    params, ids = tiny.weights(model), jnp.full((1, model.places + 1), 5, jnp.int32)
    assert np.isfinite(model.apply(params, {"input_ids": ids[:, :-1]}).logits).all()
    assert np.isnan(model.apply(params, {"input_ids": ids}).logits).all()
