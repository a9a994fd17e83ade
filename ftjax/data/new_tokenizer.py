"""A tokenizer trained on the run's own data, for models that start from scratch.

    train_tokenizer("bpe", rows, vocab=4096, folder=Path("runs/x/tokenizer"))

| kind | pieces | special tokens, from id 0 | for |
|---|---|---|---|
| bpe | bytes (Radford et al. 2019) | pad, s, /s; begins with s | decoders |
| bpe-mask | bytes | the same and mask; s text /s | RoBERTa and its kin |
| wordpiece | lower-cased words and ## pieces (Devlin et al. 2018) | PAD, UNK, CLS, SEP, MASK; CLS text SEP | BERT and its kin |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ftjax.data.rows import Row
from ftjax.errors import DataError

Kind = Literal["bpe", "bpe-mask", "wordpiece"]
PAD, BOS, EOS, MASK = "<pad>", "<s>", "</s>", "<mask>"


def train_tokenizer(kind: Kind, rows: Sequence[Row], vocab: int, folder: Path) -> None:
    """Trains on the "text" of rows (or prompt and completion) and writes a tokenizer folder.

    Args:
      kind: see the table above.
      rows: training rows.
      vocab: number of tokens, special ones included.
      folder: created if absent.

    Raises:
      DataError: the rows hold no text.
    """
    texts = [row.get("text") or f"{row.get('prompt', '')}{row.get('completion', '')}" for row in rows]
    if not any(texts):
        raise DataError("there is no text to train a tokenizer on")
    fast = _KINDS[kind](texts, vocab)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))


def _byte_level(texts: Sequence[str], vocab: int, special: list[str]) -> Tokenizer:
    """Byte-level BPE: any text can be encoded and decodes to itself; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _around(tokenizer: Tokenizer, single: str, pair: str, special: Sequence[str]) -> None:
    """What the tokenizer puts around a text and a pair of texts."""
    ids = [(name, tokenizer.token_to_id(name)) for name in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _bpe(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(texts, vocab, [PAD, BOS, EOS])
    _around(tokenizer, f"{BOS} $A", f"{BOS} $A $B", [BOS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def _bpe_mask(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(texts, vocab, [PAD, BOS, EOS, MASK])
    _around(tokenizer, f"{BOS} $A {EOS}", f"{BOS} $A {EOS} {EOS} $B {EOS}", [BOS, EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, cls_token=BOS, sep_token=EOS,
        mask_token=MASK,
    )  # fmt: skip


def _wordpiece(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    _around(tokenizer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ["[CLS]", "[SEP]"])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


_KINDS: dict[Kind, Callable[[Sequence[str], int], Any]] = {"bpe": _bpe, "bpe-mask": _bpe_mask, "wordpiece": _wordpiece}
