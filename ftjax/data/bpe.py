"""A byte-level BPE tokenizer trained on the run's own data, for models that start from scratch.

    train_bpe(rows, vocab=4096, folder=Path("runs/x/tokenizer"))

Any text can be encoded and decodes to itself (Radford et al. 2019: byte-level BPE). Ids 0, 1, 2 are padding, beginning and
end of text; like Llama's, the tokenizer puts the beginning in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ftjax.data.rows import Row
from ftjax.errors import DataError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_bpe(rows: Sequence[Row], vocab: int, folder: Path) -> None:
    """Trains on the "text" of rows (or prompt and completion) and writes a tokenizer folder.

    Args:
      rows: training rows.
      vocab: number of tokens, the three special ones included.
      folder: created if absent.

    Raises:
      DataError: the rows hold no text.
    """
    texts = [row.get("text") or f"{row.get('prompt', '')}{row.get('completion', '')}" for row in rows]
    if not any(texts):
        raise DataError("there is no text to train a tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))
