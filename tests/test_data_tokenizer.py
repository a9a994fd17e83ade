"""Loading tokenizers and checking that they fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftjax.data.tokenizer import check_vocab, load_tokenizer, tokenizer_hash, tokenizer_warnings
from ftjax.errors import DataError
from tests.test_data_helpers import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    return tmp_path / "tok"


def test_a_folder_and_a_file_load(folder: Path) -> None:
    loaded = load_tokenizer(folder)
    assert loaded("hello")["input_ids"] == tiny_tokenizer()("hello")["input_ids"] and loaded.eos_token == "</s>"
    assert load_tokenizer(folder / "tokenizer.json")("hello")["input_ids"] == loaded("hello")["input_ids"]
    assert tokenizer_hash(loaded) == tokenizer_hash(tiny_tokenizer())


def test_the_hash_is_of_what_it_does() -> None:
    plain = tokenizer_hash(tiny_tokenizer())
    assert plain == tokenizer_hash(tiny_tokenizer())
    assert plain != tokenizer_hash(tiny_tokenizer(bos=True))
    assert plain != tokenizer_hash(tiny_tokenizer(eos_token="<s>"))


def test_missing_and_damaged(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder. Near: tok"):
        load_tokenizer(tmp_path / "tokk")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no tokenizer: expected one of tokenizer.json, .* It holds: nothing"):
        load_tokenizer(tmp_path / "empty")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(folder)
    with pytest.raises(DataError, match="is not a tokenizer.json"):
        load_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")
    with pytest.raises(DataError, match="is a Git LFS pointer to a file of 9 bytes"):
        load_tokenizer(folder)


def test_remote_code_never_runs(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(DataError, match="needs code that comes with the model, which ftjax never runs"):
        load_tokenizer(folder)
    assert not ran.exists()


def test_vocabulary_must_fit() -> None:
    tokenizer = tiny_tokenizer()
    n = len(tokenizer)
    assert check_vocab(tokenizer, n) == ()
    with pytest.raises(DataError, match="so 1 tokens have none"):
        check_vocab(tokenizer, n - 1)
    with pytest.raises(
        DataError, match=rf"largest id is {n - 1} \(.*\), the model's embedding has {n - 2} rows, so 2 tokens have none"
    ):
        check_vocab(tokenizer, n - 2)
    assert "is it this model's tokenizer?" in check_vocab(tokenizer, 2 * n)[0]


def test_special_token_warnings() -> None:
    assert tokenizer_warnings(tiny_tokenizer()) == ()
    assert "the pad token is the EOS token ('</s>', id 2): padding is masked by position" in tokenizer_warnings(
        tiny_tokenizer(pad_token="</s>"))[0]  # fmt: skip
    assert "has no EOS token" in tokenizer_warnings(tiny_tokenizer(eos_token=None))[0]
