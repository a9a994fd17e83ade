"""Memory of the compiled step by component, against what the device has.

    report = memory_report(frozen_bytes=..., trainable_bytes=..., opt_bytes=..., compiled=step.memory_analysis())
    report.verdict        # "fits (12% of 15.6 GiB)"

All bytes are those of one device. The sizes come from the compiler, so the verdict is known before the first step.
"""

from __future__ import annotations

import dataclasses as dc
import math
import os
from typing import TYPE_CHECKING, Any

import jax

from ftjax.report.grid import Grid
from ftjax.report.units import percent, size

if TYPE_CHECKING:
    from ftjax.config import Run


@dc.dataclass(frozen=True)
class MemoryRow:
    """One component and its bytes on one device."""

    name: str
    bytes: int


@dc.dataclass(frozen=True)
class MemoryReport:
    """Components, what the device has, and what helps where they do not fit.

    Attributes:
      rows: components.
      limit: bytes of the device; None when unknown.
      complete: whether the compiler has been asked; else activations are missing.
      advice: settings that lower the memory.
    """

    rows: tuple[MemoryRow, ...]
    limit: int | None
    complete: bool
    advice: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(r.bytes for r in self.rows)

    @property
    def fits(self) -> bool:
        """Whether the device has that much; True when its size is unknown."""
        return self.limit is None or self.total <= self.limit

    @property
    def verdict(self) -> str:
        """One line for the user."""
        if self.limit is None:
            return f"needs {size(self.total)}; the device does not say how much it has"
        share = f"({percent(self.total, self.limit)} of {size(self.limit)})"
        if not self.fits:
            return f"does not fit {share}: try {', '.join(self.advice)}"
        return f"fits {share}" if self.complete else f"fits {share} before activations, which are known after compiling"

    def grid(self) -> Grid:
        """The report as a table."""
        rows = [
            (r.name, size(r.bytes), percent(r.bytes, self.total)) for r in (*self.rows, MemoryRow("all", self.total))
        ]
        return Grid("memory per device", ("component", "bytes", "share"), tuple(rows), totals=1, note=self.verdict)


def memory_report(
    *, frozen_bytes: int, trainable_bytes: int, opt_bytes: int, batch_bytes: int = 0, reference_bytes: int = 0,
    compiled: Any = None, limit: int | None = None, run: Run | None = None,
) -> MemoryReport:  # fmt: skip
    """Sorts the bytes of a run by component.

    Args:
      frozen_bytes: weights that are not trained, on one device (see `device_bytes`); likewise all of these.
      trainable_bytes: trained leaves.
      opt_bytes: optimizer state.
      batch_bytes: one step's batch.
      reference_bytes: the reference's snapshot of the trained leaves.
      compiled: `memory_analysis()` of the compiled step; None before compiling, when activations are unknown.
      limit: bytes of the device; asked of the device by default.
      run: the config, to name the settings that would still help.
    """
    known = [
        MemoryRow("frozen weights", frozen_bytes), MemoryRow("trained parameters", trainable_bytes),
        MemoryRow("optimizer state", opt_bytes), MemoryRow("reference", reference_bytes),
    ]  # fmt: skip
    limit = device_limit() if limit is None else limit
    inputs = sum(r.bytes for r in known)
    if compiled is None:
        rows = [*known, MemoryRow("gradients", trainable_bytes), MemoryRow("batch", batch_bytes)]
        return MemoryReport(_present(rows), limit, False, advice(run))
    # Gradients are among the compiler's temporaries. Outputs that alias a donated input need no room of their own.
    gradients = min(trainable_bytes, compiled.temp_size_in_bytes)
    fresh = max(compiled.output_size_in_bytes - compiled.alias_size_in_bytes, 0) + compiled.generated_code_size_in_bytes
    rows = [
        *known, MemoryRow("gradients", gradients),
        MemoryRow("activations and workspace", compiled.temp_size_in_bytes - gradients + fresh),
        MemoryRow("batch", max(compiled.argument_size_in_bytes - inputs, 0)),
    ]  # fmt: skip
    return MemoryReport(_present(rows), limit, True, advice(run))


def advice(run: Run | None) -> tuple[str, ...]:
    """Settings that lower the memory and are not yet at their best, those that keep the result first."""
    if run is None:
        return ("compute.remat=full", "train.accumulate=2 or more", "a smaller loader.max_length")
    found = [] if run.compute.remat == "full" else ["compute.remat=full"]
    rows = run.train.batch // run.train.accumulate
    if rows > 1:
        divisor = next(d for d in range(2, rows + 1) if rows % d == 0)
        found.append(f"train.accumulate={run.train.accumulate * divisor}")
    if run.compute.dtype != "bfloat16":
        found.append("compute.dtype=bfloat16")
    return (*found, f"loader.max_length={math.ceil(run.loader.max_length / 2)}")


def device_limit() -> int | None:
    """Bytes that one device may hold: its own word on an accelerator, an equal share of the memory on a CPU."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return host_memory() // jax.local_device_count()


def host_memory(limit_file: str = "/sys/fs/cgroup/memory.max") -> int:
    """Bytes of memory of this machine, or of the container in which this runs."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open(limit_file, encoding="ascii") as file:
            return min(physical, int(file.read()))
    except (OSError, ValueError):  # no such file outside of containers; "max" where there is no limit
        return physical


def device_bytes(tree: Any) -> int:
    """Bytes of a tree on one device: of each array, the part that its sharding puts there."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        total += math.prod(shape) * x.dtype.itemsize
    return total


def _present(rows: list[MemoryRow]) -> tuple[MemoryRow, ...]:
    return tuple(r for r in rows if r.bytes)
