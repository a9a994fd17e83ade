"""Masked texts: shares, special tokens, whole words, and that the same place of a run hides the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ftjax.config import Loader
from ftjax.data.formats import type_rows
from ftjax.data.layouts import arrays_of, identity, meta_of, restored
from ftjax.data.masking import encode_masked
from ftjax.data.rows import Row
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
