"""What every family gives and what every caller uses: `Model`, its output, and decoder-only language models.

    model = Llama(LlamaConfig(...), Numerics())
    out = model.apply(params, {"input_ids": ids, "attention_mask": mask})
    out.logits                                    # float32 [B, T, V]

A model is a hashable description; parameters are a flat dict that the caller holds (see `ftjax.params`). A family is one
file with a config read from Hugging Face's `config.json` and a `Block`; `Decoder` runs the blocks.
"""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ftjax import ops
from ftjax.kernels.vocab_loss import token_nll
from ftjax.models.layers import Cache, Seq, run_stack
from ftjax.params import ParamSpec, Store, Table, declare, nest, site, stack


@dc.dataclass(frozen=True)
class Numerics:
    """How a model is computed; nothing here changes what it means. See `ftjax.config.Compute` for the fields."""

    dtype: str = "float32"
    layers: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "xla"] = "auto"
    loss_chunk: int = 1024


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
    """The output projection: `w` [D, V], or the embedding table [V, D] when `tied`."""

    w: Any
    tied: bool = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., V] in x's dtype."""
        return ops.unembed(x, self.w) if self.tied else ops.dense(x, self.w)


@struct.dataclass
class Output:
    """What a model returns.

    Attributes:
      hidden: last hidden values after the final norm [B, T, D].
      head: the output projection, not yet applied.
      cache: keys and values when decoding.
      chunk: tokens whose logits may exist at once.
    """

    hidden: jax.Array
    head: Head
    cache: Cache | None = None
    chunk: int = struct.field(pytree_node=False, default=0)

    @property
    def logits(self) -> jax.Array:
        """float32 [B, T, V]."""
        return self.head(self.hidden).astype(jnp.float32)

    def nll(self, targets: jax.Array, *, smoothing: jax.Array | float = 0.0) -> Any:
        """Negative log-likelihood of target ids [B, T] at each place, without holding all logits."""
        return token_nll(self.head, self.hidden, targets, smoothing=smoothing, chunk=self.chunk)


class _Input(nn.Module):
    """Declares the site where soft prompts enter."""

    dim: int

    @nn.compact
    def __call__(self, seq: Seq) -> Seq:
        return site(self, "tap", seq, None, ParamSpec((self.dim,), ("embed",), "site"))


@dc.dataclass(frozen=True)
class Model:
    """A family's architecture with its numbers and numerics. Hashable: usable as a static argument of `jax.jit`."""

    config: Any
    numerics: Numerics = Numerics()

    family: ClassVar[str]
    """Hugging Face's ``model_type``."""

    Config: ClassVar[type[FamilyConfig]]

    @cached_property
    def table(self) -> Table:
        """Every parameter and site, by path."""
        raise NotImplementedError

    def apply(self, params: Store, inputs: dict[str, jax.Array], *, cache: Any = None, first: bool = True) -> Output:
        """Runs the model on a batch; see the subclass for the inputs."""
        raise NotImplementedError


