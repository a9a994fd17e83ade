"""Transformers over token rows: entrance, blocks, final norm, head. `Decoder` keeps keys and values, `Encoder` does not.

    class Llama(Decoder):                          # a family gives these
        block = ...                                # (h, seq, layer, cache) -> (h, cache)
        norm = ...

The parts are Linen modules that name their submodules as the table does ("embed", "positions", "norm", "head", ...).
"""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftjax import ops
from ftjax.models.base import Model, Output
from ftjax.models.heads import PooledHead, ScoreHead, VocabularyHead
from ftjax.models.layers import Cache, Seq, run_stack
from ftjax.models.scores import asked, watching
from ftjax.params import ParamSpec, Store, Table, declare, leaf, nest, site, stack
from ftjax.rows import places


class SoftInput(nn.Module):
    """Declares the site where soft prompts enter."""

    dim: int

    @nn.compact
    def __call__(self, seq: Seq) -> Seq:
        return site(self, "tap", seq, None, ParamSpec((self.dim,), ("embed",), "site"))


class Embedding(nn.Module):
    """Rows [..., D] of a table [rows, D] (tokens, positions, segments) in `dtype`.

    With `bounded`, an id beyond the table gives NaN, which makes the whole text so: the gather would take the last row.
    """

    rows: int
    dim: int
    hf: str
    std: float
    dtype: Any
    axes: tuple[str | None, str | None] = ("vocab", "embed")
    bounded: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        w = leaf(self, "w", ParamSpec((self.rows, self.dim), self.axes, "embed", std=self.std, hf=self.hf))
        rows = ops.embed(ids, w, self.dtype)
        return jnp.where((ids < self.rows)[..., None], rows, jnp.asarray(jnp.nan, self.dtype)) if self.bounded else rows


class TokenEntrance(nn.Module):
    """Tokens embedded, times a factor (1 but for Gemma's sqrt D)."""

    vocab: int
    dim: int
    hf: str
    std: float
    dtype: Any
    scale: float = 1.0

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array], seq: Seq) -> jax.Array:
        h = Embedding(self.vocab, self.dim, self.hf, self.std, self.dtype, name="embed")(inputs["input_ids"])
        return h if self.scale == 1.0 else h * jnp.asarray(self.scale, self.dtype)


