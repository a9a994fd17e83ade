"""The pre-training corpus: sources of the standard library and Python's own help topics, split like `stdlib_docs`.

    StdlibText().examples("train")[0]     # {"text": "# module _aix_support\\n\\n...", "module": "_aix_support"}

Each source begins with the line ``# module <name>`` that the prompts of `stdlib_docs` begin with.
"""

from __future__ import annotations

import tokenize
from typing import Literal

from ftjax.data import stdlib
from ftjax.data.rows import BadRows, Row
from ftjax.data.task import Prompt, Silent, Split, fixed_prompts
from ftjax.registry import register
from ftjax.schema import Component


@register("data")
class StdlibText(Silent, Component):
    """Sources and help texts of the standard library, for pre-training."""

    name: Literal["stdlib_text"] = "stdlib_text"

    @property
    def wraps(self) -> bool:
        """Long sources are cut into pieces, not truncated."""
        return True

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows ``{"text", "module"}`` of "train" or "eval"; a help topic counts as a module of its own."""
        rows = [self._source(m) for m in stdlib.modules() if stdlib.held_out(m.name) == (split == "eval")]
        topics = [t for t in _topics() if stdlib.held_out(t["module"]) == (split == "eval")]
        return [r for r in rows + topics if r["text"].strip()]

    def _source(self, module: stdlib.Module) -> Row:
        with tokenize.open(module.path) as f:  # by the encoding that the file declares
            return Row({"text": f"# module {module.name}\n\n{f.read()}", "module": module.name}, f"{module.name}:1")

    def prompts(self, n: int) -> list[Prompt]:
        """Beginnings of n held-out sources."""
        return fixed_prompts(self.examples("eval"), n)

    def fingerprint(self) -> dict[str, str]:
        """Version of Python and hash of its sources."""
        return dict(stdlib.identity())


def _topics() -> list[Row]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [
        Row({"text": text, "module": f"topic-{name}"}, f"pydoc_data:{name}") for name, text in sorted(topics.items())
    ]
