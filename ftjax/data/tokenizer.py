"""Tokenizers: load one from a folder or the hub, check that it fits the model, and name it by its content.

tokenizer = load_tokenizer("my/llama")
warnings = check_vocab(tokenizer, vocab_size=32000) + tokenizer_warnings(tokenizer)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ftjax.data.reader import check_file
from ftjax.errors import DataError, nearest

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, a ``tokenizer.json`` file, or a hub id; code that comes with it never runs.

    Raises:
      DataError: nothing there, files missing or damaged, or it needs remote code.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        present = [p for name in _FILES if (p := path / name).exists()]
        if not present:
            names = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise DataError(f"{path} holds no tokenizer: expected one of {', '.join(_FILES)}. It holds: {names}")
        for file in present:
            check_file(file)
    elif path.is_absolute() or str(path_or_id).startswith((".", "~")) or str(path_or_id).count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        raise DataError(f"tokenizer {str(path_or_id)!r}: no such folder.{f' Near: {", ".join(near)}' if near else ''}")
    try:
        return AutoTokenizer.from_pretrained(str(path if path.is_dir() else path_or_id), trust_remote_code=False)
    except Exception as e:  # whatever a damaged file or the hub client raises, the user needs one line
        text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if "trust_remote_code" in str(e) or "custom code" in str(e):
            text = "it needs code that comes with the model, which ftjax never runs. Use a tokenizer.json"
        raise DataError(f"tokenizer {str(path_or_id)!r} cannot be loaded: {text}") from None


def _load_file(path: Path) -> PreTrainedTokenizerBase:
    check_file(path)
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as e:
        raise DataError(f"{path} is not a tokenizer.json: {e}") from None


def check_vocab(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[str, ...]:
    """Checks that every token has a row in the model's embedding.

    Args:
      tokenizer: the tokenizer of the data.
      vocab_size: rows of the model's embedding.

    Returns:
      Warnings: the tokenizer uses far fewer ids than the model has, so it may be another model's.

    Raises:
      DataError: ids beyond the embedding.
    """
    vocab = tokenizer.get_vocab()
    token, largest = max(vocab.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        beyond = sum(i >= vocab_size for i in vocab.values())
        raise DataError(
            f"the tokenizer does not fit the model: its largest id is {largest} ({token!r}), the model's embedding has "
            f"{vocab_size} rows, so {beyond} tokens have none. Use the tokenizer that came with the model"
        )
    if len(vocab) < 0.9 * vocab_size:
        return (f"the tokenizer has {len(vocab):,} tokens, the model {vocab_size:,}: is it this model's tokenizer?",)
    return ()


def tokenizer_warnings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What may surprise about the special tokens."""
    eos = tokenizer.eos_token
    if eos is None:
        return ("the tokenizer has no EOS token: the model cannot learn to stop, texts end without one",)
    if tokenizer.pad_token == eos:
        return (
            f"the pad token is the EOS token ({eos!r}, id {tokenizer.eos_token_id}): padding is masked by position, "
            "not by token, so EOS is still trained",
        )
    return ()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a fast tokenizer does: its model, its added and special tokens (not of where it lies)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{core}\0{special}".encode()).hexdigest()
