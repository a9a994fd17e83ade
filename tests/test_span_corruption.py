"""Span corruption: nothing is lost, the measured shares, T5's own way of cutting, the draw, and a small T5 that learns it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.corrupt import Corruption, corrupt, encode_corrupted, sentinels_of
from ftjax.data.formats import type_rows
from ftjax.data.layouts import arrays_of, identity, layout_of, meta_of, restored
from ftjax.data.pipeline import Batches, eval_batches, row_length
from ftjax.data.preview import preview
from ftjax.data.rows import Row
from ftjax.errors import DataError
from ftjax.objectives.seq2seq import Seq2Seq
from ftjax.objectives.span_corruption import SpanCorruption
from tests import tiny, tinymodels
from tests.test_data_helpers import tiny_tokenizer

OPTIONS: dict[str, Any] = {"share": 0.15, "mean_span": 3.0}


@pytest.fixture(scope="module")
def tokenizer():
    """With 40 sentinels numbered downwards, as T5's."""
    made = tiny_tokenizer()
    made.add_tokens([f"<extra_id_{i}>" for i in range(39, -1, -1)], special_tokens=True)
    return made


def encoded(tokenizer, texts, *, wrap=False, loader=None, **options):
    typed = type_rows([Row({"text": t}, f"x:{i}") for i, t in enumerate(texts)])
    return encode_corrupted(
        typed, tokenizer, Loader(**{"max_length": 64, **(loader or {})}), wrap=wrap, **OPTIONS | options
    )


def bits(seed=0):
    return np.random.Philox(seed)


def put_together(source, answer, sentinels):
    """The text again: each sentinel of the source replaced by what follows it in the answer."""
    hidden, order = {}, []
    for token in answer[:-1].tolist():
        if token in sentinels:
            order.append(token)
            hidden[token] = []
        else:
            hidden[order[-1]].append(token)
    out = [x for token in source[:-1].tolist() for x in hidden.get(token, [token])]
    return out, [sentinels.index(t) for t in order], hidden


def test_source_and_answer_give_the_text(tokenizer):
    ends = tokenizer.eos_token_id
    texts = ["hello world " * 7, "what is two plus two? four", "the lazy dog", "ab"]
    examples = encoded(tokenizer, texts).examples
    sentinels = examples.sentinels.tolist()
    assert sentinels == sorted(sentinels, reverse=True) and len(sentinels) == 40
    for i in range(len(texts)):
        for draw in range(20):
            source, answer = examples.drawn(i, (draw,))
            text, order, hidden = put_together(source, answer, sentinels)
            assert text == tokenizer(texts[i])["input_ids"] == examples.texts[i].input_ids.tolist()
            assert source[-1] == answer[-1] == ends and all(hidden.values())
            assert order == list(range(len(order))), "numbered in the order of the text"
            assert [t for t in source.tolist() if t in sentinels] == [sentinels[k] for k in order]
            assert (len(source), len(answer)) == examples.how.lengths(len(text))
            assert source[0] not in sentinels, "a text begins with what is shown"


def test_by_hand():
    mask = np.array([0, 0, 1, 1, 0, 0, 1], bool)
    source, answer = corrupt(np.arange(10, 17, dtype=np.int32), mask, np.array([99, 98], np.int32), 1)
    assert source.tolist() == [10, 11, 99, 14, 15, 98, 1] and answer.tolist() == [99, 12, 13, 98, 16, 1]


def test_measured_shares():
    how, n = Corruption(0.15, 3.0), 512
    masks = [how.mask(n, bits(i)) for i in range(300)]
    spans = [int((m & ~np.concatenate([[False], m[:-1]])).sum()) for m in masks]
    lengths = np.concatenate([np.diff(np.flatnonzero(np.diff(np.concatenate([[0], m, [0]]))))[::2] for m in masks])
    rate, mean = float(np.mean(masks)), float(np.mean(lengths))
    print(f"noise rate {rate:.4f}, mean span {mean:.3f}, longest {lengths.max()}")
    assert rate == pytest.approx(77 / 512) and set(spans) == {26} and mean == pytest.approx(77 / 26)
    # lengths of a uniform cut of 77 into 26 parts: P(length = 1) = 25 / 76
    assert (lengths == 1).mean() == pytest.approx(25 / 76, abs=0.02)
    # and every place is hidden about as often as any other, but for the first, which never is
    where = np.mean(masks, 0)
    assert where[0] == 0 and where[20:].mean() == pytest.approx(0.15, abs=0.01) and where[-1] == 1
    for n in (2, 3, 5, 20, 100):
        for share, span in ((0.15, 3.0), (0.5, 1.0), (0.9, 2.0)):
            other = Corruption(share, span)
            assert other.mask(n, bits(n)).sum() == other.hidden(n)[0]


def test_turned_masks(tokenizer):
    """Every place of a text with a single span is hidden as often as any other; nothing is lost, lengths stay in bounds."""
    how, n = Corruption(0.15, 3.0, roll=True), 20
    where = np.mean([how.mask(n, bits(i)) for i in range(4000)], 0)
    assert where.tolist() == pytest.approx([0.15] * n, abs=0.02)
    fixed = np.mean([Corruption(0.15, 3.0).mask(n, bits(i)) for i in range(20)], 0)
    assert fixed.tolist() == [0.0] * 17 + [1.0] * 3, "T5's own: always at the end"
    examples = encoded(tokenizer, ["hello world " * 7], roll=True).examples
    longest = 0
    for draw in range(60):
        source, answer = examples.drawn(0, (draw,))
        assert put_together(source, answer, examples.sentinels.tolist())[0] == examples.texts[0].input_ids.tolist()
        bound = examples.how.lengths(len(examples.texts[0]))
        assert len(source) <= bound[0] and len(answer) <= bound[1]
        longest = max(longest, len(source) - bound[0])
    assert longest == 0 and examples.build([[0]], 64, key=(1,)).tokens.shape == (1, 64)


