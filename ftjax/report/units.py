"""Numbers and foreign text as people read them: ``5.9 MiB``, ``0:42``, control characters spelled out.

size(6_187_008) == "5.9 MiB";  short(12_345) == "12.3k";  clock(62) == "1:02";  visible("\\x1b[2J") == r"\\x1b[2J"
"""

from __future__ import annotations

import dataclasses as dc
import math
import re
from collections.abc import Mapping
from typing import Any

# What a terminal or a browser obeys rather than shows: control characters but newline and tab, surrogates, and marks
# that reorder or hide text (bidi overrides, zero-width spaces, tags). The joiners stay: scripts and emoji need them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\U000e0000-\U000e007f]"
)
BOOKKEEPING = ("event", "step", "num_tokens")  # entries of a metrics line that measure nothing


def visible(text: str, encoding: str = "utf-8") -> str:
    """The text with every character that would be obeyed, or that `encoding` lacks, as its Python escape."""
    escaped = _UNSEEN.sub(lambda m: m[0].encode("unicode_escape").decode(), text)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def size(n: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def short(n: float) -> str:
    """A count in at most five characters."""
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M")):
        if n < 0.9995 * limit:
            return f"{n / limit * 1e3:.3g}{unit}"
    return f"{n / 1e9:.1f}B"


def number(x: float) -> str:
    """A measured number: four decimals, or an exponent where they would not do."""
    if not math.isfinite(x) or x == 0:
        return str(x) if x else "0"
    if float(x).is_integer() and abs(x) < 1e15:
        return f"{x:,.0f}"
    return f"{x:,.4f}" if 1e-2 <= abs(x) < 1e4 else f"{x:.3e}"


def percent(part: float, whole: float) -> str:
    """A share; two digits where it is below 10 %."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f}%" if share == 0 or share >= 10 else f"{share:.2g}%"


def clock(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def measured(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line that measure something, the loss first."""
    own = {k: k.rpartition("/")[2] for k in values}  # of several tasks each has its own
    numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and own[k] not in BOOKKEEPING}
    return dict(sorted(numbers.items(), key=lambda item: item[0] != "loss"))


def title(metric: str) -> str:
    """A metric as a reader calls it."""
    return "held-out loss" if metric == "loss" else metric.replace("_", " ")


@dc.dataclass
class Ema:
    """Exponential moving average, corrected for its start at zero; non-finite values are passed over."""

    decay: float = 0.9
    total: float = 0.0
    weight: float = 0.0

    def update(self, x: float) -> float:
        """Takes in a value; returns the average so far (nan before the first finite one)."""
        if math.isfinite(x):
            self.total = self.decay * self.total + (1 - self.decay) * x
            self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight if self.weight else math.nan
