"""The embedded data: thousands of pairs, no leak between the splits, the same every time."""

from __future__ import annotations

import ast

import pytest

from ftjax.data import stdlib
from ftjax.data.tasks.stdlib_docs import StdlibDocs, first_sentence, signature
from ftjax.data.tasks.stdlib_text import StdlibText


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum. It is fast.", "Return the sum."),
        ("Return e.g. the sum of\n    all of it\n\nDetails.", "Return e.g. the sum of all of it"),
        ("Serialize ``obj`` to a ``str``.\n\nMore.", "Serialize ``obj`` to a ``str``."),
        ("Is it really one? Yes.", "Is it really one?"),
        ("Short.", ""),
        ("x.f(a) -> the sum of it", ""),
        ("", ""),
        ("word " * 60, ""),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence


@pytest.mark.parametrize(
    "line",
    ["def f(a, /, b=1, *args, c: int=2, **kw) -> str:", "async def f():", "class A(B, metaclass=C):", "class A:"],
)
def test_signatures_are_python(line: str) -> None:
    node = ast.parse(f"{line}\n    pass").body[0]
    again = signature(node)  # type: ignore[arg-type]
    ast.parse(f"{again}\n    pass")
    assert again == line.replace(", metaclass=C", "")


def test_pairs_are_many_unique_and_split_by_package() -> None:
    train, held = StdlibDocs().examples("train"), StdlibDocs().examples("eval")
    assert len(train) > 4000 and len(held) > 200
    packages = [{r["module"].split(".")[0] for r in rows} for rows in (train, held)]
    assert not packages[0] & packages[1]
    assert not {r["completion"] for r in train} & {r["completion"] for r in held}
    body = [(r["prompt"].split("\n", 1)[1], r["completion"]) for r in train + held]
    assert len(set(body)) == len(body)
    example = next(r for r in train + held if r["module"] == "json" and "def dumps" in r["prompt"])
    assert example["prompt"].startswith("# module json\n\ndef dumps(obj, *, skipkeys=False,")
    assert example["prompt"].endswith(':\n    """')
    assert example["completion"] == "Serialize ``obj`` to a JSON formatted ``str``."
    ast.parse(example["prompt"] + example["completion"] + '"""')


def test_reading_twice_gives_the_same_and_nobody_can_change_it() -> None:
    first = StdlibDocs().examples("train")
    first[0]["prompt"] = "changed"
    assert StdlibDocs().examples("train")[0]["prompt"] != "changed"
    assert StdlibDocs().fingerprint() == StdlibDocs().fingerprint()
    assert StdlibDocs().prompts(5) == StdlibDocs().prompts(5) and len(StdlibDocs().prompts(5)) == 5


def test_the_corpus_shares_the_split_and_leaves_tests_out() -> None:
    train, held = StdlibText().examples("train"), StdlibText().examples("eval")
    assert sum(len(r["text"]) for r in train) > 5_000_000 and sum(len(r["text"]) for r in held) > 200_000
    assert all(stdlib.held_out(r["module"]) for r in held) and not any(stdlib.held_out(r["module"]) for r in train)
    sources = {r["module"] for r in train + held}
    assert {"json", "json.decoder", "asyncio.events", "topic-with"} <= sources
    assert not {m.split(".")[0] for m in sources} & {"test", "idlelib", "pip", "site-packages"}
    eval_modules = {r["module"] for r in StdlibDocs().examples("eval")}
    assert eval_modules <= {r["module"] for r in held}
    assert all(
        r["text"].startswith(f"# module {r['module']}\n\n") for r in train if not r["module"].startswith("topic-")
    )


def test_twins_go_together() -> None:
    assert stdlib.held_out("_pydecimal") == stdlib.held_out("decimal")
    assert stdlib.held_out("json.decoder") == stdlib.held_out("json")
