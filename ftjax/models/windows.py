"""Sliding windows as `config.json` says them: per layer by ``layer_types``, or by an older rule of the family."""

from __future__ import annotations

from ftjax.models.hfconfig import HFConfig

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(c: HFConfig, usual: tuple[str, ...]) -> tuple[str, ...]:
    """The kind of attention of each layer; `usual` is what a file without the list means.

    Raises:
      DataError: another kind, or not one per layer.
    """
    given = c.raw("layer_types")
    types = usual if given is None else tuple(given)
    if set(types) - {SLIDING, FULL} or len(types) != c.int("num_hidden_layers"):
        raise c.wrong("layer_types", given, f"{SLIDING} or {FULL} for each of the layers")
    return types
