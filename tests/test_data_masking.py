"""Masked texts: shares, special tokens, whole words, and that the same place of a run hides the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ftjax.config import Loader
from ftjax.data.formats import type_rows
from ftjax.data.layouts import arrays_of, identity, meta_of, restored
from ftjax.data.masking import capacity, encode_masked
from ftjax.data.new_tokenizer import train_tokenizer
from ftjax.data.rows import Row
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import DataError

WORDS = ["play", "##ing", "##er", "the", "a", "game", "walk", "##ed", "home"]


@pytest.fixture(scope="module")
def tokenizer():
    """WordPiece with BERT's special tokens."""
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    t = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return PreTrainedTokenizerFast(tokenizer_object=t, **names)


def made(tokenizer, text, n=1, **options):
    typed = type_rows([Row({"text": text}, f"x:{i}") for i in range(n)])
    return encode_masked(typed, tokenizer, Loader(max_length=64), **options).examples


def test_shares(tokenizer):
    examples = made(tokenizer, "the player walked home " * 10, n=200)
    batch = examples.build([[i] for i in range(200)], 64, key=(1, 2))
    real = (batch.segments >= 0) & ~np.isin(batch.targets, [2, 3])
    chosen = batch.weights > 0
    assert chosen[~real].sum() == 0
    assert chosen[real].mean() == pytest.approx(0.15, abs=0.01)
    masked = batch.tokens[chosen] == tokenizer.mask_token_id
    same = batch.tokens[chosen] == batch.targets[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.03)
    assert same.mean() == pytest.approx(0.1 + 0.1 / len(tokenizer), abs=0.03)
    np.testing.assert_array_equal(batch.tokens[~chosen], batch.targets[~chosen])


def test_the_key_decides(tokenizer):
    examples = made(tokenizer, "the player walked home", n=8)
    rows = [[i] for i in range(8)]
    one, again, other = (examples.build(rows, 16, key=k) for k in ((1, 5), (1, 5), (1, 6)))
    np.testing.assert_array_equal(one.tokens, again.tokens)
    assert (one.tokens != other.tokens).any()


def test_whole_words(tokenizer):
    examples = made(tokenizer, "playing player walked " * 6, n=50, whole_word=True, share=0.4)
    batch = examples.build([[i] for i in range(50)], 64, key=(3,))
    pieces = np.array(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    goes_on = np.char.startswith(pieces[batch.targets], "##")
    chosen = batch.weights > 0
    follows = goes_on[:, 1:]
    assert (chosen[:, 1:][follows] == chosen[:, :-1][follows]).all() and chosen.any()
    loose = made(tokenizer, "playing player walked " * 6, n=50, share=0.4).build([[i] for i in range(50)], 64, key=(3,))
    apart = (loose.weights[:, 1:] > 0) != (loose.weights[:, :-1] > 0)
    assert apart[follows].any()


def test_packed_rows_and_the_cache(tokenizer):
    examples = made(tokenizer, "the game", n=4)
    batch = examples.build([[0, 1], [2, 3]], 16)
    assert set(batch.segments[0].tolist()) == {0, 1, -2}
    again = restored(type(examples), arrays_of(examples), meta_of(examples))
    assert identity(again) == identity(examples)
    np.testing.assert_array_equal(again.build([[0, 1]], 16).tokens, examples.build([[0, 1]], 16).tokens)


def test_a_tokenizer_without_a_mask_token():
    from ftjax.data.tokenizer import load_tokenizer
    from ftjax.models.sources import embedded_folder

    plain = load_tokenizer(embedded_folder())
    with pytest.raises(DataError, match="no mask token"):
        made(plain, "a text")


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_row_has_a_most(tokenizer, whole_word):
    """So that the loss can gather the chosen tokens; what is dropped is whole words."""
    examples = made(tokenizer, "playing player walked " * 9, n=2000, whole_word=whole_word)
    batch = examples.build([[i] for i in range(2000)], 64, key=(0, 0))
    counts, most = batch.weights.sum(1), capacity(64, 0.15)
    assert most == 19 and counts.max() <= most
    if whole_word:
        assert counts.max() >= most - 1, "no row came near: the test shows nothing"
        starts = np.array([not t.startswith("##") for t in tokenizer.convert_ids_to_tokens(batch.targets[0].tolist())])
        word = np.cumsum(starts)
        for row in batch.weights[:, :]:
            real = (batch.segments[0] >= 0) & ~np.isin(batch.targets[0], [2, 3])
            assert all(len(set(row[real & (word == w)].tolist())) <= 1 for w in set(word[real].tolist()))


def test_long_texts_in_pieces_with_special_tokens(tokenizer):
    typed = type_rows(
        [Row({"text": "the game " * 40}, "x:0"), Row({"text": "a home"}, "x:1"), Row({"text": ""}, "x:2")]
    )
    texts = encode_masked(typed, tokenizer, Loader(max_length=20), wrap=True).examples.texts
    pieces = [texts[i].input_ids.tolist() for i in range(len(texts))]
    assert all(p[0] == 2 and p[-1] == 3 and len(p) <= 20 for p in pieces)
    assert [t for p in pieces[:-1] for t in p[1:-1]] == tokenizer("the game " * 40)["input_ids"][1:-1]
    assert texts.rows.tolist() == [0] * (len(pieces) - 1) + [1]


@pytest.mark.parametrize("kind", ["bpe", "bpe-mask", "wordpiece"])
def test_new_tokenizers(tmp_path, kind):
    texts = ["The players walked home.", "a game of 1234 players", "Walking home again"] * 20
    train_tokenizer(kind, [Row({"text": t}, "") for t in texts], 300, tmp_path)
    t = load_tokenizer(tmp_path)
    ids = t("The game")["input_ids"]
    assert t.pad_token_id == 0 and len(t) <= 300
    assert (t.mask_token_id is not None) == (kind != "bpe")
    if kind == "wordpiece":
        assert ids[0] == t.cls_token_id and ids[-1] == t.sep_token_id
        assert t.decode(ids, skip_special_tokens=True) == "the game"
        pair = t("a game", "home", return_token_type_ids=True)
        assert pair["token_type_ids"] == [0] * (len(t("a game")["input_ids"])) + [1] * (len(t("home")["input_ids"]) - 1)
    else:
        assert ids[0] == t.bos_token_id and (ids[-1] == t.eos_token_id) == (kind == "bpe-mask")
        assert t.decode(t("Ünïcode 12!")["input_ids"], skip_special_tokens=True) == "Ünïcode 12!"
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(kind, [Row({"text": ""}, "")], 300, tmp_path / "b")
