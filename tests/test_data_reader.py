"""Reading local files: every format, and every way a file can be wrong, with the place named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ftjax.data import parsers
from ftjax.data.reader import read_rows
from ftjax.data.rows import BadRows, Row, held_out_split, row_hash
from ftjax.errors import DataError
from tests.test_data_helpers import write_jsonl

ROWS = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "é\n😀", "completion": "x", "reward": 0.5}]


def fails(path: Path, *texts: str, bad: BadRows | None = None) -> str:
    with pytest.raises(DataError) as e:
        read_rows(path, bad=bad)
    for text in texts:
        assert text in str(e.value), str(e.value)
    return str(e.value)


def test_json_and_jsonl_in_all_their_forms(tmp_path: Path) -> None:
    lines = "".join(json.dumps(r) + "\n" for r in ROWS)
    forms = {
        "a.jsonl": lines.encode(),
        "b.jsonl": ("\n\n" + lines + "\n").encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "crlf.jsonl": lines.replace("\n", "\r\n").encode(),
        "c.jsonl.gz": gzip.compress(lines.encode()),
        "d.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
        "e.json": json.dumps({"data": ROWS}).encode(),
        "lines.json": lines.encode(),
        "f.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    }
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        assert read_rows(tmp_path / name) == ROWS, name
    assert [r.origin for r in read_rows(tmp_path / "b.jsonl")] == [f"{tmp_path}/b.jsonl:{n}" for n in (3, 4)]
    assert [r.origin for r in read_rows(tmp_path / "d.json")] == [f"{tmp_path}/d.json:{n}" for n in (2, 6)]


def test_csv_with_quoted_lines_and_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,category\n"two\nlines, ""quoted""",a\n\nplain,b\n')
    rows = read_rows(path)
    assert rows == [{"text": 'two\nlines, "quoted"', "category": "a"}, {"text": "plain", "category": "b"}]
    assert [r.origin.rsplit(":", 1)[1] for r in rows] == ["2", "5"]
    (tmp_path / "a.tsv").write_text("text\tn\nx, y\t1\n")
    assert read_rows(tmp_path / "a.tsv") == [{"text": "x, y", "n": "1"}]
    (tmp_path / "long.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(read_rows(tmp_path / "long.csv")[0]["text"]) == 200_000


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "n": [1, 2]}, {"text": "b", "n": None}]), path)
    rows = read_rows(path)
    assert rows == [{"text": "a", "n": [1, 2]}, {"text": "b", "n": None}] and rows[1].origin == f"{path}:row 2"
    path.write_bytes(path.read_bytes()[:-9])
    fails(path, "a.parquet: not a whole Parquet file")


def test_plain_text_by_unit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n  one\n  more\n\n\ntwo\n")
    assert [(r["text"], r.origin[-2:]) for r in read_rows(path, text_unit="paragraph")] == [
        ("  one\n  more", ":2"),
        ("two", ":6"),
    ]
    assert [r["text"] for r in read_rows(path, text_unit="line")] == ["  one", "  more", "two"]
    assert read_rows(path, text_unit="file") == [{"text": path.read_text()}]


