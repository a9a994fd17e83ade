"""A tiny tokenizer for the data tests: byte-level, so it encodes any text, with a few merges and special tokens."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "what is two plus two? four",
    "def main(): return None",
    "hello world",
]


@functools.cache
def _core(bos: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT * 4,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


def tiny_tokenizer(*, bos: bool = False, **kwargs: Any) -> PreTrainedTokenizerFast:
    """ids 0 <pad>, 1 <s>, 2 </s>, then bytes and merges; `bos` puts <s> in front of every text."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_core(bos).to_str()), **special)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("text", ["hello world", "Grüße 😀\n\tx", ""])
def test_tiny_tokenizer_round_trips(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
