"""Rows from local files: JSON, JSONL (.gz), CSV, TSV, Parquet and plain text, with errors that name file and line.

bad = BadRows(limit=3)                                 # loader.skip_bad: tolerated, counted, reported
rows = read_rows("train.jsonl", bad=bad)               # [Row({"prompt": ..., "completion": ...}), ...]
rows[0].origin                                         # "train.jsonl:1"
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import stat
import zlib
from pathlib import Path

from ftjax.data import parsers
from ftjax.data.parsers import Source, TextUnit
from ftjax.data.rows import BadRows, Row
from ftjax.errors import DataError, nearest

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".csv", ".tsv", ".parquet", *TEXT_SUFFIXES)
_BOM = b"\xef\xbb\xbf"
_POINTER = b"version https://git-lfs.github.com/spec/"


def read_rows(path: str | Path, *, bad: BadRows | None = None, text_unit: TextUnit = "auto") -> list[Row]:
    """All rows of one local file.

    Args:
      path: the file; its suffix chooses the format (see `SUFFIXES`).
      bad: collects malformed rows up to its limit; by default none is tolerated.
      text_unit: what one row of a plain-text file is: the whole file, a paragraph (blank lines between), a line, or a
        block of at most `parsers.BLOCK_CHARS` characters ("auto"), cut where a paragraph or a line ends.

    Raises:
      DataError: the file is missing, unreadable, of an unknown format, empty, or has too many malformed rows.
    """
    path, bad = Path(path), bad or BadRows()
    check_file(path)
    suffix = suffix_of(path)
    if suffix == ".parquet":
        rows = list(parsers.parse_parquet(path))
    else:
        data = read_bytes(path)
        source = Source(str(path), data.removeprefix(_BOM), 3 if data.startswith(_BOM) else 0)
        if suffix in TEXT_SUFFIXES:
            rows = list(parsers.parse_text(source, text_unit))
        elif suffix in (".csv", ".tsv"):
            rows = list(parsers.parse_csv(source, bad, "\t" if suffix == ".tsv" else ","))
        elif suffix.startswith(".json") and not suffix.startswith(".jsonl"):
            rows = list(parsers.parse_json(source, bad))
        else:
            rows = list(parsers.parse_jsonl(source, bad))
    if not rows:
        raise DataError(f"{path}: no rows. {bad.summary() or 'The file holds no data.'}")
    return rows


def suffix_of(path: Path) -> str:
    """The suffix that chooses the parser.

    Raises:
      DataError: there is no parser for it.
    """
    suffix = "".join(path.suffixes[-2:]).lower() if path.suffix == ".gz" else path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown data format {suffix or '(no suffix)'!r}. Known: {', '.join(SUFFIXES)}")
    return suffix


def data_files(folder: Path) -> list[Path]:
    """The data files below a folder, sorted by path; hidden files and folders are passed over."""
    found = (p for p in folder.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def check_file(path: Path) -> None:
    """Raises a `DataError` that says what is wrong: missing, a folder, not readable, or a Git LFS pointer."""
    try:
        if path.is_dir():
            names = sorted(p.name for p in path.iterdir())[:8]
            raise DataError(f"{path} is a folder, expected a data file. It holds: {', '.join(names) or 'nothing'}")
        if not path.exists():
            raise DataError(_missing(path))
        with path.open("rb") as f:
            head = f.read(400)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}). {_owner(path)}") from None
    if head.startswith(_POINTER):
        size = re.search(rb"size (\d+)", head)
        real = f" of {int(size[1]):,} bytes" if size else ""
        raise DataError(f"{path} is a Git LFS pointer to a file{real}, not the data. Run `git lfs pull` there first.")


def _missing(path: Path) -> str:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if folder != path.parent:
        return f"{path} does not exist: there is no {path.relative_to(folder).parts[0]!r} in {folder}"
    here = [p.name for p in folder.iterdir()]
    near = nearest(path.name, here) or sorted(n for n in here if n.lower().endswith(SUFFIXES))[:5]
    return f"{path} does not exist. In its folder: {', '.join(near) or 'no data files'}"


def _owner(path: Path) -> str:
    try:
        info = path.stat()
    except OSError:
        return f"The folder {path.parent} does not let you look inside."
    return f"It belongs to user {info.st_uid} with mode {stat.filemode(info.st_mode)}; you are user {os.getuid()}."


def read_bytes(path: Path) -> bytes:
    """The content of a file, unzipped if its name ends in ``.gz``.

    Raises:
      DataError: it cannot be read, is a damaged gzip file, or is UTF-16.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise DataError(f"{path}: not a whole gzip file ({e}). Was it cut off?") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}). {_owner(path)}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16. Save it as UTF-8.")
    return data


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, after `check_file`."""
    check_file(path)
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
