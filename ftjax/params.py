"""Parameters as data: every weight of a model is declared once, in a table, and everything else follows from it.

A Flax module reads each parameter through `leaf`. While the table is built (`declare`) it records a `ParamSpec`;
afterwards it returns whatever is bound at that place: an array, a quantized weight, a weight with an adapter. Initial
values, shardings, file names, adapter targets and the parameter report all come from the table.

    table = {**stack(declare(Block(cfg), h, seq), n_layers), "embed/w": ParamSpec(...)}
    params = init_params(table, jax.random.key(0), dtype=jnp.float32)     # {"layers[0:4]/q/w": [4, in, out], ...}

A store is a flat dict. The key of a stacked parameter carries its layer range, so that `cut` and `join` move the borders
between separately treated layers without touching anything else.
"""

from __future__ import annotations

import dataclasses as dc
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

Kind = Literal["kernel", "conv", "bias", "norm", "embed", "stat", "site"]
Store = dict[str, Any]


@dc.dataclass(frozen=True)
class ParamSpec:
    """What is known of one parameter, or of one site where an overlay may tap a value.

    Attributes:
      shape: as held here; kernels are [in, out], stacked ones [layer, in, out]. For a site: the trailing shape.
      axes: logical axis names, one per dimension; shardings are derived from them.
      kind: decides weight decay, adapter targets and the parameter groups. A "stat" is running state (BatchNorm), never
        trained by gradients.
      init: "zeros", "ones" or "normal".
      std: standard deviation for "normal".
      hf: name in a Hugging Face checkpoint, with ``{}`` for the layer number.
      transposed: whether the file holds [out, in] (torch's Linear) rather than [in, out]; of a convolution's kernel,
        [out, in, height, width] rather than [height, width, in, out].
      since: the first layer that has this parameter in the file; those before it hold zeros or ones, which nothing uses.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kind: Kind = "kernel"
    init: Literal["zeros", "ones", "normal"] = "normal"
    std: float = 0.02
    hf: str = ""
    transposed: bool = False
    since: int = 0

    @property
    def stacked(self) -> bool:
        """Whether the first dimension counts layers."""
        return self.axes[:1] == ("layer",)

    @property
    def unstacked(self) -> ParamSpec:
        """The same parameter in a single layer."""
        return dc.replace(self, shape=self.shape[1:], axes=self.axes[1:]) if self.stacked else self

    @property
    def to_file_axes(self) -> tuple[int, ...]:
        """Order of our dimensions (of a single layer) in the file."""
        n = len(self.unstacked.shape)
        return ((3, 2, 0, 1) if n == 4 else tuple(range(n))[::-1]) if self.transposed else tuple(range(n))

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of a single layer in the file."""
        return tuple(self.unstacked.shape[i] for i in self.to_file_axes)

    def from_file(self, value: np.ndarray) -> np.ndarray:
        """A tensor of the file as it is held here."""
        return value.transpose(np.argsort(self.to_file_axes)) if self.transposed else value

    def to_file(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `from_file`."""
        return value.transpose(self.to_file_axes) if self.transposed else value


Table = dict[str, ParamSpec]


def in_file(key: str, spec: ParamSpec) -> Iterator[tuple[int | None, str]]:
    """(layer, name in the file) of each layer that a key stands for and that the file has; (None, name) of a single one."""
    r = ranged(key)
    layers = (None,) if r is None else range(max(r.start, spec.since), r.stop)
    return ((layer, spec.hf.format(layer)) for layer in layers)


@struct.dataclass
class _Declared:
    value: Any
    spec: ParamSpec = struct.field(pytree_node=False)


def leaf(module: nn.Module, name: str, spec: ParamSpec) -> Any:
    """The leaf bound at this place of a module; declares `spec` while the table is built."""
    if module.is_initializing():
        return module.param(name, lambda _: _Declared(jnp.zeros(spec.shape), spec)).value
    return module.get_variable("params", name)


def site(module: nn.Module, name: str, value: Any, seq: Any, spec: ParamSpec, **around: Any) -> Any:
    """`value`, or what the tap bound at this site makes of it (same type and shape out).

    Args:
      module: the block.
      name: of the site.
      value: what the tap may change.
      seq: the batch.
      spec: the site in the table.
      around: what the tap may look at. At a part's output: `residual`, the stream that the output will be added to, and
        `norm`, what follows that addition (left out where nothing does). At keys and values: `hidden`, the present tokens'
        values [B, T, D] that the projections read.
    """
    if module.is_initializing():
        module.param(name, lambda _: _Declared(jnp.zeros(spec.shape), spec))
        return value
    tap = module.get_variable("params", name)
    return value if tap is None else tap(value, seq, **around)


def declare(module: nn.Module, *args: Any) -> Table:
    """The table of a module: runs it abstractly (no memory, no compute) and collects what `leaf` and `site` declare."""
    variables = jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a), *args).get("params", {})
    flat = jax.tree_util.tree_flatten_with_path(variables, is_leaf=lambda x: isinstance(x, _Declared))[0]
    return {"/".join(k.key for k in path): d.spec for path, d in flat}


def stack(table: Table, n: int, name: str = "layers") -> Table:
    """The table of `n` equal layers: a leading layer dimension, keys ``layers[0:n]/...``."""
    return {f"{name}[0:{n}]/{k}": dc.replace(s, shape=(n, *s.shape), axes=("layer", *s.axes)) for k, s in table.items()}


# Keys with layer ranges ------------------------------------------------------------------------------------------------

_RANGED = re.compile(r"^(\w+)\[(\d+):(\d+)\]/(.*)$")


@dc.dataclass(frozen=True)
class Ranged:
    """A stacked key taken apart: ``layers[0:4]/q/w`` is stack "layers", start 0, stop 4, rest "q/w"."""

    stack: str
    start: int
    stop: int
    rest: str

    def __str__(self) -> str:
        return f"{self.stack}[{self.start}:{self.stop}]/{self.rest}"


def ranged(key: str) -> Ranged | None:
    """The parts of a stacked key; None for a parameter outside the stacks."""
    m = _RANGED.match(key)
    return Ranged(m[1], int(m[2]), int(m[3]), m[4]) if m else None


def unranged(key: str) -> str:
    """The key without its layer range: one name for all layers, e.g. ``layers/q/w``."""
    r = ranged(key)
    return f"{r.stack}/{r.rest}" if r else key


def bounds(*stores: Iterable[str]) -> dict[str, set[int]]:
    """All layer borders that occur in the keys, by stack."""
    found: dict[str, set[int]] = {}
    for store in stores:
        for key in store:
            if r := ranged(key):
                found.setdefault(r.stack, set()).update((r.start, r.stop))
    return found


def cut(store: Mapping[str, Any], at: Mapping[str, Iterable[int]]) -> Store:
    """The same store with its stacks split at the given layer borders. Outside jit only: inside, it would copy."""
    out: Store = {}
    for key, value in store.items():
        r = ranged(key)
        if r is None:
            out[key] = value
            continue
        points = sorted({r.start, r.stop, *(x for x in at.get(r.stack, ()) if r.start < x < r.stop)})
        for lo, hi in zip(points, points[1:], strict=False):
            whole = (lo, hi) == (r.start, r.stop)
            out[str(dc.replace(r, start=lo, stop=hi))] = value if whole else _layers(value, lo - r.start, hi - r.start)
    return out


def _layers(value: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda x: x[start:stop], value)


def join(store: Mapping[str, Any]) -> Store:
    """The inverse of `cut`: adjoining ranges become one stack again (for saving and export)."""
    out: Store = {}
    groups: dict[tuple[str, str], list[tuple[Ranged, Any]]] = {}
    for key, value in store.items():
        if r := ranged(key):
            groups.setdefault((r.stack, r.rest), []).append((r, value))
        else:
            out[key] = value
    for parts in groups.values():
        parts.sort(key=lambda p: p[0].start)
        run = [parts[0]]
        for part in parts[1:]:
            same = jax.tree.structure(part[1]) == jax.tree.structure(run[-1][1])
            if part[0].start == run[-1][0].stop and same:
                run.append(part)
            else:
                _emit(out, run)
                run = [part]
        _emit(out, run)
    return out


def _emit(out: Store, run: list[tuple[Ranged, Any]]) -> None:
    first, last = run[0][0], run[-1][0]
    values = [v for _, v in run]
    joined = values[0] if len(values) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *values)
    out[str(dc.replace(first, stop=last.stop))] = joined


def nest(store: Mapping[str, Any]) -> dict[str, Any]:
    """What the modules read: nested dicts, and for each stack a tuple of segments in layer order."""
    out: dict[str, Any] = {}
    segments: dict[tuple[str, int], dict[str, Any]] = {}
    for key, value in store.items():
        r = ranged(key)
        node = segments.setdefault((r.stack, r.start), {}) if r else out
        *heads, last = (r.rest if r else key).split("/")
        for head in heads:
            node = node.setdefault(head, {})
        node[last] = value
    for (name, _), segment in sorted(segments.items(), key=lambda item: item[0]):
        out[name] = (*out.get(name, ()), segment)
    return out


def spec_of(table: Table, key: str) -> ParamSpec:
    """The spec of a key that may have been cut: the layer dimension follows the key's own range.

    Raises:
      KeyError: the key is not in the table.
    """
    if key in table:
        return table[key]
    r = ranged(key)
    if r:
        for name, spec in table.items():
            whole = ranged(name)
            if (
                whole
                and (whole.stack, whole.rest) == (r.stack, r.rest)
                and whole.start <= r.start < r.stop <= whole.stop
            ):
                return dc.replace(spec, shape=(r.stop - r.start, *spec.shape[1:]))
    raise KeyError(key)


# Initial values --------------------------------------------------------------------------------------------------------


def key_of(rng: jax.Array, path: str) -> jax.Array:
    """A key that depends on the path alone: adding a parameter does not change another's initial values."""
    return jax.random.fold_in(rng, zlib.crc32(path.encode()))


def layer_keys(rng: jax.Array, key: str) -> jax.Array:
    """One key per layer of a stacked store key ([layers]), by absolute layer number, so that cuts do not move them."""
    r = ranged(key)
    rng = key_of(rng, unranged(key))
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(r.start, r.stop)) if r else rng


def init_leaf(rng: jax.Array, key: str, spec: ParamSpec, dtype: Any) -> jax.Array:
    """Initial value of one parameter (all layers of it), drawn in float32."""
    if spec.init != "normal":
        return (jnp.zeros if spec.init == "zeros" else jnp.ones)(spec.shape, dtype)

    def draw(k: jax.Array) -> jax.Array:
        return spec.std * jax.random.normal(k, spec.unstacked.shape, jnp.float32)

    keys = layer_keys(rng, key)
    return (jax.vmap(draw)(keys) if spec.stacked else draw(keys)).astype(dtype)


def init_params(table: Table, rng: jax.Array, *, dtype: Any) -> Store:
    """Initial values of every parameter of a table, keyed by path and layer."""
    return {k: init_leaf(rng, k, s, dtype) for k, s in table.items() if s.kind != "site"}
