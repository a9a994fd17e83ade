"""A table's parameters and the tensors of safetensors files: names, layouts, checks; reading and giving them one at a time.

    params = load_table(model.table, [Path("model.safetensors")], dtype=jnp.dtype("float32"))
    for name, array in to_file_tensors(model.table, params): ...

Tensors are read one at a time and placed where the table says; a stack of layers is filled in place, so that the host
holds little beyond the parameters themselves. Names, shapes and completeness are checked against the table; nothing is
loaded in part.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from ftjax.errors import ConfigError, DataError, listing
from ftjax.models.folder import stream
from ftjax.ops import Weight
from ftjax.params import ParamSpec, Store, Table, in_file, join
from ftjax.quant.base import Storage, stacked
from ftjax.tree import path_of


def file_names(table: Table) -> dict[str, tuple[str, int | None]]:
    """Names in the file -> (store key, layer or None)."""
    names: dict[str, tuple[str, int | None]] = {}
    for key, spec in table.items():
        if spec.kind == "site":
            continue
        for layer, name in in_file(key, spec):
            names[name] = (key, layer)
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
    storage = storage and storage.fit(table)
    # What is filled here is given away for good: the device may keep the very memory (the CPU does, where it is aligned).
    place = place or (lambda _, x: jax.device_put(x, may_alias=True))
    problems: list[str] = []
    with _Filling(table, names, dtype, place, storage) as filling:
        for written, tensor in stream(files):
            name = rename(written)
            if name not in names:
                if not ignore(name):
                    problems.append(f"extra      {written} {list(tensor().shape)}")
                continue
            key, layer = names.pop(name)
            filling.add(name, key, layer, tensor)
    store, problems = filling.store, problems + filling.problems
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


_LINE = 64  # bytes of a cache line, to which devices want their memory aligned


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that begins at a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + size].view(dtype).reshape(shape)


class _Filling:
    """Gathers tensors into a store: the layers of a stack in one array, copied while the next tensor is read."""

    def __init__(
        self, table: Table, names: dict[str, tuple[str, int | None]], dtype: Any, place: Place, storage: Storage | None
    ) -> None:
        self.store: Store = {}
        self.problems: list[str] = []
        self._table, self._dtype, self._place, self._storage = table, dtype, place, storage
        self._left = Counter(key for key, _ in names.values())
        self._host: dict[str, np.ndarray] = {}
        self._packed: dict[str, dict[int, Any]] = {}
        self._threads = min(os.cpu_count() or 1, 4)
        self._pool = ThreadPoolExecutor(self._threads)
        self._pending: deque[Future[str | None]] = deque()

    def add(self, name: str, key: str, layer: int | None, tensor: Callable[[], np.ndarray]) -> None:
        """One tensor, called `name` in the file: of a layer, or of a parameter outside the stacks."""
        spec = self._table[key]
        self._left[key] -= 1
        if layer is not None and self._storage is not None and self._storage.covers(key, spec):
            self._pack(name, key, layer, tensor)
            return
        if key not in self._host:
            self._host[key] = _empty(spec.shape, self._dtype)
            if spec.stacked:
                self._host[key][: spec.since] = spec.init == "ones"
        if len(self._pending) >= self._threads:
            self._wait(1)
        out = self._host[key] if layer is None else self._host[key][layer]
        self._pending.append(self._pool.submit(_take, name, tensor, spec, out))
        if not self._left[key]:
            self._wait(len(self._pending))
            self.store[key] = self._place(key, self._host.pop(key))

    def _wait(self, n: int) -> None:
        """Until the first n of what is under way are done."""
        for _ in range(n):
            problem = self._pending.popleft().result()
            self.problems += [problem] if problem else []

    def _pack(self, name: str, key: str, layer: int, tensor: Callable[[], np.ndarray]) -> None:
        """A layer's kernel, quantized."""
        assert self._storage is not None
        value = _empty(self._table[key].unstacked.shape, self._dtype)
        if problem := _take(name, tensor, self._table[key], value):
            self.problems.append(problem)
            return
        self._packed.setdefault(key, {})[layer] = self._storage.encode(value, key, layer)
        if not self._left[key]:
            self.store[key] = place_tree(self._place, key, stacked(self._packed.pop(key)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _take(name: str, tensor: Callable[[], np.ndarray], spec: ParamSpec, out: np.ndarray) -> str | None:
    """Reads, checks and copies one tensor; the line that says what is wrong with it, if anything."""
    value, problem = _checked(name, tensor(), spec)
    if problem is None:
        _fill(out, value)
    return problem


def _fill(out: np.ndarray, value: np.ndarray) -> None:
    """Copies `value` into `out`; a transposed matrix in strips of a cache line, several times as fast as all at once."""
    strip = _LINE // out.dtype.itemsize if value.ndim == 2 and not value.flags.c_contiguous else 0
    if not strip:
        out[...] = value
        return
    for i in range(0, value.shape[1], strip):
        out[:, i : i + strip] = value[:, i : i + strip]


def _checked(name: str, value: np.ndarray, spec: ParamSpec) -> tuple[np.ndarray, str | None]:
    """The tensor in our layout, or the line that says why not."""
    if value.shape != spec.file_shape:
        return value, f"misshapen  {name} {list(value.shape)}, the model has {list(spec.file_shape)}"
    if not _finite(value):
        return value, f"non-finite {name} holds NaN or infinity"
    return spec.from_file(value), None


def _finite(value: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite. A finite sum says so at once; one that overflows does not say the contrary."""
    with np.errstate(all="ignore"):
        wide = value if value.dtype.itemsize >= 4 else value.astype(np.float32)
        return bool(np.isfinite(wide.sum())) or bool(np.isfinite(wide).all())


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
        spec = table[key]
        value = np.asarray(jax.device_get(value))
        for layer, name in in_file(key, spec):
            one = value if layer is None else value[layer]
            yield name, np.ascontiguousarray(spec.to_file(one))