@dc.dataclass(frozen=True)
class Transformer(Model):
    """Entrance, equal blocks, final norm (or none), head. A family gives these four as Linen modules."""

    @property
    def entrance(self) -> nn.Module:
        """``(inputs, seq) -> h [B, T, D]`` in the compute dtype; holds the token table as ``embed/w``."""
        raise NotImplementedError

    @property
    def block(self) -> nn.Module:
        """One layer ``(h, seq, layer, cache) -> (h, cache)``; `layer` is its number, traced under scan."""
        raise NotImplementedError

    @property
    def norm(self) -> nn.Module | None:
        """The norm after the last block ``h -> h``."""
        return None

    @property
    def head_module(self) -> nn.Module:
        """``(h, seq, embedding table) -> (hidden, Head)``."""
        raise NotImplementedError

    @property
    def places(self) -> int | None:
        """For how many tokens positions were learned; None where positions are computed."""
        learned = self.table.get("positions/w")
        return learned.shape[0] if learned else None

    @cached_property
    def table(self) -> Table:
        """Every parameter and site, by path."""
        c = self.config
        h, seq = abstract_sequence(c.hidden_size, self.dtype)
        ids = {"input_ids": seq.positions}
        embedding: Any = jax.ShapeDtypeStruct((c.vocab_size, c.hidden_size), jnp.float32)
        norm = self.norm
        return {
            **declare(self.entrance, ids, seq),
            **{f"input/{k}": s for k, s in declare(SoftInput(c.hidden_size), seq).items()},
            **stack(declare(self.block, h, seq, 0, None), c.num_hidden_layers),
            **({f"norm/{k}": s for k, s in declare(norm, h).items()} if norm else {}),
            **declare(self.head_module, h, seq, embedding),
        }

    @property
    def context(self) -> int | None:
        """The longest text, answer included; None where there is no end to it."""
        return self.config.max_position_embeddings

    gives_layers: ClassVar[bool] = True
    """Whether `apply` takes `layers` and `attentions`."""

    def apply(
        self, params: Store, inputs: dict[str, jax.Array], *, cache: Any = None, first: bool = True,
        train: bool = False, layers: bool = False, attentions: bool | tuple[int, ...] = False,
    ) -> Output:  # fmt: skip
        """Hidden values and the head for a batch of token rows.

        Args:
          params: store keyed as `table`, adapters and taps in place (see `ftjax.peft.base.bind`).
          inputs: "input_ids" [B, T], and optionally "attention_mask" [B, T] (0 on padding, either side), or
            "positions", "segments" and "prompt_len" [B, T] for packed rows.
          cache: see `Decoder.new_cache`; the tokens come after what it holds.
          first: whether these tokens begin their sequence (all of it, or the prefill) rather than continue one.
          train: of no consequence here: there are no running statistics.
          layers: whether to give the hidden values after every layer too.
          attentions: of which layers to give the attention scores too, from 0; True is all of them. Without a cache.

        Returns:
          The output of the last T places; `cache` moved on when given.
        """
        p = nest(params)
        T = inputs["input_ids"].shape[1]
        seq = self.enter(p, inputs, first=first)
        cache = note(cache, seq)
        block, rest = self.block, dc.replace(seq, h=None)

        def body(layer_params: dict, h: jax.Array, layer: Any, cache: Any, seq: Seq = rest) -> tuple[jax.Array, Any]:
            return block.apply({"params": layer_params}, h, seq, layer, cache)

        n, c, run = self.numerics, self.config, body
        if wanted := asked(attentions, c.num_hidden_layers):
            run, cache = watching(body, rest, wanted, cache, (len(seq.h), c.num_attention_heads, T))
        each: list[jax.Array] | None = [] if layers else None
        h, cache = run_stack(run, p["layers"], seq.h, cache, unroll=n.layers == "unroll", remat=n.remat, each=each)
        cache, scores = cache if wanted else (cache, None)
        if cache is not None:
            cache = dc.replace(cache, at=cache.at + seq.positions.shape[1])
        own = jax.tree.map(lambda x: x[:, -T:], rest)  # whatever a soft prompt put in front is cut off here
        h = h[:, -T:]
        if self.norm is not None:
            h = self.norm.apply({"params": p["norm"]}, h)
        made: Any = self.head_module.apply({"params": p}, h, own, p["embed"]["w"])
        hidden, head = made
        every = jnp.concatenate(each)[:, :, -T:] if each else None
        return Output(hidden, head, cache, chunk=n.loss_chunk, layers=every, attentions=scores)

    def enter(self, p: dict[str, Any], inputs: dict[str, jax.Array], *, first: bool) -> Any:
        """The batch as the first layer meets it: tokens embedded, a soft prompt's columns in front. `p` is nested."""
        seq = sequence(inputs, first=first, positions=self.positions(inputs))
        # Virtual tokens (a prompt's, a prefix's) come first: the tokens' positions begin behind them.
        seq = dc.replace(seq, positions=seq.positions + getattr(p.get("input", {}).get("tap"), "shift", 0))
        seq = dc.replace(seq, h=self.entrance.apply({"params": p}, inputs, seq))
        return SoftInput(self.config.hidden_size).apply({"params": p.get("input", {})}, seq)

    def positions(self, inputs: dict[str, jax.Array]) -> jax.Array:
        """Positions [B, T] of a batch that does not bring its own: real tokens counted from 0."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is None:
            return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        return jnp.maximum(jnp.cumsum(jnp.asarray(mask).astype(jnp.int32), axis=1) - 1, 0)


@dc.dataclass(frozen=True)
class Decoder(Transformer):
    """A decoder-only language model. A family gives `block`, `norm`, and the names in the file where they differ."""

    embed_hf: ClassVar[str] = "model.embed_tokens.weight"
    head_hf: ClassVar[str] = "lm_head.weight"
    score_hf: ClassVar[str] = "score"
    token_hf: ClassVar[str] = "score"
    prefix: ClassVar[str] = "model."
    buffers: ClassVar[tuple[str, ...]] = ("*rotary_emb.inv_freq",)

    @property
    def entrance(self) -> nn.Module:
        """Tokens embedded."""
        c = self.config
        return TokenEntrance(
            c.vocab_size, c.hidden_size, self.embed_hf, c.initializer_range, self.dtype, self.embed_scale
        )

    @property
    def embed_scale(self) -> float:
        """Factor on the embedded tokens (Gemma's is sqrt D)."""
        return 1.0

    @property
    def logit_cap(self) -> float | None:
        """Soft limit of the logits (Gemma 2), or None."""
        return None

    @property
    def head_module(self) -> nn.Module:
        """Tokens; or labels from the last real token, or from each."""
        c, kind, n = self.config, self.head.kind, len(self.head.labels)
        if kind == "causal_lm":
            return VocabularyHead(
                c.vocab_size, c.tie_word_embeddings, self.head_hf, c.initializer_range, self.logit_cap
            )
        if kind == "sequence_classification":
            return PooledHead(n, self.score_hf, c.initializer_range)
        if kind == "value":
            return ScoreHead(n, self.score_hf, c.initializer_range, use_bias=False)
        return ScoreHead(n, "qa_outputs" if kind == "question_answering" else self.token_hf, c.initializer_range)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` columns (prompt, soft prompt and answer together)."""
        c = self.config
        kv = jnp.zeros((c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim), self.dtype)
        flat = jnp.zeros((batch, length), jnp.int32)
        return Cache(kv, kv, flat, jnp.full_like(flat, ops.PAD_SEGMENT), jnp.zeros((), jnp.int32))

    def before(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens before the first of an answer to prompts of these lengths [B]: those of the prompt."""
        return lengths

    def begin(self, params: Any, ids: jax.Array, lengths: jax.Array, *, room: int, soft: int) -> Output:
        """Reads left-padded prompts into a new cache; the last column gives the first token of the answer.

        Args:
          params: adapters in place.
          ids: [B, P].
          lengths: tokens of the prompts [B].
          room: columns for the answer.
          soft: columns that a soft prompt takes.
        """
        B, P = ids.shape
        return self.apply(params, prompt_inputs(ids, lengths), cache=self.new_cache(B, soft + P + room))


def prompt_inputs(ids: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
    """Inputs for left-padded prompts [B, P] of these lengths [B]."""
    column = jnp.arange(ids.shape[1], dtype=jnp.int32)[None] - (ids.shape[1] - lengths)[:, None]
    return {
        "input_ids": ids,
        "positions": jnp.maximum(column, 0),
        "segments": jnp.where(column >= 0, 0, ops.PAD_SEGMENT),
        "prompt_len": jnp.broadcast_to(lengths[:, None], ids.shape),
    }


def decoder_heads(name: str) -> dict[str, str]:
    """Heads of a decoder family with transformers' class names: ``LlamaForCausalLM``, ..."""
    return {
        "causal_lm": f"{name}ForCausalLM",
        "sequence_classification": f"{name}ForSequenceClassification",
        "token_classification": f"{name}ForTokenClassification",
        "value": f"{name}ForSequenceClassification",
    }


@dc.dataclass(frozen=True)
class Encoder(Transformer):
    """A bidirectional model: every token sees every other of its example. A family gives all four parts."""

    def positions(self, inputs: dict[str, jax.Array]) -> jax.Array:
        """Columns, padding or not, as BERT counts them."""
        ids = inputs["input_ids"]
        return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)


def abstract_sequence(dim: int, dtype: Any) -> tuple[Any, Seq]:
    """Shapes of a batch, for building tables: hidden values [1, 2, dim] and the sequence."""
    flat: Any = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.ShapeDtypeStruct((1, 2, dim), dtype), Seq(None, flat, flat, flat)


def sequence(inputs: dict[str, jax.Array], *, first: bool, positions: jax.Array) -> Seq:
    """Segments and prompt lengths of a batch; what is not given follows from the attention mask. `positions`: default."""
    ids, mask, segments = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("segments")
    positions = inputs.get("positions", positions)
    if segments is None:
        segments = (
            jnp.zeros_like(ids) if mask is None else jnp.where(jnp.asarray(mask).astype(bool), 0, ops.PAD_SEGMENT)
        )
    prompt_len = inputs.get("prompt_len")
    if prompt_len is None:
        prompt_len = places(segments)[1]  # a text that nobody divides is all prompt
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
