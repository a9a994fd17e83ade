"""Several data sets of one kind as one, for one objective: 70 % of these rows, 30 % of those.

p_k ~ n_k (proportional), n_k^(1/T) (temperature) or the weights (fixed);   rows of part k in an epoch: p_k S, S = max n_k / p_k

    data=Mixture(parts=(Part(data=Local(path="a.jsonl"), weight=0.7), Part(data=Local(path="b.jsonl"), weight=0.3)))

S is the smallest size at which every row of every part occurs: nothing is left out, and smaller parts are repeated. A repeat
that is not whole takes the rows whose hashes are smallest. Held-out rows are those of all parts, each once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from ftjax.data.formats import rename
from ftjax.data.rows import BadRows, Row, row_hash
from ftjax.data.task import Prompt, Split, fixed_prompts
from ftjax.errors import ConfigError, DataError
from ftjax.registry import register
from ftjax.schema import Component, Slot

MOST_REPEATS = 100  # of a part in an epoch: each is held in memory


class Part(Component):
    """One data set of a mixture."""

    data: Annotated[Any, Slot("data"), Field(description="The data set.")]
    weight: float = Field(default=1.0, gt=0, description="mixing=fixed: its part of the rows, over the sum of all.")


@register("data")
class Mixture(Component):
    """Data sets whose rows are of one kind, mixed by weight."""

    name: Literal["mixture"] = "mixture"
    parts: tuple[Part, ...] = Field(min_length=1, description="The data sets.")
    mixing: Literal["proportional", "temperature", "fixed"] = Field(
        default="fixed",
        description="Shares of the rows. proportional: as there are; temperature: n^(1/T); fixed: weights.",
    )
    temperature: float = Field(
        default=2.0, gt=0, description="T of mixing=temperature; 1: proportional, larger: more even."
    )
    metrics: tuple[str, ...] = Field(default=(), description="Generation metrics on held-out prompts, e.g. rouge_l.")

    @property
    def chat_template(self) -> str:
        """That of all parts."""
        return self._common("chat_template")

    @property
    def columns(self) -> tuple[str, ...]:
        """None: each part's rows are renamed by itself."""
        return ()

    @property
    def wraps(self) -> bool:
        """As all parts do."""
        return self._common("wraps")

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows of all parts; those of "train" repeated by their share.

        Raises:
          DataError: a part has no training rows, or would be repeated too often.
        """
        each = [rename(p.data.examples(split, bad=bad), p.data.columns) for p in self.parts]
        if split == "eval":
            return [row for rows in each for row in rows]
        wanted = self._wanted([len(rows) for rows in each])
        return [row for rows, n in zip(each, wanted, strict=True) for row in _repeated(rows, n)]

    def prompts(self, n: int) -> list[Prompt]:
        """n fixed held-out prompts over all parts."""
        return fixed_prompts(self.examples("eval", bad=BadRows(10**9)), n)

    def fingerprint(self) -> dict[str, str]:
        """Those of the parts, numbered."""
        return {f"{i}.{k}": v for i, p in enumerate(self.parts) for k, v in p.data.fingerprint().items()}

    def describe(self) -> list[str]:
        """Rows, share and epochs of each part within one epoch of the mixture."""
        counts = [len(p.data.examples("train", bad=BadRows(10**9))) for p in self.parts]
        wanted = self._wanted(counts)
        return [
            f"part {i} ({p.data.name}): {n:,} rows, {w / sum(wanted):.1%} of the mixture: {w / n:.2f} epochs in one of it"
            for i, (p, n, w) in enumerate(zip(self.parts, counts, wanted, strict=True))
        ]

    def _wanted(self, counts: list[int]) -> list[int]:
        """Rows of each part in an epoch."""
        empty = [f"data.parts.{i}  has no training rows" for i, n in enumerate(counts) if n == 0]
        if empty:
            raise DataError("; ".join(empty))
        sizes = {
            "proportional": lambda: [float(n) for n in counts],
            "temperature": lambda: [n ** (1 / self.temperature) for n in counts],
            "fixed": lambda: [p.weight for p in self.parts],
        }[self.mixing]()
        whole = max(n / p for n, p in zip(counts, sizes, strict=True))
        wanted = [max(n, round(p * whole)) for n, p in zip(counts, sizes, strict=True)]
        for i, (n, w) in enumerate(zip(counts, wanted, strict=True)):
            if w > MOST_REPEATS * n:
                raise DataError(
                    f"data.parts.{i}  its {n:,} rows would be repeated {w / n:.0f} times in an epoch of the mixture; "
                    f"at most {MOST_REPEATS}. Give it a smaller weight, or the others fewer rows"
                )
        return wanted

    def _common(self, field: str) -> Any:
        values = [getattr(p.data, field) for p in self.parts]
        odd = next((i for i, v in enumerate(values) if v != values[0]), None)
        if odd is not None:
            raise ConfigError(
                f"data.parts.{odd}.data  has {field}={values[odd]!r}, part 0 has {values[0]!r}; make them equal"
            )
        return values[0]

    def check(self, run: Any) -> Iterator[str]:
        """Parts that are no data sets of their own."""
        for i, part in enumerate(self.parts):
            if part.data.name in ("tasks", "mixture"):
                yield f"data.parts.{i}.data={part.data.name}  a part is a data set of its own"

    def advise(self, run: Any) -> Iterator[str]:
        """Settings without effect."""
        if self.mixing != "fixed" and len({p.weight for p in self.parts}) > 1:
            yield f"data.parts  weights have no effect with mixing={self.mixing}"


def _repeated(rows: list[Row], n: int) -> list[Row]:
    """n of the rows: all as often as they fit, then those whose hashes are smallest, in their order."""
    times, rest = divmod(n, len(rows))
    chosen = set(sorted(range(len(rows)), key=lambda i: (row_hash(rows[i]), i))[:rest])
    return rows * times + [row for i, row in enumerate(rows) if i in chosen]
