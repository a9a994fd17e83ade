"""Where LoRA's A and B begin: drawn at random, or taken from the weight itself.

drawn       A random, B = 0
pissa       A B s = the r largest singular parts of W (Meng et al. 2024, arXiv:2404.02948, eq. 2-4)
loftq       A B s = the r largest singular parts of what quantizing W takes away; see `ftjax.peft.loftq`
olora       W^T = Q R; A = the first r rows of R, B = the first r columns of Q (Buyukakyuz 2024, arXiv:2406.01775)

    a = DRAWS["gaussian"](key, "layers[0:4]/q/w", spec, rank=8)        # [layers, in, r]
    a, b = from_weight("pissa", w, rank=8, scale=2.0)                  # of w [layers, in, out]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.ops import materialize
from ftjax.params import ParamSpec, key_of, ranged, unranged


def by_column(
    key: jax.Array, path: str, spec: ParamSpec, rank: int, column: Callable[[jax.Array, int], jax.Array]
) -> jax.Array:
    """A from one draw of [in] numbers per column: [(layers,) in, rank].

    Each of the rank's columns has a key of its own: a draw of rank 16 begins with the draw of rank 8, which lets trials
    of unequal rank train as one program by zero padding.
    """

    def layer(k: jax.Array) -> jax.Array:
        return jax.vmap(lambda i: column(jax.random.fold_in(k, i), spec.unstacked.shape[0]))(jnp.arange(rank)).T

    key = key_of(key, unranged(path) + "/lora_a")
    r = ranged(path)
    if r is None:
        return layer(key)
    return jax.vmap(lambda i: layer(jax.random.fold_in(key, i)))(jnp.arange(r.start, r.stop))


def uniform(key: jax.Array, path: str, spec: ParamSpec, rank: int) -> jax.Array:
    """Within 1 / sqrt(in), as PEFT draws by default (kaiming with a = sqrt 5)."""

    def column(k: jax.Array, n: int) -> jax.Array:
        return jax.random.uniform(k, (n,), jnp.float32, -1 / math.sqrt(n), 1 / math.sqrt(n))

    return by_column(key, path, spec, rank, column)


def gaussian(key: jax.Array, path: str, spec: ParamSpec, rank: int) -> jax.Array:
    """Normal with standard deviation 1 / r, as PEFT's "gaussian"."""
    return by_column(key, path, spec, rank, lambda k, n: jax.random.normal(k, (n,), jnp.float32) / rank)


def pissa(w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(A [in, r], B [r, out]) with s A B the best approximation of w [in, out] of that rank, its weight shared evenly."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def olora(w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(A, B) with orthonormal rows in B, whatever the scale, as PEFT has them."""
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


DRAWS = {"uniform": uniform, "gaussian": gaussian}
FROM_WEIGHT = {"pissa": pissa, "olora": olora}
FROM_QUANTIZED = ("loftq",)
"""Found while the base is read, by `ftjax.peft.loftq`."""


def from_weight(name: str, base: Any, rank: int, scale: float, *, stacked: bool) -> tuple[jax.Array, jax.Array]:
    """(A, B) of a base weight in float32, one layer at a time where it is stacked."""

    def one(leaf: Any) -> tuple[jax.Array, jax.Array]:
        return FROM_WEIGHT[name](materialize(leaf), rank, scale)

    return jax.jit(lambda leaf: jax.lax.map(one, leaf) if stacked else one(leaf))(base)
