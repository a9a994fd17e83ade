"""The XLA implementation: a scan over chunks of time with a custom VJP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Head = Callable[[jax.Array], jax.Array]


@struct.dataclass
class TokenNll:
    """Per token [B, T], float32.

    Attributes:
      nll: differentiable.
      correct: 1 where the target has the largest logit.
      lse: logsumexp of the logits, differentiable; None unless it was asked for.
    """

    nll: jax.Array
    correct: jax.Array
    lse: jax.Array | None = None


def token_nll(
    head: Any, hidden: jax.Array, targets: jax.Array, *, smoothing: jax.Array | float = 0.0, chunk: int = 0,
    lse: bool = False,
) -> TokenNll:  # fmt: skip
    """Negative log-likelihood of `targets` under ``head(hidden)``.

    Args:
      head: a callable pytree [..., D] -> [..., V]; gradients flow to those of its leaves that are differentiated.
      hidden: [B, T, D].
      targets: token ids [B, T].
      smoothing: label smoothing in [0, 1), as transformers' LabelSmoother defines it.
      chunk: largest number of tokens whose logits exist at once; 0 is all of them.
      lse: also give the logsumexp. Under a frozen head its gradient of the hidden values is held beside the other one.
    """
    B, T = targets.shape
    width = T if chunk <= 0 else min(T, max(1, chunk // B))
    leaves, treedef = jax.tree.flatten(head)
    # A plain 0 is known while tracing, and then the pass over the logits that smoothing needs is not there at all.
    smooth = None if isinstance(smoothing, float | int) and smoothing == 0 else jnp.asarray(smoothing, jnp.float32)
    return TokenNll(*_token_nll(treedef, width, lse, leaves, hidden, targets, smooth))


def _chunks(x: jax.Array, width: int) -> jax.Array:
    """[B, T, ...] -> [n, B, width, ...], padded with zeros at the end."""
    B, T = x.shape[:2]
    n = -(-T // width)
    x = jnp.pad(x, ((0, 0), (0, n * width - T), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, n, width, *x.shape[2:]), 1, 0)


def _unchunks(x: jax.Array, T: int) -> jax.Array:
    """The inverse of `_chunks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def over_chunks(fn: Callable[..., Any], width: int, *arrays: jax.Array) -> Any:
    """Maps `fn` over chunks of time; one chunk is called directly."""
    T = arrays[0].shape[1]
    if width >= T:
        return fn(*arrays)
    out = jax.lax.map(lambda xs: fn(*xs), tuple(_chunks(a, width) for a in arrays))
    return jax.tree.map(lambda x: _unchunks(x, T), out)


def _statistics(
    logits: jax.Array, targets: jax.Array, smooth: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(nll, correct, logsumexp) of one chunk, float32."""
    top = logits.max(-1)
    lse = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nll = lse - picked
    if smooth is not None:
        nll = (1 - smooth) * nll + smooth * (lse - logits.mean(-1))
    return nll, (picked >= top).astype(jnp.float32), lse


def _dlogits(p: jax.Array, targets: jax.Array, smooth: jax.Array | None) -> jax.Array:
    """d nll / d logits from the probabilities, which are d lse / d logits."""
    V = p.shape[-1]
    hot = jax.lax.broadcasted_iota(jnp.int32, p.shape, p.ndim - 1) == targets[..., None]
    if smooth is None:
        return p - hot.astype(jnp.float32)
    return p - (1 - smooth) * hot.astype(jnp.float32) - smooth / V


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _token_nll(
    treedef: Any, width: int, lse: bool, leaves: Any, hidden: jax.Array, targets: jax.Array, smooth: Any
) -> Any:
    head = jax.tree.unflatten(treedef, leaves)

    def one(h: jax.Array, t: jax.Array) -> Any:
        return _statistics(head(h).astype(jnp.float32), t, smooth)[: 2 + lse]

    return over_chunks(one, width, hidden, targets)


def _forward(treedef: Any, width: int, lse: bool, leaves: Any, hidden: Any, targets: Any, smooth: Any) -> Any:
    trained = tuple(p.perturbed for p in leaves)
    values = [p.value for p in leaves]
    smooth = None if smooth is None else smooth.value
    head, h, t = jax.tree.unflatten(treedef, values), hidden.value, targets.value
    if any(trained):
        out = _token_nll(treedef, width, lse, values, h, t, smooth)
        return out, (trained, values, h, t, smooth)

    def one(h: jax.Array, t: jax.Array) -> Any:
        logits, pull = jax.vjp(head, h)
        z = logits.astype(jnp.float32)
        found = _statistics(z, t, smooth)
        p = jnp.exp(z - found[2][..., None])
        wanted = [_dlogits(p, t, smooth), *([p] if lse else [])]
        return found[: 2 + lse], tuple(pull(d.astype(logits.dtype))[0] for d in wanted)

    out, dh = over_chunks(one, width, h, t)
    return out, (trained, values, dh, t, smooth)


def _backward(treedef: Any, width: int, lse: bool, residuals: Any, cotangents: Any) -> Any:
    trained, values, h, targets, smooth = residuals
    cts = [_array(ct) for ct in (cotangents[0], *cotangents[2:])]  # of nll, and of lse
    none = [jax.custom_derivatives.zero_from_primal(v) for v in values]
    zero = [jax.custom_derivatives.zero_from_primal(x) if x is not None else None for x in (targets, smooth)]
    if not any(trained):  # h is d nll / d hidden, and d lse / d hidden
        dh: Any = sum(ct[..., None] * d for ct, d in zip(cts, h, strict=True))
        return none, dh.astype(h[0].dtype), *zero
    chosen = [v for v, on in zip(values, trained, strict=True) if on]

    def with_leaves(diff: list[jax.Array], h: jax.Array) -> jax.Array:
        it = iter(diff)
        return jax.tree.unflatten(treedef, [next(it) if on else v for v, on in zip(values, trained, strict=True)])(h)

    def one(h: jax.Array, t: jax.Array, ct: jax.Array, *more: jax.Array) -> Any:
        logits, pull = jax.vjp(with_leaves, chosen, h)
        z = logits.astype(jnp.float32)
        p = jnp.exp(z - jax.nn.logsumexp(z, axis=-1)[..., None])
        dz = _dlogits(p, t, smooth) * ct[..., None]
        for of_lse in more:
            dz = dz + p * of_lse[..., None]
        return pull(dz.astype(logits.dtype))

    T = targets.shape[1]
    if width >= T:
        grads, dh = one(h, targets, *cts)
    else:

        def step(total: Any, xs: Any) -> Any:
            grads, dh = one(*xs)
            return jax.tree.map(jnp.add, total, grads), dh

        xs = tuple(_chunks(x, width) for x in (h, targets, *cts))
        grads, dh = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, chosen), xs)
        dh = _unchunks(dh, T)
    it = iter(grads)
    return [next(it) if on else z for z, on in zip(none, trained, strict=True)], dh, *zero


def _array(ct: Any) -> jax.Array:
    """A cotangent; zeros where nothing depends on the output."""
    return jnp.zeros(ct.shape) if isinstance(ct, jax.custom_derivatives.SymbolicZero) else ct


_token_nll.defvjp(_forward, _backward, symbolic_zeros=True)
