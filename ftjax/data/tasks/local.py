"""Your own files: one file, or a folder with train / validation / test files, or a folder of texts.

Local(path="gsm8k", columns=("prompt=question", "completion=answer"))
Local(path="notes.txt", text_unit="block")                       # continued pre-training
Local(path="chats.jsonl", chat_template="chatml")
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ftjax.data.clean import Clean
from ftjax.data.parsers import TextUnit
from ftjax.data.reader import SUFFIXES, TEXT_SUFFIXES, check_file, data_files, file_sha256, read_rows, suffix_of
from ftjax.data.rows import BadRows, Row, held_out_split
from ftjax.data.task import Prompt, Split, fixed_prompts
from ftjax.errors import DataError
from ftjax.registry import register
from ftjax.schema import Component

_TRAIN = ("train", "training")
_EVAL = ("validation", "valid", "val", "dev", "eval", "test")  # the first that is there is the held-out split


@register("data")
class Local(Component):
    """Local files: JSON, JSONL (.gz), CSV, TSV, Parquet, plain text."""

    name: Literal["local"] = "local"
    path: str = Field(min_length=1, description="Data file, or a folder with train, validation or test files.")
    eval_path: str = Field("", description="File with held-out rows; empty: the folder's, else eval_share of the rows.")
    eval_share: float = Field(
        0.05, ge=0, lt=1, description="Rows held out by hash if there is no held-out file; 0: none."
    )
    text_unit: TextUnit = Field("auto", description="One row of a plain text: file, paragraph, line, or block (auto).")
    long_text: Literal["auto", "wrap", "truncate"] = Field(
        "auto", description="wrap: long texts become several examples; auto: so for plain-text files."
    )
    chat_template: str = Field("", description="Built-in name, .jinja file or Jinja text; empty: the tokenizer's own.")
    columns: tuple[str, ...] = Field((), description="Renamed columns, each 'ours=theirs', e.g. 'prompt=question'.")
    metrics: tuple[str, ...] = Field((), description="Generation metrics on held-out prompts, e.g. rouge_l, token_f1.")
    clean: Clean = Field(default_factory=Clean, description="What is done to the rows first; by default nothing.")

    @property
    def wraps(self) -> bool:
        """Whether long texts are cut into pieces rather than truncated."""
        if self.long_text == "auto":
            return all(suffix_of(p) in TEXT_SUFFIXES for p in self._files()[0])
        return self.long_text == "wrap"

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows of "train" or "eval", cleaned, with `columns` still under their own names."""
        bad, aside = bad or BadRows(), BadRows(10**9)
        compared = split == "train" and self.clean.leaks != "warn"
        held_out = self.clean(self._split("eval", aside), aside) if compared else ()
        return self.clean(self._split(split, bad), bad, held_out)

    def _split(self, split: Split, bad: BadRows) -> list[Row]:
        train, held_out = self._files()
        if held_out:
            return self._read(held_out if split == "eval" else train, bad)
        if split == "eval" and self.eval_share == 0:
            return []
        # the malformed rows of one file count once: with the training split
        rows = self._read(train, bad if split == "train" else BadRows(10**9))
        return held_out_split(rows, self.eval_share)[split == "eval"]

    def prompts(self, n: int) -> list[Prompt]:
        """n fixed held-out prompts."""
        return fixed_prompts(self.examples("eval", bad=BadRows(10**9)), n, columns=self.columns)

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of each file."""
        train, held_out = self._files()
        return {p.name: file_sha256(p) for p in (*train, *held_out)}

    def _read(self, files: list[Path], bad: BadRows) -> list[Row]:
        rows = (row for path in files for row in read_rows(path, bad=bad, text_unit=self.text_unit))
        return self.clean.normalised(rows, bad)

    def _files(self) -> tuple[list[Path], list[Path]]:
        """Training and held-out files."""
        path = Path(self.path).expanduser()
        held_out = [Path(self.eval_path).expanduser()] if self.eval_path else []
        if not path.is_dir():
            check_file(path)
            return [path], held_out
        found = data_files(path)
        if not found:
            raise DataError(f"the folder {path} holds no data file. Known formats: {', '.join(SUFFIXES)}")
        train = [p for p in found if _stem(p) in _TRAIN]
        if not train:  # a folder of texts, or of parts
            return [p for p in found if p not in held_out], held_out
        if not held_out:
            stem = next((s for s in _EVAL if any(_stem(p) == s for p in found)), "")
            held_out = [p for p in found if _stem(p) == stem]
        return train, held_out


def _stem(path: Path) -> str:
    """``train`` of ``train.jsonl.gz`` and of ``train-00000-of-00002.parquet``."""
    return path.name.lower().split(".")[0].split("-")[0]