def test_blocks_of_text_join_to_the_text_and_end_at_a_border(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of the text\n" + "\n" * (i % 7 == 0) for i in range(2000)))
    rows = read_rows(path)
    assert "".join(r["text"] for r in rows) == path.read_text()
    assert all(r["text"].endswith("\n\n") for r in rows[:-1])
    assert [r.get("continues", False) for r in rows] == [True] * (len(rows) - 1) + [False]
    assert max(len(r["text"]) for r in rows) <= parsers.BLOCK_CHARS
    line = int(rows[3].origin.rsplit(":", 1)[1])
    assert path.read_text().splitlines()[line - 1] == rows[3]["text"].splitlines()[0]


def test_missing_folder_and_unknown_format(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    fails(tmp_path / "trian.jsonl", "does not exist. In its folder: train.jsonl")
    fails(tmp_path / "deta" / "x" / "train.jsonl", f"there is no 'deta' in {tmp_path}")
    fails(tmp_path, "is a folder, expected a data file. It holds: train.jsonl")
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    fails(tmp_path / "a.xlsx", "unknown data format '.xlsx'. Known: .jsonl, .jsonl.gz")


def test_permission_denied_names_owner_and_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    path.chmod(0o600)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    fails(path, "a.jsonl: cannot be read (Permission denied)", "mode -rw-------; you are user")


def test_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n")
    fails(tmp_path / "a.jsonl", "is a Git LFS pointer to a file of 12,345 bytes", "git lfs pull")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n")
    fails(tmp_path / name, f"{name}: no rows. The file holds no data.")


def test_malformed_jsonl_names_line_and_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", }\n')
    fails(path, "a.jsonl:2:", "not JSON", '{"text": "b", }', "loader.skip_bad")
    path.write_text('{"text": "a"}\n["b"]\n')
    fails(path, 'a.jsonl:2: expected an object like {"prompt": ..., "completion": ...}, got an array (["b"])')
    path.write_text('{"text": NaN}\n')
    fails(path, "a.jsonl:1: not JSON: NaN is not JSON")


def test_skip_bad_tolerates_counts_and_then_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{oops\n7\n{"text": "b"}\n')
    bad = BadRows(2)
    assert [r["text"] for r in read_rows(path, bad=bad)] == ["a", "b"]
    assert bad.count == 2 and bad.summary().startswith(f"2 malformed rows skipped, the first: {path}:2:2: not JSON")
    fails(path, "2 malformed rows, loader.skip_bad=1 tolerates fewer", "a.jsonl:3", "The first one", bad=BadRows(1))
    path.write_text("{oops\n")
    fails(path, "no rows. 1 malformed row skipped", bad=BadRows(9))


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_bad_bytes_are_named_by_line_and_offset(tmp_path: Path, bom: bytes) -> None:
    data = bom + b'{"text": "a"}\n{"text": "\xff"}\n'
    at = data.index(b"\xff")
    for name in ("a.jsonl", "a.json", "a.txt"):
        (tmp_path / name).write_bytes(data)
        fails(tmp_path / name, f"{name}:2: byte 0xff is not UTF-8 (invalid start byte), at byte {at}")
    data = data.replace(b"\xff", b"\0")
    (tmp_path / "nul.jsonl").write_bytes(data)
    fails(tmp_path / "nul.jsonl", f"nul.jsonl:2: NUL byte, at byte {at}")


def test_bad_bytes_in_csv_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\na,1\n"two\nli\xe9nes",2\nb,3\n')
    fails(path, "a.csv:4: byte 0xe9 is not UTF-8", f"at byte {path.read_bytes().index(0xE9)}")
    assert [r["text"] for r in read_rows(path, bad=BadRows(1))] == ["a", "b"]


def test_lone_surrogates_and_escaped_nul_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "pair \\ud83d\\ude00"}\n{"text": [{"content": "lone \\ud83d"}]}\n')
    at = path.read_text().rindex("\\ud83d")
    fails(path, f"a.jsonl:2: field 'text' holds a lone surrogate, near byte {at}")
    path.write_text('{"text": "\\u0000"}\n')
    fails(path, "a.jsonl:1: field 'text' holds a NUL character")


def test_utf16_and_broken_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n", encoding="utf-16")
    fails(tmp_path / "a.csv", "is UTF-16. Save it as UTF-8")
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for data in (whole[:-20], b"not gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        fails(tmp_path / "a.jsonl.gz", "not a whole gzip file")


def test_json_array_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"},\n {"text": "b"\n')
    fails(path, "a.json:4:1: not JSON", "(end of file)")
    path.write_text('[\n {"text": "a"}\n {"text": "b"}\n]')
    fails(path, "a.json:3:2: not JSON: expected ','", '{"text": "b"}')
    path.write_text('{"rows": [1]}')
    fails(path, 'expected an array of objects [{...}, ...] or {"data": [...]}')
    path.write_text('[{"text": "a"},\n 7]')
    fails(path, "a.json:2: expected an object", "got a number (7)")
    assert len(read_rows(path, bad=BadRows(1))) == 1


def test_csv_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,n\na,1\nb,2,3\n")
    fails(path, "a.csv:3: expected 2 fields (text, n), got 3")
    path.write_text('text,n\na,1\n"never closed,2\nb,3\n')
    fails(path, "a.csv:3: not CSV", "a quote opened here is never closed")
    path.write_text("text,text\na,1\n")
    fails(path, "a.csv:1: the header needs distinct, non-empty names, got text, text")


def test_held_out_split_is_stable_and_keeps_copies_together() -> None:
    rows = [Row({"text": str(i % 400)}, f"f:{i}") for i in range(800)]
    train, held = held_out_split(rows, 0.1)
    assert len(train) + len(held) == 800 and 40 < len(held) < 130
    assert not {row_hash(r) for r in train} & {row_hash(r) for r in held}
    longer, more = held_out_split([*rows, Row({"text": "new"})], 0.1)
    assert [r for r in more if r["text"] != "new"] == held
    tiny_train, tiny_held = held_out_split(rows[:2], 1e-6)
    assert len(tiny_train) == len(tiny_held) == 1
    assert held_out_split(rows, 0)[1] == []


def test_real_files_have_the_published_number_of_rows(shared: Path) -> None:
    counts = {
        "banking77/train.csv": 10_003,
        "banking77/test.csv": 3_080,
        "gsm8k/train.jsonl": 7_473,
        "gsm8k/test.jsonl": 1_319,
    }
    counts |= {"instruct/instructions.json": 1_100, "text/c4_sample.parquet": 200}
    assert {name: len(read_rows(shared / name)) for name in counts} == counts
    text = read_rows(shared / "text" / "tinyshakespeare.txt")
    assert "".join(r["text"] for r in text) == (shared / "text" / "tinyshakespeare.txt").read_text()
