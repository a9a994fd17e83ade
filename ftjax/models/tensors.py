"""A table's parameters and the tensors of safetensors files: names, layouts, checks; reading and giving them one at a time.

    params = load_table(model.table, [Path("model.safetensors")], dtype=jnp.dtype("float32"))
    for name, array in to_file_tensors(model.table, params): ...

Tensors are read one at a time and placed where the table says; a stack of layers is filled in place, so that the host
holds little beyond the parameters themselves. Names, shapes and completeness are checked against the table; nothing is
loaded in part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import ConfigError, DataError, listing
from ftjax.models.folder import stream
from ftjax.ops import Weight
from ftjax.params import ParamSpec, Store, Table, join, ranged
from ftjax.quant.base import Storage, stacked
from ftjax.tree import path_of


def file_names(table: Table) -> dict[str, tuple[str, int | None]]:
    """Names in the file -> (store key, layer or None)."""
    names: dict[str, tuple[str, int | None]] = {}
    for key, spec in table.items():
        if spec.kind == "site":
            continue
        r = ranged(key)
        for layer in range(max(r.start, spec.since), r.stop) if r else (None,):
            names[spec.hf.format(layer)] = (key, layer)
    return names


Place = Callable[[str, np.ndarray], Any]


def load_table(
    table: Table,
    files: list[Path],
    *,
    dtype: Any,
    rename: Callable[[str], str] = lambda name: name,
    ignore: Callable[[str], bool] = lambda _: False,
    absent: Callable[[str], Any] | None = None,
    place: Place | None = None,
    storage: Storage | None = None,
) -> Store:
    """Fills every parameter of a table from safetensors files.

    Args:
      table: what must be there.
      files: safetensors files.
      dtype: of the parameters.
      rename: from a name in the files to the table's.
      ignore: extra names (renamed) that carry no parameter of this table: old buffers, other heads.
      absent: value of a store key that no file has; None where it must be there.
      place: makes the device array from (store key, host array); by default on the default device.
      storage: quantizes the kernels that it covers, layer by layer, so that the host never holds them whole.

    Raises:
      DataError: missing, extra, misshapen or non-finite tensors, all in one table.
    """
    names = file_names(table)
    place = place or (lambda _, x: jnp.asarray(x))
    host: dict[str, np.ndarray] = {}
    packed: dict[str, dict[int, Any]] = {}
    left = Counter(key for key, _ in names.values())
    store: Store = {}
    problems: list[str] = []
    for written, tensor in stream(files):
        name = rename(written)
        if name not in names:
            if not ignore(name):
                problems.append(f"extra      {written} {list(tensor().shape)}")
            continue
        key, layer = names.pop(name)
        value, problem = _checked(name, tensor(), table[key])
        if problem:
            problems.append(problem)
            continue
        if layer is None:
            store[key] = place(key, _fill(np.empty(value.shape, dtype), value))
            continue
        if storage is not None and storage.covers(key, table[key]):
            layers = packed.setdefault(key, {})
            layers[layer] = storage.encode(_fill(np.empty(value.shape, dtype), value))
            left[key] -= 1
            if left[key] == 0:
                store[key] = place_tree(place, key, stacked(packed.pop(key)))
            continue
        if key not in host:
            host[key] = np.empty(table[key].shape, dtype)
            host[key][: table[key].since] = table[key].init == "ones"
        _fill(host[key][layer], value)
        left[key] -= 1
        if left[key] == 0:
            store[key] = place(key, host.pop(key))
    for key, spec in table.items():
        if spec.stacked and spec.kind != "site" and spec.since >= spec.shape[0]:  # fewer layers than that: in no file
            store[key] = place(key, np.full(spec.shape, spec.init == "ones", dtype))
    for key in dict.fromkeys(key for key, _ in names.values()):
        made = absent(key) if absent else None
        if made is None:
            problems += [f"missing    {name}" for name, (k, _) in names.items() if k == key]
        else:
            store[key] = place(key, np.asarray(made, dtype))
    if problems:
        raise DataError(listing(f"{files[0].parent}: weights do not fit the model", problems))
    return {k: store[k] for k in table if k in store}


def place_tree(place: Place, key: str, weight: Any) -> Any:
    """A quantized weight whose arrays `place` has put where they belong, each by its own path below `key`."""
    return jax.tree_util.tree_map_with_path(lambda path, x: place(f"{key}/{path_of(path)}", x), weight)


def _fill(out: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Copies `value` into `out`; a transposed matrix strip by strip, which is three times as fast as all at once."""
    strip = 32 if value.ndim == 2 and not value.flags.c_contiguous else 0
    if not strip:
        out[...] = value
        return out
    for i in range(0, value.shape[1], strip):
        out[:, i : i + strip] = value[:, i : i + strip]
    return out


def _checked(name: str, value: np.ndarray, spec: ParamSpec) -> tuple[np.ndarray, str | None]:
    """The tensor in our layout, or the line that says why not."""
    if value.shape != spec.file_shape:
        return value, f"misshapen  {name} {list(value.shape)}, the model has {list(spec.file_shape)}"
    if not np.isfinite(value.astype(np.float32) if value.dtype.itemsize < 4 else value).all():
        return value, f"non-finite {name} holds NaN or infinity"
    return spec.from_file(value), None


def to_file_tensors(table: Table, params: Store) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters under their names and in the layout of the file, one at a time.

    Raises:
      ConfigError: the store holds adapters or taps, which a plain model folder cannot express.
    """
    params = join(params)
    foreign = [k for k, v in params.items() if k not in table or table[k].kind == "site" or isinstance(v, Weight)]
    if foreign:
        raise ConfigError(
            f"the parameters hold adapters ({foreign[0]} ...): call ftjax.merge first, or save the adapter"
        )
    for key, value in params.items():
        spec, r = table[key], ranged(key)
        value = np.asarray(jax.device_get(value))
        for layer in range(max(r.start, spec.since), r.stop) if r else (None,):
            one = value if layer is None else value[layer]
            yield spec.hf.format(layer), np.ascontiguousarray(spec.to_file(one))
