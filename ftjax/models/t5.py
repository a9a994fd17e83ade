"""T5: encoder and decoder with biases by relative position, RMSNorm before each part (Raffel et al. 2019, arXiv:1910.10683).

encoder   h = h + Wo attention(x) ; h = h + W2 act(W1 x),  x = norm(h)
decoder   the same with causal attention, and in between h = h + Wo attention(Wq norm(h), Wk e, Wv e), e the encoder's values

    out = model.apply(params, {"input_ids": source, "attention_mask": mask, "decoder_input_ids": shifted})
    out.logits                                                   # [B, U, V], one place per decoder token

Scores are not divided by the root of the head's size; one table of biases serves all layers of a side. The version 1.1 and
its kin (Flan-T5) have gated parts and a head of their own. The dropout of the base model is not applied while fine-tuning.
"""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from ftjax import ops
from ftjax.errors import ConfigError
from ftjax.models.base import FamilyConfig, Output
from ftjax.models.heads import VocabularyHead
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import KV, Cache, RMSNorm, Seq, run_stack
from ftjax.models.t5_layers import FORMS, RelativeBias, Side, SourceKV, T5Block, prefix_places
from ftjax.models.transformer import (
    SoftInput,
    TokenEntrance,
    Transformer,
    abstract_sequence,
    note,
    prompt_inputs,
    sequence,
)
from ftjax.params import Store, Table, declare, nest, stack
from ftjax.registry import register


