"""Sparse tuning: some entries of each weight, chosen once, are trained (SHiRA: Bhardwaj et al. 2024, arXiv:2406.13175).

y = x (W + D) + b,   D [in, out] zero but for k entries;   k = r (in + out), as many numbers as a LoRA of rank r has

    peft=Sparse(rank=8, targets=("q_proj", "v_proj"))                   # the entries largest in magnitude
    peft=Sparse(share=0.01, choose="random", draw=7)
    peft=Sparse(share=0.005, choose="fisher", fisher_batches=32)        # those that matter most to the data

What is stored are k values and their places. The update is of full rank; it is spread out into a matrix when it multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from ftjax.errors import ConfigError, DataError
from ftjax.ops import dense, materialize
from ftjax.params import ParamSpec, Store, Table, key_of, layer_keys, spec_of, unranged
from ftjax.peft.base import FROZEN, Overlay
from ftjax.peft.interop import PREFIX, Tensors
from ftjax.peft.modules import Module, Targets, per_module
from ftjax.peft.weights import PlainCodec, WeightMethod, lead, wrong_number
from ftjax.registry import register
from ftjax.tree import Rules


@struct.dataclass
class SparseDelta:
    """The update of one weight (arrays lead with [layers] when stacked).

    Attributes:
      values: [k] float32, zero at the start.
      index: [2, k] int32, the input and the output of each; not trained.
      shape: (in, out) of the weight.
    """

    values: jax.Array
    index: jax.Array
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def update(self) -> jax.Array:
        """The values at their places in a matrix of zeros, [in, out] float32 (of a single layer)."""
        return jnp.zeros(self.shape, jnp.float32).at[self.index[0], self.index[1]].add(self.values)

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]. One product where the sum of the weights is exact to x's dtype, else two."""
        if isinstance(base, jax.Array) and base.dtype == x.dtype == jnp.float32:
            return dense(x, base + self.update(), bias)
        return dense(x, base, bias) + x @ self.update().astype(x.dtype)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Whole on every device: the places are spread over all of the weight."""
        first = spec.axes[:-2]
        return {"values": (*first, None), "index": (*first, None, None)}

    def merge(self, base: jax.Array) -> jax.Array:
        """W + D, float32 (a leading dimension allowed)."""
        update = SparseDelta.update
        return base + (jax.vmap(update)(self) if self.values.ndim > 1 else update(self))


class SparseCodec(PlainCodec):
    """PEFT's SHIRA: ``shira_weight`` [k] and ``shira_indices`` [2, k] int32, output before input; k = r (in + out).

    PEFT has it for torch's Linear alone; adapters of GPT-2's fused weights open here only.
    """

    peft_type = "SHIRA"
    LACKS = ("layers_to_transform", "layers_pattern")
    READ = ("r", "mask_type", "random_seed", "init_weights")

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`; how the entries were chosen does not matter, the file has them."""
        return super().refuse(config) + wrong_number(config, "r", whole=True)

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`; where the numbers of entries fit no common r, zeros at other places are added.

        Raises:
          ConfigError: there is no r for which a weight has enough entries.
        """
        settings, tensors = super().encode(overlay, table, method)
        entries = per_module(overlay, table)
        rank = max(math.ceil(e.values.shape[-1] / sum(e.shape)) for _, e in entries.values())
        for name, (_, entry) in entries.items():
            tensors |= {f"{PREFIX}{name}.{k}": v for k, v in _filled(name, entry, rank).items()}
        return settings | {"r": rank}, tensors

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """See `ModuleCodec`."""
        k = config["r"] * sum(module.spec.shape)
        return {"shira_weight": (k,), "shira_indices": (2, k)}

    def arrays(self, entry: SparseDelta) -> Tensors:
        """See `ModuleCodec`."""
        return {"shira_weight": np.asarray(entry.values), "shira_indices": np.asarray(entry.index)[::-1]}

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> SparseDelta:
        """See `ModuleCodec`; places may be floats, as PEFT writes them on Windows.

        Raises:
          DataError: a place lies outside the weight.
        """
        shape, given = module.spec.shape, arrays["shira_indices"][::-1]
        index = given.astype(np.int32)
        if (index != given).any() or (index < 0).any() or (index >= np.asarray(shape)[:, None]).any():
            raise DataError(
                f"{PREFIX}{module.name}.shira_indices  has places outside of the weight {list(shape)[::-1]}"
            )
        return SparseDelta(jnp.asarray(arrays["shira_weight"]), jnp.asarray(index), (shape[0], shape[1]))

    def settings(self, method: Sparse, entries: Mapping[str, Any]) -> dict[str, Any]:
        """See `ModuleCodec`; PEFT draws a mask before it reads the places, whatever they were chosen by."""
        return {"mask_type": "random", "random_seed": method.draw, "init_weights": True}

    def method(self, config: Mapping[str, Any], targets: Targets) -> Sparse:
        """See `ModuleCodec`."""
        return Sparse(
            rank=config["r"],
            choose="random",
            draw=config.get("random_seed"),
            targets=targets.unnumbered,
            layers=targets.layers,
        )


def _filled(name: str, entry: SparseDelta, rank: int) -> Tensors:
    """One layer's arrays with zeros at unused places, in their order, up to rank (in + out)."""
    (inner, outer), index = entry.shape, np.asarray(entry.index)
    wanted = rank * (inner + outer)
    if wanted > inner * outer:
        raise ConfigError(
            f"peft=sparse: PEFT keeps r (in + out) entries of a weight, here r = {rank}, and {name} has but "
            f"{inner * outer}: such a file cannot be written. Take a smaller peft.share, or peft.rank"
        )
    free = np.setdiff1d(np.arange(inner * outer), index[1] * inner + index[0])[: wanted - index.shape[1]]
    index = np.concatenate([index[::-1], np.stack([free // inner, free % inner]).astype(np.int32)], 1)
    return {"shira_weight": np.pad(np.asarray(entry.values), (0, len(free))), "shira_indices": index}


@register("peft")
class Sparse(WeightMethod):
    """Some entries of each weight, chosen once."""

    hf_type: ClassVar[str | None] = "SHIRA"
    trained: ClassVar[Mapping[str, str]] = {"values": "sparse"}
    hf_codec: ClassVar[SparseCodec] = SparseCodec()

    name: Literal["sparse"] = "sparse"
    rank: int = Field(8, gt=0, description="As many entries of a weight as a LoRA of this rank has: rank * (in + out).")
    share: float | None = Field(None, gt=0, le=1, description="This share of a weight's entries instead.")
    choose: Literal["magnitude", "random", "fisher"] = Field(
        "magnitude",
        description="The largest entries, drawn ones, or those with the largest empirical Fisher information.",
    )
    fisher_batches: int = Field(16, gt=0, description="fisher: training batches that it is estimated from.")
    draw: int | None = Field(None, description="Seed of drawn entries; by default the run's.")

    def labels(self, table: Table) -> Rules:
        """The places count as frozen: they never change."""
        return [("overlay/*/index", FROZEN), *super().labels(table)]

    @property
    def batches_for_start(self) -> int:
        """Training batches whose squared gradients `init` asks for (see `ftjax.train.fisher`)."""
        return self.fisher_batches if self.choose == "fisher" else 0

    def init(self, key: jax.Array, table: Table, params: Store, squares: Store | None = None) -> Overlay:
        """See `WeightMethod`; `squares` are the mean squared gradients of the weights, by store key.

        Raises:
          ConfigError: they are asked for and not given.
        """
        if self.batches_for_start and squares is None:
            raise ConfigError(
                "peft.choose=fisher needs gradients of a run's data: as a library, give init(squares=...)"
            )
        return super().init(key, table, params if squares is None else squares)

    def delta(self, key: jax.Array, path: str, spec: ParamSpec, base: Any) -> SparseDelta:
        """Zeros at the chosen places.

        Raises:
          ConfigError: the weight has fewer entries than asked for.
        """
        k = self.count(unranged(path), spec)
        index = CHOICES[self.choose](self, key, path, spec, base, k)
        return SparseDelta(jnp.zeros((*lead(spec), k), jnp.float32), index, _sides(spec))

    def keys(self, table: Table) -> list[str]:
        """See `WeightMethod`; checks the numbers of entries too."""
        keys = super().keys(table)
        for key in keys:
            self.count(unranged(key), spec_of(table, key))
        return keys

    def count(self, path: str, spec: ParamSpec) -> int:
        """How many entries of a weight are trained."""
        inner, outer = _sides(spec)
        k = self.rank * (inner + outer) if self.share is None else max(1, round(self.share * inner * outer))
        if k > inner * outer:
            raise ConfigError(f"peft.rank={self.rank}: {k} entries are more than the {inner * outer} of {path}")
        return k


def _sides(spec: ParamSpec) -> tuple[int, int]:
    inner, outer = spec.unstacked.shape
    return inner, outer


def _places(flat: jax.Array, inner: int) -> jax.Array:
    """Numbers of entries in [out, in], as torch counts them, in order: [2, k] int32, the input first."""
    flat = jnp.sort(flat).astype(jnp.int32)
    return jnp.stack([flat % inner, flat // inner])


def _largest(method: Sparse, key: jax.Array, path: str, spec: ParamSpec, base: Any, k: int) -> jax.Array:
    """The k entries of a layer that are largest, of its weights or of their squared gradients."""

    def one(w: jax.Array) -> jax.Array:
        return _places(jax.lax.top_k(jnp.abs(w.T).reshape(-1), k)[1], w.shape[0])

    w = materialize(base)
    return jax.lax.map(one, w) if spec.stacked else one(w)


def _random(method: Sparse, key: jax.Array, path: str, spec: ParamSpec, base: Any, k: int) -> jax.Array:
    """k entries, per layer by its absolute number, each as likely as any other."""
    inner, outer = _sides(spec)

    def one(key: jax.Array) -> jax.Array:
        return _places(jax.random.permutation(key, inner * outer)[:k], inner)

    key = key if method.draw is None else key_of(jax.random.key(method.draw), unranged(path))
    keys = layer_keys(key, path)
    return jax.lax.map(one, keys) if spec.stacked else one(keys)


CHOICES = {"magnitude": _largest, "random": _random, "fisher": _largest}
