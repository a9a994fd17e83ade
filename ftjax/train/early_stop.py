"""Early stopping as counters: pure, and JSON, so that a resumed run stops at the same step.

stop = EarlyStop(patience=3)
stop = stop.update(step, loss)           # a new value; the old one is unchanged
if stop.exhausted: ...
extra["early_stop"] = stop.to_json()     # on resume: stop.restored(extra["early_stop"])
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class EarlyStop:
    """The best value so far (lower is better) and how many evaluations ago it was.

    Attributes:
      patience: evaluations without improvement after which to stop; 0 never stops.
      min_delta: smallest decrease that counts as an improvement.
      best: the value that later ones are compared with; None before the first finite one.
      best_step: its step.
      waited: evaluations since then.
    """

    patience: int = 0
    min_delta: float = 0.0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    def update(self, step: int, value: float) -> EarlyStop:
        """The counters after one more evaluation; a value that is not finite is no improvement."""
        improved = math.isfinite(value) and (self.best is None or value < self.best - self.min_delta)
        if improved:
            return replace(self, best=float(value), best_step=step, waited=0)
        return replace(self, waited=self.waited + 1)

    @property
    def improved(self) -> bool:
        """Whether the evaluation that was counted last is the best one."""
        return self.best is not None and self.waited == 0

    @property
    def exhausted(self) -> bool:
        """Whether to stop."""
        return 0 < self.patience <= self.waited

    def to_json(self) -> dict[str, Any]:
        """Counters only: patience and min_delta belong to the config, which may change on resume."""
        return {k: v for k, v in asdict(self).items() if k not in ("patience", "min_delta")}

    def restored(self, counters: dict[str, Any]) -> EarlyStop:
        """The same settings with saved counters."""
        return replace(self, **counters)
