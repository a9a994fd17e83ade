"""What a run says: coloured tables and a progress bar on a terminal, plain lines everywhere else.

    console = Console()
    console.header(run)
    with console.compiling("train step"):
        step = compile_train(setup)
    console.where({"report": path})

Off a terminal there are no escape sequences and no carriage returns. NO_COLOR is honoured. Text of models and data is
shown as it is: control characters in it are spelled out and never reach the terminal.
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console as Rich
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ftjax.report.grid import Grid, plain, rich_table
from ftjax.report.header import run_lines
from ftjax.report.progress import Progress
from ftjax.report.samples import ABSENT, Answered, Sample, comparison, pair
from ftjax.report.units import measured, number, title, visible

if TYPE_CHECKING:
    from ftjax.config import Run
    from ftjax.data.preview import PreviewExample, Span
    from ftjax.report.memory import MemoryReport
    from ftjax.report.parameters import ParameterReport

TRAINED, MASKED = "green", "grey50"
MOST = 700  # characters of one text; of a longer one the middle is left out


class Console:
    """Prints a run.

    Attributes:
      quiet: print nothing; for all processes of a cluster but the first.

    Args:
      stream: standard output by default.
      terminal: whether the stream is a terminal that can be drawn on; found out by default.
      width: columns of the terminal; found out by default.
    """

    def __init__(self, stream: TextIO | None = None, *, terminal: bool | None = None, width: int | None = None):
        self.quiet = False
        self._stream = stream or sys.stdout
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        able = os.environ.get("TERM") not in ("dumb", "unknown")
        self.terminal = self._stream.isatty() and able if terminal is None else terminal
        self.color = self.terminal and not os.environ.get("NO_COLOR")
        self._rich = Rich(
            file=self._stream, force_terminal=self.terminal, no_color=not self.color, width=width, markup=False,
            highlight=False, emoji=False, legacy_windows=False,
        )  # fmt: skip
        self._unfinished = ""

    # What a run shows, in this order ----------------------------------------------------------------------------------

    def header(self, run: Run) -> None:
        """The resolved run in ten lines."""
        self._heading(f"run {run.name}")
        for name, text in run_lines(run):
            self._put(Text.assemble((f"  {name:<10}", "dim"), self.clean(text)), f"  {name:<10}{text}")

    def parameters(self, report: ParameterReport) -> None:
        """What is trained and what is not."""
        self._grid(report.grid())

    def memory(self, report: MemoryReport) -> None:
        """Memory by component and whether it fits."""
        self._grid(report.grid(), note_style="" if report.fits else "bold red")

    def preview(self, examples: Sequence[PreviewExample]) -> None:
        """The very tokens that reach the loss."""
        how = "green is trained, grey is masked" if self.color else "[[...]] is trained, the rest is masked"
        self._heading(f"what reaches the loss: {how}")
        for i, example in enumerate(examples, 1):
            eos = "EOS is trained" if example.trains_eos else "EOS is not trained"
            self.line(f"  example {i}, {example.origin}: {example.trained} of {example.tokens} tokens trained, {eos}")
            self._put(self._spans(example.spans), indent=4)

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Says that `what` is being compiled, and how long it took."""
        start = time.perf_counter()

        def text() -> str:
            return f"compiling {what} ... {time.perf_counter() - start:.1f} s"

        if not self.terminal and not self.quiet:  # written now, so that nobody thinks it hangs; finished below
            self._unfinished = f"compiling {what} ..."
            self._stream.write(self._unfinished)
            self._stream.flush()
        live = self.live(lambda: Text(text(), "cyan"), transient=True, every_s=0.1)
        with live or contextlib.nullcontext():
            try:
                yield
            except BaseException:
                self._finish_line(f"{text()}, failed")
                raise
        self._finish_line(text())

    def progress(self, total: int, *, start: int = 0, log_every: int = 10) -> Progress:
        """A context manager with `update`; see `ftjax.report.progress`."""
        return Progress(self, total, start, log_every, self._encoding.lower().startswith("utf"))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Held-out numbers at a step."""
        self.line(f"step {step}: " + ", ".join(f"{title(k)} {number(v)}" for k, v in measured(metrics).items()))

    def comparison(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Held-out numbers before and after; either may be a whole line of metrics.jsonl."""
        grid = comparison(before, after)
        if grid.rows:
            self._grid(grid)

    def samples(self, before: Iterable[Answered], after: Iterable[Answered]) -> None:
        """Answers to the same prompts before and after, side by side."""
        found = pair(before, after)
        if not found:
            return
        self._heading("answers to held-out prompts")
        moments = [m for m in ("before", "after") if any(getattr(s, m) is not None for s in found)]
        if self.terminal:
            self._rich_print(self._sample_table(found, moments))
            return
        for i, sample in enumerate(found, 1):
            for j, name in enumerate(("prompt", *moments, "reference")):
                first = f"  {i}. {name:<10}" if j == 0 else f"     {name:<10}"
                text = self._cut(self.clean(_or_absent(getattr(sample, name))))
                self._write(first + text.replace("\n", "\n" + " " * 15))

    def where(self, paths: Mapping[str, Path | str]) -> None:
        """Where everything lies."""
        self._heading("where everything is")
        width = max(map(len, paths), default=0)
        for name, path in paths.items():
            text = self.clean(str(path))
            self._put(Text.assemble((f"  {name:<{width}}  ", "dim"), text), f"  {name:<{width}}  {text}")

    def warn(self, text: str) -> None:
        """Something the user should look at."""
        self._put(Text.assemble(("warning: ", "bold yellow"), self.clean(text)), f"warning: {text}")

    def note(self, text: str) -> None:
        """Something the user may want to know."""
        self.line(text)

    # How it is shown --------------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self._rich.width

    def line(self, text: str = "") -> None:
        """A plain line."""
        self._put(Text(self.clean(text)), text)

    def clean(self, text: str) -> str:
        """The text with everything spelled out that the stream would obey or cannot show."""
        return visible(text, self._encoding)

    def live(self, draw: Callable[[], Text], *, transient: bool, every_s: float = 0.0) -> Live | None:
        """A region of the terminal that is drawn anew (by itself `every_s`, if that is set); None off a terminal."""
        if not self.terminal or self.quiet:
            return None
        rate = 1 / every_s if every_s else 4.0
        return Live(
            get_renderable=draw,
            console=self._rich,
            transient=transient,
            auto_refresh=bool(every_s),
            refresh_per_second=rate,
        )

    def _heading(self, text: str) -> None:
        self._put(Text(self.clean(text), "bold"), text)

    def _grid(self, grid: Grid, note_style: str = "") -> None:
        if not self.terminal:
            for text in plain(grid):
                self.line(text)
            return
        self._rich_print(rich_table(grid))
        if grid.note:
            self._rich_print(Text(self.clean(grid.note), note_style))

    def _spans(self, spans: Sequence[Span]) -> Text:
        """Trained and masked text; marked by colour where there is any, else by brackets."""
        out = Text()
        for span in spans:
            text = self._cut(self.clean(span.text))
            if not self.color:
                out.append(f"[[{text}]]" if span.trained else text)
            elif span.trained:  # a trained line break would be invisible
                out.append(text.replace("\n", self.clean("↵") + "\n"), TRAINED)
            else:
                out.append(text, MASKED)
        return out

    def _sample_table(self, found: Sequence[Sample], moments: Sequence[str]) -> Table:
        table = Table(show_lines=True, expand=True)
        for name in ("prompt", *moments, "reference"):
            table.add_column(name, ratio=1, overflow="fold", style=TRAINED if name == "after" else "")
        for sample in found:
            texts = (_or_absent(getattr(sample, name)) for name in ("prompt", *moments, "reference"))
            table.add_row(*(Text(self._cut(self.clean(text))) for text in texts))
        return table

    @staticmethod
    def _cut(text: str) -> str:
        if len(text) <= MOST:
            return text
        return f"{text[: MOST // 2]} ... ({len(text) - MOST:,} characters left out) ... {text[-MOST // 2 :]}"

    def _put(self, styled: Text, text: str | None = None, indent: int = 0) -> None:
        """Shows `styled` on a terminal, and elsewhere `text` (by default the same without its style)."""
        pad = " " * indent
        if self.terminal:
            self._rich_print(Text("\n").join(Text(pad).append_text(t) for t in styled.split("\n", allow_blank=True)))
        else:
            self._write(textwrap.indent(self.clean(styled.plain if text is None else text), pad))

    def _rich_print(self, what: Text | Table) -> None:
        if not self.quiet:
            self._rich.print(what)

    def _write(self, text: str) -> None:
        """Whole lines off a terminal; one that `compiling` has begun is ended first."""
        if self.quiet:
            return
        begun, self._unfinished = self._unfinished, ""
        self._stream.write("\n" * bool(begun) + text + "\n")
        self._stream.flush()

    def _finish_line(self, text: str) -> None:
        """Ends the line that `compiling` has begun, or writes all of it where something came between."""
        begun, self._unfinished = self._unfinished, ""
        if self.terminal or not begun:
            self.line(text)
        else:
            self._write(text.removeprefix(begun))


def _or_absent(text: str | None) -> str:
    return ABSENT if text is None else text
