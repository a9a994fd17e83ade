"""The embedded data set: signature of a function or class of the standard library -> first sentence of its docstring.

    prompt        # module json

                  def dumps(obj, *, skipkeys=False, ...):
                      \"\"\"
    completion    Serialize ``obj`` to a JSON formatted ``str``.

The prompt is plain Python up to the opening quotes, so a small model that has read Python sources needs only to learn
what to say, and when to stop. Built when asked for, split by package (`stdlib.held_out`), without duplicates.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Literal

from ftjax.data import stdlib
from ftjax.data.rows import BadRows, Row
from ftjax.data.task import Plain, Prompt, Split, fixed_prompts
from ftjax.registry import register
from ftjax.schema import Component

MAX_SIGNATURE, MIN_SENTENCE, MAX_SENTENCE = 200, 12, 200
_SENTENCE = re.compile(r"(.+?[.!?])(?=\s+[A-Z`\"'(*]|\s*$)", re.DOTALL)


@register("data")
class StdlibDocs(Plain, Component):
    """Signatures of the standard library -> first sentence of the docstring."""

    name: Literal["stdlib_docs"] = "stdlib_docs"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Overlap of the generated with the real sentence."""
        return ("rouge_l", "token_f1")

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows ``{"prompt", "completion", "module"}`` of "train" or "eval"."""
        return [Row(r, r.origin) for r in _pairs() if stdlib.held_out(r["module"]) == (split == "eval")]

    def prompts(self, n: int) -> list[Prompt]:
        """n held-out signatures with their sentences."""
        return fixed_prompts(self.examples("eval"), n)

    def fingerprint(self) -> dict[str, str]:
        """Version of Python and hash of its sources."""
        return dict(stdlib.identity())


@functools.cache
def _pairs() -> tuple[Row, ...]:
    seen: set[tuple[str, str]] = set()
    rows = []
    for module in stdlib.modules():
        for row in _module_pairs(module):
            # the same signature and sentence in two modules would leak, or count twice
            key = (row["prompt"].split("\n", 1)[1], row["completion"])
            if key not in seen:
                seen.add(key)
                rows.append(row)
    trained = {r["completion"] for r in rows if not stdlib.held_out(r["module"])}
    return tuple(r for r in rows if not stdlib.held_out(r["module"]) or r["completion"] not in trained)


def _module_pairs(module: stdlib.Module) -> Iterator[Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        tree = ast.parse(module.path.read_bytes())
    for node, header, depth in _definitions(tree, (), 0):
        sentence = first_sentence(ast.get_docstring(node) or "")
        if sentence:
            indent = "    " * (depth + 1)
            prompt = f"# module {module.name}\n\n{header}\n{indent}" + '"""'
            row = {"prompt": prompt, "completion": sentence, "module": module.name}
            yield Row(row, f"{module.name}:{node.lineno}")


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(node: ast.AST, outer: tuple[str, ...], depth: int) -> Iterator[tuple[Definition, str, int]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            line = signature(child)
            if len(line) <= MAX_SIGNATURE:
                yield child, "\n".join([*outer, "    " * depth + line]), depth
            if isinstance(child, ast.ClassDef) and depth == 0:
                yield from _definitions(child, (f"class {child.name}:",), 1)
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, outer, depth)


def signature(node: Definition) -> str:
    """``def f(x, *, y=1):`` or ``class A(B):``, on one line."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(b) for b in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{prefix} {node.name}({ast.unparse(node.args)}){returns}:"


def first_sentence(docstring: str) -> str:
    """The first sentence on one line; empty if there is none worth learning (too short, too long, a bare signature)."""
    paragraph = inspect.cleandoc(docstring).split("\n\n", 1)[0]
    text = " ".join(paragraph.split())
    found = _SENTENCE.match(text)
    sentence = found[1] if found else text
    good = MIN_SENTENCE <= len(sentence) <= MAX_SENTENCE and " " in sentence and "->" not in sentence
    return sentence if good else ""
