"""Rotary frequencies (Su et al. 2021, arXiv:2104.09864) and how `config.json` says them, in its old and its new form."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ftjax.models.hfconfig import HFConfig


@dc.dataclass(frozen=True)
class Rope:
    """Rotary frequencies: base theta, and Llama 3's rescaling of the low ones or linear interpolation.

    Attributes:
      theta: base of the geometric series.
      kind: "default", "linear" or "llama3".
      factor: context extension.
      low_freq_factor, high_freq_factor, original_length: Llama 3's band limits (0 elsewhere).
      partial: share of a head's dimensions that are rotated, from the first on.
    """

    theta: float
    kind: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    partial: float = 1.0

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Inverse frequencies [rotated dimensions / 2], float32."""
        head_dim = int(head_dim * self.partial)
        inv = 1.0 / (np.float32(self.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)))
        if self.kind == "linear":
            return (inv / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            return self._llama3(inv)
        return inv.astype(np.float32)

    def _llama3(self, inv: np.ndarray) -> np.ndarray:
        """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1 report)."""
        wavelength = 2 * math.pi / inv
        smooth = (self.original_length / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - smooth) * inv / self.factor + smooth * inv
        long = wavelength > self.original_length / self.low_freq_factor
        short = wavelength < self.original_length / self.high_freq_factor
        return np.where(long, inv / self.factor, np.where(short, inv, blended)).astype(np.float32)


_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(c: HFConfig) -> Rope:
    """Rotary settings in either form: ``rope_theta`` + ``rope_scaling``, or transformers 5's ``rope_parameters``."""
    new, old = c.mapping("rope_parameters"), c.mapping("rope_scaling")
    return rope_of(c, new or old, theta=c.raw("rope_theta"), partial=c.raw("partial_rotary_factor"))


def rope_of(c: HFConfig, given: Mapping[str, Any], *, theta: Any = None, partial: Any = None) -> Rope:
    """One set of rotary settings.

    Args:
      c: for errors.
      given: the settings, null ones left out of account.
      theta, partial: what holds where `given` does not say; the whole head is rotated where nobody does.
    """
    scaling = {k: v for k, v in given.items() if v is not None}
    theta = scaling.get("rope_theta", theta)
    if theta is None:
        raise c.missing("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise c.wrong("rope_theta", theta, "a number")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROPE_NUMBERS:
        raise c.wrong("rope_scaling.rope_type", kind, "default, linear or llama3")
    unknown = sorted(set(scaling) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_NUMBERS[kind]})
    if unknown:
        raise c.wrong(f"rope_scaling.{unknown[0]}", scaling[unknown[0]], f"no such setting with rope_type={kind!r}")

    def number(name: str) -> float:
        if name not in scaling:
            raise c.missing(f"rope_scaling.{name}")
        if isinstance(scaling[name], bool) or not isinstance(scaling[name], int | float):
            raise c.wrong(f"rope_scaling.{name}", scaling[name], "a number")
        return float(scaling[name])

    numbers = {name: number(name) for name in _ROPE_NUMBERS[kind]}
    share = scaling.get("partial_rotary_factor", partial)
    return Rope(
        float(theta),
        kind,
        numbers.get("factor", 1.0),
        numbers.get("low_freq_factor", 0.0),
        numbers.get("high_freq_factor", 0.0),
        int(numbers.get("original_max_position_embeddings", 0)),
        1.0 if share is None else float(share),
    )


def rope_settings(rope: Rope) -> dict[str, Any]:
    """One set of rotary settings in transformers 5's form."""
    return {"rope_theta": rope.theta, **_scaling(rope)}


def _scaling(rope: Rope) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.partial != 1.0:
        scaling["partial_rotary_factor"] = rope.partial
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    return scaling


def write_rope(rope: Rope) -> dict[str, Any]:
    """The rotary settings in both forms, so that old and new transformers read the same."""
    partial = {} if rope.partial == 1.0 else {"partial_rotary_factor": rope.partial}
    scaling = {k: v for k, v in _scaling(rope).items() if k != "partial_rotary_factor"}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": rope_settings(rope),
        **partial,
    }
