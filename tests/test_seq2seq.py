"""Sequence to sequence: sources and answers from rows to batches, and a T5 from CSV to answers through the command line."""

from __future__ import annotations

import csv
import json
import random

import jax.numpy as jnp
import numpy as np
import pytest

import ftjax
from ftjax.config import Loader
from ftjax.data.formats import type_rows
from ftjax.data.layouts import arrays_of, identity, meta_of, restored
from ftjax.data.preview import preview
from ftjax.data.rows import Row
from ftjax.data.seq2seq import SeqExamples, encode_seq2seq
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import DataError
from ftjax.models import hf
from ftjax.models.sources import embedded_folder
from ftjax.objectives.seq2seq import Seq2Seq
from ftjax.verbs import main
from tests import tiny, tinymodels

ROWS = [Row({"prompt": "one two", "completion": "two one"}, "x:1"), Row({"prompt": "a", "completion": "b c d"}, "x:2")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_folder())


def encoded(tokenizer, **loader):
    return encode_seq2seq(type_rows(ROWS), tokenizer, Loader(**loader))


def test_both_texts_end(tokenizer):
    made = encoded(tokenizer)
    examples, eos = made.examples, tokenizer.eos_token_id
    assert len(examples) == 2 and made.report.eos_trained == 2
    assert [int(examples.answers[i].input_ids[-1]) for i in range(2)] == [eos, eos]
    batch = examples.build([[1], [0]], 16, count=3)
    assert tokenizer.decode(batch.labels[0][batch.weights[0] > 0], skip_special_tokens=True).strip() == "b c d"
    assert tokenizer.decode(batch.tokens[1][batch.segments[1] == 0], skip_special_tokens=True).strip() == "one two"
    assert (batch.segments[2] < 0).all() and not batch.weights[2].any()
    assert examples.take(np.array([1])).origin(0) == "x:2"
    again = restored(SeqExamples, arrays_of(examples), meta_of(examples))
    assert identity(again) == identity(examples)
    shown = preview(examples, tokenizer, 1)[0]
    assert [s.trained for s in shown.spans] == [False, True] and "two one" in shown.spans[1].text and shown.trains_eos


def test_too_long(tokenizer):
    assert encoded(tokenizer, max_length=4, truncation="right").examples.lengths.max() == 4
    with pytest.raises(DataError, match="longer than loader.max_length=3"):
        encoded(tokenizer, max_length=3, truncation="drop")
    with pytest.raises(DataError, match="x:1"):
        encoded(tokenizer, max_length=3, truncation="error")
    with pytest.raises(DataError, match="prompt, completion"):
        encode_seq2seq(type_rows([Row({"text": "a"}, "x:1")]), tokenizer, Loader())


def test_an_answer_does_not_see_itself():
    """Only what was said before, and the source, decides a token."""
    model = tinymodels.known()["t5"]()
    params, batch = tiny.weights(model), tiny.answered(4)
    inputs = {k: jnp.asarray(v) for k, v in Seq2Seq().inputs(batch).items()}
    base = np.asarray(model.apply(params, inputs).logits)
    later = inputs["labels"].at[:, 5].add(1)
    moved = np.asarray(model.apply(params, inputs | {"labels": later}).logits)
    np.testing.assert_array_equal(moved[:, :6], base[:, :6])
    assert (moved[:, 6:] != base[:, 6:]).any()
    # what stands at the padding of the source is of no consequence
    other = jnp.where(inputs["segments"] == 0, inputs["input_ids"], 5)
    np.testing.assert_array_equal(model.apply(params, inputs | {"input_ids": other}).logits, base)


CONFIG = """
from ftjax.config import *
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.seq2seq import Seq2Seq
from ftjax.peft.full import Full

def get_config():
    return Run(
        name="x", model=Pretrained(path="model"), data=Local(path="train.csv", eval_share=0.1, metrics=("token_f1",)),
        objective=Seq2Seq(), peft=Full(), loader=Loader(max_length=8), optim=Optim(lr=1e-2, warmup=10),
        train=Train(steps=150, batch=32, log_every=50),
        evaluate=Evaluate(generate=2, metric_examples=16, max_new_tokens=4), compute=Compute(cache=""),
    )
"""


def test_from_csv_to_answers(tmp_path, monkeypatch):
    """A small T5 learns to name a digit, and says so from the command line's export."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    small = tinymodels.known()["t5"]()
    config = small.config.to_hf() | {"vocab_size": 4096, "eos_token_id": 2, "num_layers": 1, "num_decoder_layers": 1}
    model = type(small)(type(small.config).from_hf(config))
    hf.save(model, tiny.weights(model), tmp_path / "model", tokenizer_from=embedded_folder())
    words = ["zero", "one", "two", "three", "four", "five"]
    draw = random.Random(0)
    with open("train.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["prompt", "completion"])
        letters = [f"{a} {b}" for a in "abcdefgh" for b in "klmnopqr"]
        out.writerows([[f"{n} {x}", words[n]] for x in letters for n in draw.sample(range(6), k=4)])
    (tmp_path / "x.py").write_text(CONFIG)
    assert main(["--config", "x.py"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "runs/x/metrics.jsonl").read_text().splitlines()]
    held_out, scores = ([x[k] for x in lines if x["event"] == "eval"] for k in ("loss", "token_f1"))
    assert held_out[-1] < 0.2 * held_out[0] and scores[0] < 0.2 and scores[-1] > 0.9
    trained, params = ftjax.load_pretrained(tmp_path / "runs/x/model")
    tokenizer = load_tokenizer(tmp_path / "runs/x/model")
    said = ftjax.generate(trained, params, tokenizer, ["3 a k", "5 h r"], max_new_tokens=4)
    assert [s.strip() for s in said] == ["three", "five"]
