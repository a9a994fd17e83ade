"""A base held in few bits: weights that dequantize where they multiply (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, eq. 5).

    y = x dequantize(W),   dL/dx = dL/dy dequantize(W)^T,   no dL/dW

`Quantized` is such a weight, `Storage` the config object that makes them as a model is loaded. Any overlay lies on top:

    model=Pretrained(path="my/llama", quantize=NF4())        # on the command line: model.quantize=nf4
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import ConfigError
from ftjax.params import ParamSpec, Store, Table, ranged, unranged
from ftjax.schema import Component
from ftjax.tree import nbytes


class Quantized:
    """A `Weight` in few bits, a flax struct: subclasses give the arrays (all lead with [layers] when stacked).

    Attributes:
      sides: (in, out) of one kernel; not an array.
      dtype: name of the dtype that the kernel would have as a plain array, and has once merged; not an array.
    """

    sides: tuple[int, int]
    dtype: str

    def kernel(self) -> jax.Array:
        """One kernel [in, out], float32. Only called on a single layer."""
        raise NotImplementedError

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of each array, for its sharding."""
        raise NotImplementedError

    def dot(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out] in x's dtype."""
        y = product(x, self)
        return y if bias is None else y + bias.astype(y.dtype)

    def materialize(self) -> jax.Array:
        """The kernel [(layers,) in, out] in float32."""
        return jax.vmap(type(self).kernel)(self) if self.layers else self.kernel()

    @property
    def layers(self) -> int:
        """Layers of a stack; 0 for a single kernel."""
        raise NotImplementedError

    @property
    def entries(self) -> int:
        """Numbers that this stands for."""
        return max(self.layers, 1) * self.sides[0] * self.sides[1]


@jax.custom_vjp
def product(x: jax.Array, w: Any) -> jax.Array:
    """x [..., in] times a quantized kernel, dequantized here and again for the gradient: what waits in between is packed."""
    return x @ w.kernel().astype(x.dtype)


def _forward(x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    return product(x, w), w


def _backward(w: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    # The barrier ties this dequantization to dy. Without it, where layers are unrolled, the compiler sees the same
    # expression twice, computes it once, and keeps every layer's kernel from the forward pass to the backward one.
    w, dy = jax.lax.optimization_barrier((w, dy))
    return dy @ w.kernel().astype(dy.dtype).T, None


product.defvjp(_forward, _backward)


class Storage(Component):
    """How kernels of the base are held; registered under "quant"."""

    packs: ClassVar[bool] = True
    """Whether anything is quantized at all."""

    def covers(self, key: str, spec: ParamSpec) -> bool:
        """Whether a parameter is quantized: kernels of the blocks. Embeddings, norms, biases and heads stay."""
        return self.packs and spec.kind == "kernel" and ranged(key) is not None and len(spec.unstacked.shape) == 2

    def fit(self, table: Table) -> Storage:
        """This storage for one model, asked once before its kernels come.

        Raises:
          ConfigError: it has no kernel of a block, as a network of convolutions: a setting that does nothing would pass for
            one that saves memory.
        """
        if self.packs and not any(self.covers(k, s) for k, s in table.items()):
            kinds = sorted({s.kind for s in table.values() if len(s.unstacked.shape) > 1 and s.kind != "site"})
            raise ConfigError(
                f"model.quantize={getattr(self, 'name', '')} holds the linear kernels of stacked blocks in few bits, and the "
                f"model has none (its arrays are of kind {', '.join(kinds)}): set model.quantize=none"
            )
        return self

    def pack(self, w: jax.Array, dtype: str) -> Any:
        """One kernel [in, out] as a `Quantized` weight; `dtype` is that of the plain kernel. Pure, for `jax.jit`."""
        raise NotImplementedError

    def encode(self, w: np.ndarray, key: str = "", layer: int = 0) -> Any:
        """`pack` of a host array, which is not kept: the kernel of one layer of a store key, where that matters."""
        return pack(self, jnp.asarray(np.ascontiguousarray(w), jnp.float32), str(w.dtype))


@partial(jax.jit, static_argnums=(0, 2))
def pack(storage: Storage, w: jax.Array, dtype: str) -> Any:
    """``storage.pack``, compiled once per storage and shape."""
    return storage.pack(w, dtype)


def stacked(layers: Mapping[int, Any]) -> Any:
    """The weights of single layers, by number, as one stack."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *(layers[i] for i in sorted(layers)))


def pack_store(storage: Storage, params: Mapping[str, Any], table: Table) -> Store:
    """A store with its covered kernels quantized."""

    def every(w: jax.Array) -> Any:
        return jax.jit(jax.vmap(lambda one: storage.pack(one.astype(jnp.float32), str(w.dtype))))(w)

    return {k: every(v) if storage.covers(k, table[k]) else v for k, v in params.items()}


def unpack_store(params: Mapping[str, Any]) -> Store:
    """The inverse, as far as there is one: plain arrays in the dtype that they came from."""
    return {k: v.materialize().astype(v.dtype) if isinstance(v, Quantized) else v for k, v in params.items()}


def bits_per_parameter(params: Mapping[str, Any]) -> float:
    """Bits per number of the quantized weights of a store; shapes are enough. 0 where there are none."""
    packed = [v for v in params.values() if isinstance(v, Quantized)]
    return 8 * nbytes(packed) / max(sum(v.entries for v in packed), 1)


def refuse_trained(keys: Iterable[str], *, method: str = "") -> None:
    """A quantized kernel cannot be trained itself: its codes have no gradient.

    Args:
      keys: trained keys that are quantized.
      method: the setting that trains them, for the text.

    Raises:
      ConfigError: there is one.
    """
    if lines := trained_lines(keys, method=method):
        raise ConfigError(lines[0])


def trained_lines(keys: Iterable[str], *, method: str = "") -> list[str]:
    """The text of `refuse_trained`, if any."""
    names = list(dict.fromkeys(unranged(k) for k in keys))
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [
        f"{method or 'the method'} trains {shown}, which model.quantize holds in few bits without a gradient. "
        "Lay an overlay over them (peft=lora, dora, ia3, ...), train only what stays plain (peft=norms), "
        "or set model.quantize=none"
    ]
