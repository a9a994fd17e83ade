"""Several LoRAs into one: sums, joined ranks, SVD, TIES (Yadav et al. 2023, arXiv:2306.01708), DARE (arXiv:2311.03099).

cat:     A = [w_1 s_1 A_1  w_2 s_2 A_2 ...],   B = [B_1; B_2; ...]               (exact)
svd:     A B = the best approximation of rank r to  sum_i w_i s_i A_i B_i
linear:  A = sum_i sign(w_i) sqrt(|w_i| s_i) A_i,   B = sum_i sqrt(|w_i| s_i) B_i
ties:    as linear, of entries pruned by magnitude; each entry the mean over the adapters that agree with its elected sign

    file = merge_adapters(load_adapters(model, params, {"a": dir_a, "b": dir_b}), {"a": 0.7, "b": 0.3}, how="svd")

The results are those of `add_weighted_adapter` in PEFT 0.21, where ``<how>_svd`` treats whole updates A B as ``<how>`` treats
A and B. What DARE drops is drawn from the seed.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from ftjax.errors import ConfigError, did_you_mean
from ftjax.params import Table, bounds, cut, key_of, layer_keys
from ftjax.peft.adapters import Adapters, is_lora
from ftjax.peft.base import Overlay
from ftjax.peft.interop import AdapterFile
from ftjax.peft.lora import LoRA, LoRADelta
from ftjax.peft.modules import modules_of, per_module, targets_of

Majority = Literal["total", "frequency"]


@dc.dataclass(frozen=True)
class Pruning:
    """What a way of merging takes beside arrays and weights: the share of entries kept, the vote, the keys of DARE's draws."""

    density: float
    majority: Majority
    keys: jax.Array


Thin = Callable[[jax.Array, float, jax.Array], jax.Array]


