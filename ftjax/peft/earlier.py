"""An earlier adapter as the start of a run: training goes on from it, and it is what a preference loss measures against.

policy = base + overlay,   overlay at step 0 = the adapter in the folder;   reference = the policy at step 0

    model=Pretrained(path="my/llama", adapter="runs/sft/adapter"), peft=LoRA(rank=16), objective=DPO()

The method of the run must be the folder's, so that its config says what is trained. Only the rate of dropout, which no
folder needs to agree on, is the run's own. To train a new adapter on top of an old one, fold the old one into the base
first (``run.py merge``): a folder with two adapters of which only one is in the file would open as another model.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import ConfigError
from ftjax.params import Store, Table, bounds, cut, ranged
from ftjax.peft.adapters import own_weights
from ftjax.peft.base import CONST, Overlay
from ftjax.peft.interop import load_adapter
from ftjax.tree import leaves_by_path, matches, path_of

DROPOUT = "rate"
"""The one leaf that does nothing outside training."""
_SHOWN = 6


def start_from(
    folder: str | Path, method: Any, fresh: Overlay, table: Table, base: Store, *, base_path: str
) -> tuple[Store, Overlay]:
    """The base and the overlay of a run that goes on from an adapter folder.

    Args:
      folder: in PEFT's or AdapterHub's format.
      method: of the run.
      fresh: the overlay that `method` would begin with.
      table: of the model.
      base: its weights.
      base_path: where they came from; a warning is given when the folder names another model.

    Returns:
      The base with what the folder brings of it (a head, biases), and an overlay with the structure of `fresh` and the
      folder's numbers.

    Raises:
      ConfigError: the folder holds another method, other targets, shapes or scales than the run's config says.
      DataError: the folder does not fit the model (see `load_adapter`).
    """
    file = load_adapter(folder, table, base, base_path=base_path or None)
    where = f"model.adapter={folder}"
    if file.method.name != method.name:
        raise ConfigError(
            f"{where} holds {file.method.name}, but peft={method.name}: go on with peft={file.method.name}, or merge the "
            "adapter into the base first (run.py merge) and train the new one on that"
        )
    parts = cut(file.overlay, bounds(fresh))
    found, ours = leaves_by_path(parts), leaves_by_path(fresh)
    if problems := [*_differences(ours, found, method.labels(table)), *_other_choices(fresh, parts)]:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        settings = [*_settings(method, file.method, places=ours.keys() != found.keys())]
        raise ConfigError(f"{where} does not fit the run's method", [*settings, *problems[:_SHOWN], *more])

    def leaf(path: Any, value: Any) -> Any:
        at = path_of(path)
        return value if _is_dropout(at) else jnp.asarray(found[at], value.dtype)

    return base | own_weights(file, base), jax.tree_util.tree_map_with_path(leaf, fresh)


def _is_dropout(path: str) -> bool:
    return path.rsplit("/", 1)[-1] == DROPOUT


def _differences(fresh: dict[str, Any], found: dict[str, Any], rules: Any) -> Iterator[str]:
    """What the config's overlay and the folder's do not agree on: one has it alone, shapes, numbers that are not trained."""
    for path in dict.fromkeys([*fresh, *found]):
        if _is_dropout(path):
            continue
        if path not in found or path not in fresh:
            yield f"{path}  " + ("is not in the folder" if path in fresh else "is in the folder only")
        elif fresh[path].shape != found[path].shape:
            yield f"{path}  by the config {list(fresh[path].shape)}, in the folder {list(found[path].shape)}"
        elif _is_number(path, fresh[path], rules) and not np.allclose(fresh[path], found[path], rtol=1e-6):
            ours, theirs = (float(np.ravel(x)[0]) for x in (fresh[path], found[path]))
            yield f"{path}  by the config {ours:g}, in the folder {theirs:g}"


def _other_choices(fresh: Any, found: Any, path: str = "") -> Iterator[str]:
    """What two overlays differ in that no array shows: which tokens are edited, what a bottleneck reads."""
    if isinstance(fresh, dict) and isinstance(found, dict):
        for key in fresh.keys() & found.keys():
            yield from _other_choices(fresh[key], found[key], key)
    elif dc.is_dataclass(fresh) and type(fresh) is type(found):
        for field in dc.fields(fresh):
            ours, theirs, at = getattr(fresh, field.name), getattr(found, field.name), f"{path}/{field.name}"
            if field.metadata.get("pytree_node", True):
                yield from _other_choices(ours, theirs, at)
            elif ours != theirs:
                yield f"{at}  by the config {ours!r}, in the folder {theirs!r}"


def _is_number(path: str, value: Any, rules: Any) -> bool:
    """Whether a leaf is a setting (one number per layer that is not trained) and not an array that was drawn."""
    group = next((name for pattern, name in rules if matches(f"overlay/{path}", pattern)), "")
    r = ranged(path)
    return group == CONST and value.size == (r.stop - r.start if r and value.ndim else 1)


def _settings(method: Any, other: Any, *, places: bool) -> Iterator[str]:
    """The settings that differ, as the folder has them; names of `places` only where these differ: they have many forms."""
    ours, theirs = method.model_dump(), other.model_dump()
    for name, value in theirs.items():
        skipped = name in ("name", "dropout", "start") or (isinstance(value, tuple) and not places)
        if name in ours and ours[name] != value and not skipped:
            yield f"peft.{name}={ours[name]!r}  the folder's is {value!r}"