@dc.dataclass(frozen=True)
class Decoder(Model):
    """A decoder-only language model: embedding, blocks, final norm, head.

    A family gives `block` (a Linen module ``(h, seq, layer, cache) -> (h, cache)``), `norm`, and the names in the file.
    """

    embed_hf: ClassVar[str] = "model.embed_tokens.weight"
    head_hf: ClassVar[str] = "lm_head.weight"

    @property
    def block(self) -> nn.Module:
        """One layer."""
        raise NotImplementedError

    @property
    def norm(self) -> nn.Module:
        """The norm before the head."""
        raise NotImplementedError

    @cached_property
    def table(self) -> Table:
        """Every parameter and site, by path."""
        c = self.config
        h, seq = abstract_sequence(c.hidden_size, self.dtype)
        std = c.initializer_range
        table: Table = {
            "embed/w": ParamSpec((c.vocab_size, c.hidden_size), ("vocab", "embed"), "embed", std=std, hf=self.embed_hf),
            **{f"input/{k}": s for k, s in declare(_Input(c.hidden_size), seq).items()},
            **stack(declare(self.block, h, seq, 0, None), c.num_hidden_layers),
            **{f"norm/{k}": s for k, s in declare(self.norm, h).items()},
        }
        if not c.tie_word_embeddings:
            shape = (c.hidden_size, c.vocab_size)
            table["head/w"] = ParamSpec(shape, ("embed", "vocab"), std=std, hf=self.head_hf, transposed=True)
        return table

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return jnp.dtype(self.numerics.dtype)

    def apply(
        self, params: Store, inputs: dict[str, jax.Array], *, cache: Cache | None = None, first: bool = True
    ) -> Output:
        """Hidden values and the head for a batch of token rows.

        Args:
          params: store keyed as `table`, adapters and taps in place (see `ftjax.peft.base.bind`).
          inputs: "input_ids" [B, T], and optionally "attention_mask" [B, T] (0 on padding, either side), or
            "positions", "segments" and "prompt_len" [B, T] for packed rows.
          cache: see `new_cache`; the tokens come after what it holds.
          first: whether these tokens begin their sequence (all of it, or the prefill) rather than continue one.

        Returns:
          The output of the last T places; `cache` moved on when given.
        """
        p = nest(params)
        T = inputs["input_ids"].shape[1]
        seq = self.enter(p, inputs, first=first)
        cache = note(cache, seq)
        block, rest = self.block, dc.replace(seq, h=None)

        def body(layer_params: dict, h: jax.Array, layer: Any, cache: Any) -> tuple[jax.Array, Any]:
            return block.apply({"params": layer_params}, h, rest, layer, cache)

        n = self.numerics
        h, cache = run_stack(body, p["layers"], seq.h, cache, unroll=n.layers == "unroll", remat=n.remat)
        if cache is not None:
            cache = dc.replace(cache, at=cache.at + seq.positions.shape[1])
        h: Any = self.norm.apply(
            {"params": p["norm"]}, h[:, -T:]
        )  # whatever a soft prompt put in front is cut off here
        tied = self.config.tie_word_embeddings
        return Output(h, Head(p["embed"]["w"] if tied else p["head"]["w"], tied), cache, n.loss_chunk)

    def enter(self, p: dict[str, Any], inputs: dict[str, jax.Array], *, first: bool) -> Any:
        """The batch as the first layer meets it: tokens embedded, a soft prompt's columns in front. `p` is nested."""
        h = ops.embed(inputs["input_ids"], p["embed"]["w"], self.dtype) * jnp.asarray(self.embed_scale, self.dtype)
        seq = dc.replace(sequence(inputs, first=first), h=h)
        return _Input(self.config.hidden_size).apply({"params": p.get("input", {})}, seq)

    @property
    def embed_scale(self) -> float:
        """Factor on the embedded tokens (Gemma's is sqrt(D))."""
        return 1.0

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` columns (prompt, soft prompt and answer together)."""
        c = self.config
        kv = jnp.zeros((c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim), self.dtype)
        flat = jnp.zeros((batch, length), jnp.int32)
        return Cache(kv, kv, flat, jnp.full_like(flat, ops.PAD_SEGMENT), jnp.zeros((), jnp.int32))


def abstract_sequence(dim: int, dtype: Any) -> tuple[Any, Seq]:
    """Shapes of a batch, for building tables: hidden values [1, 2, dim] and the sequence."""
    flat: Any = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.ShapeDtypeStruct((1, 2, dim), dtype), Seq(None, flat, flat, flat)


def sequence(inputs: dict[str, jax.Array], *, first: bool) -> Seq:
    """Positions, segments and prompt lengths of a batch; what is not given follows from the attention mask."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = None if mask is None else jnp.asarray(mask).astype(jnp.int32)
    positions, segments = inputs.get("positions"), inputs.get("segments")
    if positions is None:
        if mask is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        else:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    if segments is None:
        segments = jnp.zeros_like(ids) if mask is None else jnp.where(mask != 0, 0, ops.PAD_SEGMENT)
    prompt_len = inputs.get("prompt_len")
    if prompt_len is None:
        prompt_len = jnp.full_like(positions, jnp.iinfo(jnp.int32).max // 2)
    return Seq(None, positions, segments, prompt_len, first)


def note(cache: Cache | None, seq: Seq) -> Cache | None:
    """Writes the positions and segments of the coming tokens into the cache, once for all layers."""
    if cache is None:
        return None
    start = (jnp.zeros((), jnp.int32), cache.at)
    return dc.replace(
        cache,
        positions=jax.lax.dynamic_update_slice(cache.positions, seq.positions.astype(jnp.int32), start),
        segments=jax.lax.dynamic_update_slice(cache.segments, seq.segments.astype(jnp.int32), start),
    )
