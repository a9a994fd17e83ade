"""LoftQ: LoRA begins as what quantization took away (Li et al. 2023, arXiv:2310.08659, Algorithm 1).

Q_t = quantize(W - s A_{t-1} B_{t-1}),   s A_t B_t = the r largest singular parts of W - Q_t,   A_0 B_0 = 0,   t = 1 .. T

    model=Pretrained(path="my/llama", quantize=NF4()), peft=LoRA(rank=16, start="loftq", loftq_iterations=1)

Both are decided while the plain weight is at hand, as the base is read: `LoftQ` is the storage that does so, one layer at a
time. With T = 1 the base is the one that it would be anyway; with more it is the method's own, and belongs to the adapter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ftjax.errors import ConfigError
from ftjax.params import ParamSpec, Table, ranged, spec_of, unranged
from ftjax.peft.lora_start import pissa
from ftjax.quant.base import Quantized, Storage, pack


@struct.dataclass
class LoftQWeight(Quantized):
    """A quantized kernel and the start of its update, which `LoRA.init` takes and `settled` leaves away.

    Attributes:
      held: Q, of another storage.
      a: [(layers,) in, r] float32.
      b: [(layers,) r, out] float32; a b is the best approximation of W - Q.
    """

    held: Any
    a: jax.Array
    b: jax.Array

    @property
    def sides(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Quantized`."""
        return self.held.sides

    @property
    def dtype(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Quantized`."""
        return self.held.dtype

    @property
    def layers(self) -> int:
        """See `Quantized`."""
        return self.held.layers

    def kernel(self) -> jax.Array:
        """See `Quantized`: that of Q."""
        return self.held.kernel()

    def settled(self) -> Any:
        """What remains of it once the update has begun."""
        return self.held


class LoftQ(Storage):
    """A storage under which LoRA's start is found as kernels are read; made by ``LoRA.storage``.

    Attributes:
      storage: what holds the kernels.
      method: the LoRA.
      ranks: ((key without layers, layer), rank) of every target; filled in by `fit`.
    """

    storage: Any
    method: Any
    ranks: tuple[tuple[tuple[str, int], int], ...] = ()

    def covers(self, key: str, spec: ParamSpec) -> bool:
        """As the storage."""
        return self.storage.covers(key, spec)

    def fit(self, table: Table) -> LoftQ:
        """With the ranks of the targets in one model.

        Raises:
          ConfigError: a target is not quantized, so that nothing was taken away from it.
        """
        storage, found = self.storage.fit(table), {}
        for key, (rank, _) in self.method.sizes(table).items():
            r = ranged(key)
            if r is None or not storage.covers(key, spec_of(table, key)):
                raise ConfigError(f"{refusal(self.method)}: {unranged(key)} is not quantized")
            found |= {(unranged(key), layer): rank for layer in range(r.start, r.stop)}
        return LoftQ(storage=storage, method=self.method, ranks=tuple(found.items()))

    def encode(self, w: np.ndarray, key: str = "", layer: int = 0) -> Any:
        """Q, and the start of the update if the kernel is a target; zeros in a layer without one, so that layers stack."""
        ranks = dict(self.ranks)
        width = max((rank for (name, _), rank in ranks.items() if name == unranged(key)), default=0)
        if not width:
            return self.storage.encode(w, key, layer)
        turns = self.method.loftq_iterations if (unranged(key), layer) in ranks else 0
        return _alternate(self.storage, jnp.asarray(np.ascontiguousarray(w), jnp.float32), str(w.dtype), width, turns)


def _alternate(storage: Storage, w: jax.Array, dtype: str, rank: int, turns: int) -> LoftQWeight:
    """Algorithm 1 on one kernel [in, out]; without a turn, the kernel quantized and an update of zero."""
    a, b = jnp.zeros((w.shape[0], rank), jnp.float32), jnp.zeros((rank, w.shape[1]), jnp.float32)
    held = pack(storage, w, dtype)
    for turn in range(turns):
        held = pack(storage, w - a @ b, dtype) if turn else held
        a, b = _largest_parts(w, held, rank)
    return LoftQWeight(held, a, b)


@partial(jax.jit, static_argnums=2)
def _largest_parts(w: jax.Array, held: Quantized, rank: int) -> tuple[jax.Array, jax.Array]:
    return pissa(w - held.kernel(), rank, 1.0)


def refusal(method: Any) -> str:
    """How a sentence begins that refuses this start."""
    return f"peft.start={method.start!r} begins as what quantization takes away (model.quantize=nf4, int8, fp8)"


def start(method: Any, key: str, base: Any, scale: float) -> tuple[jax.Array, jax.Array]:
    """(A, B) with s A B as found when the base was read.

    Raises:
      ConfigError: the base was not read under this method.
    """
    if not isinstance(base, LoftQWeight):
        raise ConfigError(
            f"{refusal(method)}: {unranged(key)} was not loaded for it. As a library, load the base with "
            "quantize=method.storage(NF4()); peft=combine cannot begin so"
        )
    return base.a / scale**0.5, base.b / scale**0.5