def test_the_same_lengths_as_t5():
    """T5's helper for inputs of 512 tokens: texts of 568 tokens, answers of 114 (`random_spans_helper` in its tests)."""
    how = Corruption(0.15, 3.0)
    assert how.room(512) == 568 and how.lengths(568) == (512, 114)


def test_the_key_decides(tokenizer):
    examples = encoded(tokenizer, ["hello world what is two plus two? " * 3] * 4).examples
    rows = [[i] for i in range(4)]
    one, again, other = (examples.build(rows, 64, key=k) for k in ((1, 5), (1, 5), (1, 6)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.tokens != other.tokens).any() and (one.tokens[0] != one.tokens[1]).any()
    batches = [Batches(examples, loader=Loader(packing="none"), batch=2, seed=3, length=64) for _ in range(2)]
    first = [batches[0].next() for _ in range(5)]
    batches[1].restore({"next_index": 3})
    np.testing.assert_array_equal(batches[1].next().tokens, first[3].tokens)
    assert (first[0].tokens != first[2].tokens).any(), "the second epoch hides other spans"
    for b in batches:
        b.close()


def test_batches(tokenizer):
    examples = encoded(tokenizer, ["hello world " * 12, "what is two plus two?", "the dog"]).examples
    length = row_length(Loader(max_length=64, packing="none"), examples)
    batch = examples.build([[1], [0]], length, count=3)
    assert batch.tokens.shape == (3, length) and batch.labels.shape[1] < length and batch.labels.shape[1] % 8 == 0
    assert batch.weights.sum(1).tolist() == [examples.how.lengths(len(examples.texts[i]))[1] for i in (1, 0)] + [0]
    assert (batch.segments[2] < 0).all() and (batch.labels[batch.weights == 0] == 0).all()
    shapes = {b.labels.shape for b in eval_batches(examples, 2, length)}
    assert len(shapes) == 1
    again = restored(type(examples), arrays_of(examples), meta_of(examples))
    assert identity(again) == identity(examples) and len(examples.take(np.array([2, 0]))) == 2
    assert examples.take(np.array([2, 0])).origin(0) == "x:2"
    shown = preview(examples, tokenizer, 1)[0]
    assert "<extra_id_0>" in shown.spans[0].text and "<extra_id_0>" in shown.spans[1].text
    assert layout_of(SpanCorruption()).name == "corrupted" and layout_of(Seq2Seq()).name == "seq2seq"


def test_long_texts(tokenizer):
    text = "hello world " * 40
    ids, room = tokenizer(text)["input_ids"], Corruption(**OPTIONS).room(64)
    wrapped = encoded(tokenizer, [text], wrap=True)
    assert wrapped.examples.texts.input_ids.tolist() == ids and wrapped.examples.lengths.max() == 64
    assert wrapped.report.examples == -(-len(ids) // room) and wrapped.report.truncated == 0
    cut = encoded(tokenizer, [text, "a dog", "x"])
    assert (cut.report.truncated, cut.report.zero_trained, cut.report.examples) == (1, 1, 2)
    assert len(cut.examples.texts[0]) == room
    assert encoded(tokenizer, [text, "a dog"], loader={"truncation": "drop"}).report.dropped == 1
    with pytest.raises(DataError, match=f"x:0: {len(ids)} tokens; at most {room} fit into loader.max_length=64"):
        encoded(tokenizer, [text], loader={"truncation": "error"})


def test_what_is_refused(tokenizer):
    with pytest.raises(DataError, match="the tokenizer has no sentinels <extra_id_0>"):
        encoded(tiny_tokenizer(), ["a text"])
    assert len(sentinels_of(tokenizer)) == 40
    with pytest.raises(DataError, match="has 51 hidden spans, the tokenizer has 40 sentinels"):
        encoded(tokenizer, ["a text"], loader={"max_length": 920})
    with pytest.raises(DataError, match="these rows are prompt_completion"):
        encode_corrupted(type_rows([Row({"prompt": "a", "completion": "b"}, "x")]), tokenizer, Loader(), **OPTIONS)
    with pytest.raises(DataError, match="none of 1 texts is left"):
        encoded(tokenizer, ["x"])


def test_a_small_t5_learns_it(tokenizer):
    """Two batches of the data go through the step and the loss falls; sources and answers have unequal widths."""
    model = tinymodels.known()["t5"]()
    examples = encoded(tokenizer, ["a b c d e f g h i j k l"] * 8, loader={"max_length": 32}).examples
    batch = examples.build([[i] for i in range(8)], 32, key=(0,))
    batch = jax.tree.map(lambda x: (x % tiny.VOCAB if x.dtype == np.int32 else x)[None], batch)
    batch = batch.replace(segments=np.where(batch.segments == 0, 0, -2).astype(np.int32))
    t = tiny.tiny(objective=SpanCorruption(), model=model)
    step = jax.jit(t.program.train)
    state, first = step(t.state, t.frozen, batch)
    for _ in range(8):
        state, last = step(state, t.frozen, batch)
    assert batch.labels.shape[-1] < batch.tokens.shape[-1]
    assert float(last["loss"]) < 0.8 * float(first["loss"])