def _all(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
    return x


def _largest(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """The share `density` of the entries that is largest in magnitude, zeros elsewhere."""
    flat = jnp.abs(x).reshape(-1)
    kept = jax.lax.top_k(flat, int(density * flat.size))[1]
    return x * jnp.zeros_like(flat).at[kept].set(1).reshape(x.shape)


def _drawn(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Each entry with probability `density`, scaled so that its mean stays."""
    return jnp.where(jax.random.bernoulli(key, density, x.shape), x / density, 0)


def _vote(x: jax.Array, majority: Majority) -> jax.Array:
    """Whether each entry of x [n, ...] has the sign that the n elected."""
    signs = jnp.sign(x)
    ballots = {"total": x, "frequency": signs}[majority]
    return signs == jnp.where(ballots.sum(0) >= 0, 1, -1).astype(x.dtype)


@dc.dataclass(frozen=True)
class Sum:
    """One array of several: thinned, then added by weight, or averaged over those that agree with the elected sign."""

    thin: Thin = _all
    elect: bool = False

    def __call__(self, arrays: Sequence[jax.Array], weights: Sequence[jax.Array], how: Pruning) -> jax.Array:
        """Arrays of one layer and a scalar weight each; the result has their shape."""
        if self.thin is not _all and how.density < 1:
            arrays = [self.thin(x, how.density, jax.random.fold_in(how.keys, i)) for i, x in enumerate(arrays)]
        x = jnp.stack(arrays)
        scaled = x * jnp.stack(weights).reshape(-1, *([1] * (x.ndim - 1)))
        if not self.elect:
            return scaled.sum(0)
        agree = _vote(x, how.majority).astype(x.dtype)
        return (scaled * agree).sum(0) / jnp.maximum(agree.sum(0), 1)


SUMS = {
    "linear": Sum(),
    "ties": Sum(_largest, elect=True),
    "dare_linear": Sum(_drawn),
    "dare_ties": Sum(_drawn, elect=True),
    "magnitude_prune": Sum(_largest),
}
Loras = Sequence[LoRADelta]
Way = Callable[[Loras, Sequence[float], int | None, Pruning], tuple[jax.Array, jax.Array]]


def _factors(combine: Sum) -> Way:
    """A way that treats the As alike and the Bs alike; a negative weight turns A's sign alone."""

    def merged(loras: Loras, weights: Sequence[float], rank: int | None, how: Pruning) -> tuple[jax.Array, jax.Array]:
        roots = [jnp.sqrt(jnp.abs(w * d.scale)) for w, d in zip(weights, loras, strict=True)]
        signed = [root * (1 if w >= 0 else -1) for root, w in zip(roots, weights, strict=True)]
        first, second = (dc.replace(how, keys=jax.random.fold_in(how.keys, side)) for side in range(2))
        return combine([d.a for d in loras], signed, first), combine([d.b for d in loras], roots, second)

    return merged


def _whole(combine: Sum) -> Way:
    """A way that treats whole updates alike and takes the result apart again."""

    def merged(loras: Loras, weights: Sequence[float], rank: int | None, how: Pruning) -> tuple[jax.Array, jax.Array]:
        updates = [d.scale * (d.a @ d.b) for d in loras]
        return low_rank(combine(updates, [jnp.float32(w) for w in weights], how), rank or 1)

    return merged


def _cat(loras: Loras, weights: Sequence[float], rank: int | None, how: Pruning) -> tuple[jax.Array, jax.Array]:
    a = [d.a * (w * d.scale) for w, d in zip(weights, loras, strict=True)]
    return jnp.concatenate(a, -1), jnp.concatenate([d.b for d in loras], -2)


WAYS: dict[str, Way] = {
    **{name: _factors(combine) for name, combine in SUMS.items()},
    "cat": _cat,
    "svd": _whole(SUMS["linear"]),
    **{f"{name}_svd": _whole(combine) for name, combine in SUMS.items() if name not in ("linear",)},
}


def low_rank(update: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """A [in, r] with orthonormal columns and B [r, out], whose product is nearest to update [in, out] (Eckart and Young)."""
    u, s, v = jnp.linalg.svd(update, full_matrices=False)
    return u[:, :rank], s[:rank, None] * v[:rank]


def merge_adapters(
    adapters: Adapters,
    weights: Mapping[str, float],
    how: str = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority: Majority = "total",
    seed: int = 0,
) -> AdapterFile:
    """One LoRA made of several.

    Args:
      adapters: where they are loaded.
      weights: those to merge and their weights, which may be negative and need not sum to 1.
      how: ``linear``, ``cat``, ``svd``, ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``, or one of the last four
        with ``_svd``. Without ``svd`` all but ``cat`` need equal ranks, and mix the factors, which is not the mixed update.
      rank: of the result, for ``svd``; by default the largest of the adapters'.
      density: share of the entries that is kept, above 0 and at most 1, where there is pruning.
      majority: the sign of an entry is that of the sum ("total") or that of most ("frequency").
      seed: of what DARE drops.

    Returns:
      An adapter to save with `save_adapter` or to lay beside others with `load_adapters`.

    Raises:
      ConfigError: no such way; unequal ranks; no density; an adapter that is no LoRA or brings weights of the base.
    """
    way = _checked(adapters, weights, how, density)
    overlays = [adapters.files[name].overlay for name in weights]
    if len(overlays) == 1:
        way = WAYS["linear"]  # as PEFT: there is nothing to vote on or to take apart
    at = bounds(*overlays)
    parts = [cut({k: d.plain() for k, d in overlay.items()}, at) for overlay in overlays]
    if way in [WAYS[name] for name in SUMS] and len(ranks := {d.a.shape[-1] for p in parts for d in p.values()}) > 1:
        raise ConfigError(
            f"how={how!r} adds factors, which needs equal ranks; these have {sorted(ranks)}: use svd or cat"
        )
    largest = max(d.a.shape[-1] for part in parts for d in part.values())
    out: Overlay = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        given = [(d, w) for part, w in zip(parts, weights.values(), strict=True) if (d := part.get(key)) is not None]
        keys = layer_keys(key_of(jax.random.key(seed), "merge"), key)

        def one(loras: Loras, k: jax.Array, ws: tuple[float, ...] = tuple(w for _, w in given)) -> LoRADelta:
            pruning = Pruning(1.0 if density is None else density, majority, k)
            return LoRADelta(*way(loras, ws, rank or largest, pruning), jnp.float32(1))

        loras = [LoRADelta(d.a, d.b, d.scale) for d, _ in given]
        out[key] = (jax.lax.map(lambda x: one(*x), (loras, keys))) if loras[0].scale.ndim else one(loras, keys)
    return lora_file(out, adapters.table, adapters.files[next(iter(weights))].base_path)


def _checked(adapters: Adapters, weights: Mapping[str, float], how: str, density: float | None) -> Way:
    """The way called `how`, if it can be gone with these adapters."""
    if how not in WAYS:
        raise ConfigError(f"no way of merging is called {how!r}.{did_you_mean(how, WAYS)} There are: {', '.join(WAYS)}")
    if not weights:
        raise ConfigError("no adapters to merge")
    for name in weights:
        if name not in adapters.files:
            raise ConfigError(f"no adapter is called {name!r}.{did_you_mean(name, adapters.files)}")
        file = adapters.files[name]
        if not is_lora(file.overlay) or not file.overlay:
            raise ConfigError(f"adapter {name!r} is no LoRA: make it one with to_lora")
        if file.saved:
            raise ConfigError(f"adapter {name!r} brings {next(iter(file.saved))}, which cannot be merged by weight")
    thins = how.removesuffix("_svd") in SUMS and SUMS[how.removesuffix("_svd")].thin is not _all
    if thins and (density is None or not 0 < density <= 1):
        raise ConfigError(f"how={how!r} needs a density above 0 and at most 1, not {density}")
    return WAYS[how]


def lora_file(overlay: Overlay, table: Table, base_path: str) -> AdapterFile:
    """LoRA updates of scale 1 as an adapter that can be saved."""
    modules = {name: module for name, (module, _) in per_module(overlay, table).items()}
    targets, rank = targets_of(modules, modules_of(table)), max(d.a.shape[-1] for d in overlay.values())
    method = LoRA(rank=rank, alpha=float(rank), targets=targets.unnumbered, layers=targets.layers)
    return AdapterFile(method, overlay, base_path)
