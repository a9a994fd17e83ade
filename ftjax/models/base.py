"""What every family gives and what every caller uses: `Model`, its head, its output.

    model = Llama(LlamaConfig(...), Numerics())
    out = model.apply(params, {"input_ids": ids, "attention_mask": mask})
    out.logits                                    # float32 [B, T, V], or [B, labels]

A model is a hashable description; parameters are a flat dict that the caller holds (see `ftjax.params`). A family is one
file with a config read from Hugging Face's `config.json` and a `Block`; see `ftjax.models.transformer` for what runs it.
"""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ftjax import ops
from ftjax.errors import ConfigError, did_you_mean
from ftjax.headspec import HeadSpec
from ftjax.kernels.vocab_loss import token_nll
from ftjax.models.layers import Cache, soft_cap
from ftjax.params import Store, Table


@dc.dataclass(frozen=True)
class Numerics:
    """How a model is computed; nothing here changes what it means. See `ftjax.config.Compute` for the fields."""

    dtype: str = "float32"
    layers: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "xla"] = "auto"
    loss_chunk: int = 1024
    batch_norm: Literal["train", "frozen"] = "train"


@dc.dataclass(frozen=True)
class FamilyConfig:
    """Numbers of one model. Families subclass it; a field without a value in the file is an error, never a default."""

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """The numbers in a Hugging Face `config.json`."""
        raise NotImplementedError

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        raise NotImplementedError


@struct.dataclass
class Head:
    """The output projection: `w` [D, V], or the embedding table [V, D] when `tied`; bias `b`; soft limit `cap`."""

    w: Any
    tied: bool = struct.field(pytree_node=False)
    b: Any = None
    cap: float | None = struct.field(pytree_node=False, default=None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., V] in x's dtype."""
        if self.tied:
            y = ops.unembed(x, self.w)
            y = y if self.b is None else y + self.b.astype(x.dtype)
        else:
            y = ops.dense(x, self.w, self.b)
        return y if self.cap is None else soft_cap(y, self.cap)


@struct.dataclass
class Output:
    """What a model returns.

    Attributes:
      hidden: what the head is applied to: last hidden values [B, T, D], or pooled ones [B, D].
      head: the output projection, not yet applied.
      cache: keys and values when decoding.
      mutable: running statistics after this batch, by store key; empty unless the model has any and trains them.
      chunk: tokens whose logits may exist at once.
      layers: hidden values after every layer [L, B, T, D], where they were asked for.
      attentions: scores before the softmax, of the layers that were asked for [P, B, N, T, T]; -1e30 where nothing is seen.
    """

    hidden: jax.Array
    head: Head
    cache: Cache | None = None
    mutable: Store = struct.field(default_factory=dict)
    layers: jax.Array | None = None
    attentions: jax.Array | None = None
    chunk: int = struct.field(pytree_node=False, default=0)

    @property
    def logits(self) -> jax.Array:
        """float32 [B, T, V], or [B, labels] of a pooled head."""
        return self.head(self.hidden).astype(jnp.float32)

    def at(self, columns: jax.Array) -> Output:
        """The same at some places only, [B, K] of T: their logits alone are computed."""
        return dc.replace(self, hidden=jnp.take_along_axis(self.hidden, columns[..., None], axis=1))

    def nll(self, targets: jax.Array, *, smoothing: jax.Array | float = 0.0, lse: bool = False) -> Any:
        """Negative log-likelihood of target ids [B, T] at each place (and their logsumexp), without holding all logits."""
        return token_nll(self.head, self.hidden, targets, smoothing=smoothing, chunk=self.chunk, lse=lse)


@dc.dataclass(frozen=True)
class Model:
    """A family's architecture with its numbers, numerics and head. Hashable: usable as a static argument of `jax.jit`."""

    config: Any
    numerics: Numerics = Numerics()
    head: HeadSpec = HeadSpec()

    family: ClassVar[str]
    """Hugging Face's ``model_type``."""

    Config: ClassVar[type[FamilyConfig]]

    heads: ClassVar[dict[str, str]]
    """Kinds of head that the family has -> transformers' class; the first is what a folder without a class gets."""

    prefix: ClassVar[str] = ""
    """What the names in the file begin with when a head is there (``bert.``); a base alone is saved without it."""

    shared_head: ClassVar[tuple[str, ...]] = ()
    """Patterns of names in the file, of a head, that mean the same in every head: a new one begins with them."""

    reads_apart: ClassVar[bool] = False
    """Whether an encoder reads the prompt, so that an answer does not continue it."""

    unties: ClassVar[bool] = False
    """Whether files say that the head is tied even where they hold another (T5 as transformers 5 saves it)."""

    buffers: ClassVar[tuple[str, ...]] = ()
    """Patterns of names in the file that carry no parameter."""

    def __post_init__(self) -> None:
        if not self.head.kind:
            object.__setattr__(self, "head", dc.replace(self.head, kind=next(iter(self.heads))))
        if self.head.kind not in self.heads:
            raise ConfigError(
                f"{self.family} has no head {self.head.kind!r}.{did_you_mean(self.head.kind, self.heads)} "
                f"Heads: {', '.join(self.heads)}"
            )

    @property
    def always_trained(self) -> tuple[str, ...]:
        """Patterns of store keys that are trained beside any method: a task's head, which is nothing without training."""
        return () if self.head.is_vocabulary else ("head/*",)

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return jnp.dtype(self.numerics.dtype)

    @cached_property
    def table(self) -> Table:
        """Every parameter and site, by path."""
        raise NotImplementedError

    def apply(
        self, params: Store, inputs: dict[str, jax.Array], *, cache: Any = None, first: bool = True, train: bool = False
    ) -> Output:
        """Runs the model on a batch; see the subclass for the inputs."""
        raise NotImplementedError

    def view(self, task: str, params: Store) -> tuple[Model, Store]:
        """The model and parameters of one of several tasks (see `ftjax.models.several`); with one head, the same for all."""
        return self, params

    def constants(self) -> dict[str, np.ndarray]:
        """Tensors that a file has beside the parameters, by name; they carry nothing, but readers miss them."""
        return {}

    def unused(self, name: str) -> bool:
        """Whether a tensor in the file is a copy that this architecture does not use."""
        return False

    def canonical(self, name: str) -> str:
        """A name in the file as the table has it; families with older spellings override this."""
        return name
