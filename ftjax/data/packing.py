"""Which examples share a row: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830), or one example per row.

Examples are placed longest first, each into the fullest row that still takes it. The rows depend on the lengths alone,
so they are computed once: a later epoch only chooses anew which of the equally long examples stands in which slot.

    plan = plan_rows(examples.lengths, 512, "bfd")
    rows = plan.fill(permutation)                    # list of index arrays, one per row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class RowPlan:
    """Rows for given lengths.

    Attributes:
      lengths: tokens of each example, [examples].
      keys: what the examples are sorted by, smallest first, [examples].
      slot_row: row of the j-th example in that order, [examples].
      rows: number of rows.
      capacity: tokens per row.
    """

    lengths: np.ndarray
    keys: np.ndarray
    slot_row: np.ndarray
    rows: int
    capacity: int

    @property
    def fill_share(self) -> float:
        """Share of the row positions that hold a token."""
        return float(self.lengths.sum() / max(self.rows * self.capacity, 1))

    def fill(self, order: np.ndarray) -> list[np.ndarray]:
        """The examples of each row, when `order` (a permutation) breaks the ties between equal keys.

        Returns:
          One array of example indices per row. Any order is a valid packing, and the same order gives the same rows.
        """
        by_key = order[np.argsort(self.keys[order], kind="stable")]
        by_row = np.argsort(self.slot_row, kind="stable")
        borders = np.searchsorted(self.slot_row[by_row], np.arange(1, self.rows))
        return np.split(by_key[by_row], borders) if self.rows else []


def plan_rows(lengths: np.ndarray, capacity: int, packing: Literal["bfd", "none"] = "bfd") -> RowPlan:
    """Plans the rows for examples of the given lengths.

    Args:
      lengths: tokens of each example, [examples], each at most `capacity`.
      capacity: tokens per row.
      packing: "bfd" or "none" (one example per row).

    Raises:
      ValueError: an example is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and lengths.max() > capacity:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit a row of {capacity}")
    if packing == "none":
        return RowPlan(lengths, np.zeros_like(lengths), np.arange(len(lengths)), len(lengths), capacity)
    slots, rows = _best_fit(-np.sort(-lengths), capacity)
    return RowPlan(lengths, -lengths, slots, rows, capacity)


def _best_fit(descending: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Row of each length. A bit per free space says which exist: the best fit is one shift and one lowest bit."""
    free: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    slots = np.empty(len(descending), np.int64)
    rows = 0
    for j, length in enumerate(descending.tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = free[space].pop()
            if not free[space]:
                spaces ^= 1 << space
        else:
            space, row, rows = capacity, rows, rows + 1
        slots[j] = row
        left = space - length
        free[left].append(row)
        spaces |= 1 << left
    return slots, rows