@dc.dataclass(frozen=True)
class T5Config(FamilyConfig):
    """The numbers of a T5; names as in `config.json`."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    feed_forward_proj: str
    initializer_factor: float
    tie_word_embeddings: bool
    scale_decoder_outputs: bool
    decoder_start_token_id: int
    pad_token_id: int | None
    eos_token_id: tuple[int, ...]
    rates: tuple[tuple[str, float], ...]

    # What the first checkpoints say of their own training and of sizes that nothing reads.
    _UNUSED: ClassVar = (
        "n_positions",
        "output_past",
        "dense_act_fn",
        "is_gated_act",
        "bos_token_id",
        "classifier_dropout",
    )

    @property
    def hidden_size(self) -> int:
        """Dimensions of a hidden value."""
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the encoder."""
        return self.num_layers

    @property
    def initializer_range(self) -> float:
        """Standard deviation of the embedded tokens."""
        return self.initializer_factor

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`; every number that decides the function must be there."""
        c = HFConfig(config)
        layers, tied = c.int("num_layers"), c.bool("tie_word_embeddings", implied=True)
        pad = c.token("pad_token_id")
        read = cls(
            vocab_size=c.int("vocab_size"),
            d_model=c.int("d_model"),
            d_kv=c.int("d_kv"),
            d_ff=c.int("d_ff"),
            num_layers=layers,
            num_decoder_layers=c.int("num_decoder_layers", implied=layers),
            num_heads=c.int("num_heads"),
            relative_attention_num_buckets=c.int("relative_attention_num_buckets"),
            # Files from before the setting existed mean its first value.
            relative_attention_max_distance=c.int("relative_attention_max_distance", implied=128),
            layer_norm_epsilon=c.float("layer_norm_epsilon"),
            feed_forward_proj=c.choice("feed_forward_proj", FORMS),
            initializer_factor=c.float("initializer_factor", implied=1.0),
            tie_word_embeddings=tied,
            scale_decoder_outputs=c.bool("scale_decoder_outputs", implied=tied),
            decoder_start_token_id=c.int("decoder_start_token_id", implied=pad),
            pad_token_id=pad,
            eos_token_id=c.tokens("eos_token_id"),
            rates=(("dropout_rate", c.float("dropout_rate", implied=0.1)),),
        )
        for name in cls._UNUSED:
            c.raw(name)
        c.finish()
        return read

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        plain = {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name not in ("rates", "eos_token_id")}
        eos = list(self.eos_token_id)
        return {
            "model_type": "t5", "is_encoder_decoder": True, **plain, **dict(self.rates),
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }  # fmt: skip


@struct.dataclass
class T5Cache(Cache):
    """The decoder's own keys and values, and those that it reads from the source.

    Attributes:
      source_k, source_v: [L, B, S, N, H].
      source_segments: [B, S].
    """

    source_k: jax.Array
    source_v: jax.Array
    source_segments: jax.Array


@register("family", "t5")
@dc.dataclass(frozen=True)
class T5(Transformer):
    """T5 with its language-model head."""

    family: ClassVar[str] = "t5"
    Config: ClassVar[type[FamilyConfig]] = T5Config
    embed_hf: ClassVar[str] = "shared.weight"
    head_hf: ClassVar[str] = "lm_head.weight"
    heads: ClassVar[dict[str, str]] = {"seq2seq_lm": "T5ForConditionalGeneration"}
    buffers: ClassVar[tuple[str, ...]] = (
        "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    )  # fmt: skip
    reads_apart: ClassVar[bool] = True
    unties: ClassVar[bool] = True
    gives_layers: ClassVar[bool] = False

    @property
    def entrance(self) -> nn.Module:
        """Tokens embedded, those of both sides in one table."""
        c = self.config
        return TokenEntrance(c.vocab_size, c.d_model, self.embed_hf, c.initializer_factor, self.dtype)

    @property
    def head_module(self) -> nn.Module:
        """Tokens of the answer."""
        c = self.config
        return VocabularyHead(c.vocab_size, c.tie_word_embeddings, self.head_hf, c.initializer_factor)

    @property
    def context(self) -> None:
        """Positions are relative: there is no longest text."""
        return None

    def final_norm(self, side: Side) -> RMSNorm:
        """The norm after a side's last block."""
        return RMSNorm(self.config.layer_norm_epsilon, f"{side}.final_layer_norm.weight")

    @cached_property
    def table(self) -> Table:
        """Every parameter and site, by path; the sides are stacks of their own."""
        c = self.config
        h, seq = abstract_sequence(c.d_model, self.dtype)
        N, flat = c.num_heads, seq.positions
        bias: Any = jax.ShapeDtypeStruct((1, N, 2, 2), jnp.float32)
        one: Any = jax.ShapeDtypeStruct((1, 2, N, c.d_kv), self.dtype)
        embedding: Any = jax.ShapeDtypeStruct((c.vocab_size, c.d_model), jnp.float32)
        found = {**declare(self.entrance, {"input_ids": flat}, seq)}
        found |= {f"input/{k}": s for k, s in declare(SoftInput(c.d_model), seq).items()}
        sides: tuple[tuple[Side, int], ...] = (("encoder", c.num_layers), ("decoder", c.num_decoder_layers))
        for side, layers in sides:
            source = KV(one, one, flat, flat) if side == "decoder" else None
            block = declare(T5Block(c, side), h, seq, 0, None, bias, source)
            found |= declare(RelativeBias(c, side), flat, flat)
            found |= stack(block | (declare(SourceKV(c), h) if source else {}), layers, side)
            found |= {f"{side}_norm/{k}": s for k, s in declare(self.final_norm(side), h).items()}
        return found | declare(self.head_module, h, seq, embedding)

    def apply(
        self, params: Store, inputs: dict[str, jax.Array], *, cache: Any = None, first: bool = True,
        train: bool = False, layers: bool = False,
    ) -> Output:  # fmt: skip
        """Hidden values of the decoder and the head, for sources and what has been said of the answers.

        Args:
          params: store keyed as `table`, adapters and taps in place.
          inputs: of the source "input_ids" [B, T] and optionally "attention_mask", or "positions" and "segments"; of the
            answer "decoder_input_ids" [B, U], and optionally "decoder_positions" and "decoder_segments"; or "labels", which
            are shifted right behind the start token. Where `first` is false, the unprefixed names are the answer's.
          cache: see `new_cache`; the answer's tokens come after what it holds.
          first: whether the source is read now rather than found in the cache.
          train, layers: of no consequence here.

        Raises:
          ConfigError: neither "decoder_input_ids" nor "labels".
        """
        p, c = nest(params), self.config
        source = self.encode(p, inputs) if first else None
        if first:
            inputs = _decoder_inputs(inputs, c.decoder_start_token_id)
        ids = inputs["input_ids"]
        columns = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        seq = sequence(inputs, first=first, positions=columns)
        held: Any = note(cache, seq)
        keys = held.positions if held is not None else seq.positions
        keys = jnp.concatenate([prefix_places(p["decoder"], keys), keys], axis=1)
        bias = RelativeBias(c, "decoder").apply({"params": p}, seq.positions, keys)
        if held is not None and source is not None:
            held = dc.replace(held, source_segments=source.segments)
        segments: Any = cache.source_segments if source is None else source.segments
        block, reader = T5Block(c, "decoder"), SourceKV(c)

        def body(layer_params: dict, h: jax.Array, layer: Any, cache: Any) -> tuple[jax.Array, Any]:
            if source is not None:
                read: Any = reader.apply({"params": layer_params}, source.h)
                k, v = read
                cache = _keep(cache, layer, k, v)
            else:
                k, v = (jax.lax.dynamic_index_in_dim(x, layer, 0, False) for x in (cache.source_k, cache.source_v))
            kv = KV(k, v, jnp.zeros_like(segments), segments)
            return block.apply({"params": layer_params}, h, seq, layer, cache, bias, kv)

        n = self.numerics
        h = ops.embed(ids, p["embed"]["w"], self.dtype)
        h, cache = run_stack(body, p["decoder"], h, held, unroll=n.layers == "unroll", remat=n.remat)
        if cache is not None:
            cache = dc.replace(cache, at=cache.at + ids.shape[1])
        h = _normed(self.final_norm("decoder"), p["decoder_norm"], h)
        h = h * jnp.asarray(c.d_model**-0.5, h.dtype) if c.scale_decoder_outputs else h
        made: Any = self.head_module.apply({"params": p}, h, seq, p["embed"]["w"])
        return Output(made[0], made[1], cache, chunk=n.loss_chunk)

    def encode(self, p: dict[str, Any], inputs: dict[str, jax.Array]) -> Seq:
        """The source as the decoder reads it: values [B, S, D], soft prompt included, and segments. `p` is nested."""
        c, n = self.config, self.numerics
        seq = self.enter(p, inputs, first=True)
        bias = RelativeBias(c, "encoder").apply({"params": p}, seq.positions, seq.positions)
        block, rest = T5Block(c, "encoder"), dc.replace(seq, h=None)

        def body(layer_params: dict, h: jax.Array, layer: Any, cache: Any) -> tuple[jax.Array, Any]:
            return block.apply({"params": layer_params}, h, rest, layer, cache, bias, None)

        h, _ = run_stack(body, p["encoder"], seq.h, None, unroll=n.layers == "unroll", remat=n.remat)
        return dc.replace(seq, h=_normed(self.final_norm("encoder"), p["encoder_norm"], h))

    def new_cache(self, batch: int, length: int, source: int) -> T5Cache:
        """An empty cache for `length` columns of answers to `source` columns."""
        c = self.config
        shape = (c.num_decoder_layers, batch)
        own, read = (jnp.zeros((*shape, n, c.num_heads, c.d_kv), self.dtype) for n in (length, source))
        flat, at = jnp.zeros((batch, length), jnp.int32), jnp.zeros((), jnp.int32)
        segments = jnp.full((batch, source), ops.PAD_SEGMENT, jnp.int32)
        return T5Cache(own, own, flat, jnp.full_like(flat, ops.PAD_SEGMENT), at, read, read, segments)

    def before(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens before the first of an answer: the start token."""
        return np.ones_like(lengths)

    def begin(self, params: Any, ids: jax.Array, lengths: jax.Array, *, room: int, soft: int) -> Output:
        """Reads left-padded sources [B, P] and the start token into a new cache with `room` columns more."""
        B, P = ids.shape
        start = {"decoder_input_ids": jnp.full((B, 1), self.config.decoder_start_token_id, jnp.int32)}
        return self.apply(params, prompt_inputs(ids, lengths) | start, cache=self.new_cache(B, 1 + room, soft + P))


def _normed(norm: nn.Module, params: dict[str, Any], h: jax.Array) -> jax.Array:
    out: Any = norm.apply({"params": params}, h)
    return out


def _decoder_inputs(inputs: dict[str, jax.Array], start: int) -> dict[str, jax.Array]:
    """The answer's part of the inputs, without the prefix of their names."""
    if "decoder_input_ids" not in inputs and "labels" not in inputs:
        raise ConfigError("t5 reads a source and an answer: give decoder_input_ids, or labels, beside input_ids")
    if "labels" in inputs:
        labels = inputs["labels"]
        return {"input_ids": jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start)}
    return {k.removeprefix("decoder_"): v for k, v in inputs.items() if k.startswith("decoder_")}


def _keep(cache: Any, layer: Any, k: jax.Array, v: jax.Array) -> Any:
    """The cache with a layer's keys and values of the source."""
    if cache is None:
        return None
    put = jax.lax.dynamic_update_index_in_dim
    return dc.replace(
        cache, source_k=put(cache.source_k, k.astype(cache.source_k.dtype), layer, 0),
        source_v=put(cache.source_v, v.astype(cache.source_v.dtype), layer, 0),
    )  # fmt: skip
