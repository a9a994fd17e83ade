"""Tiny models and batches for tests: a Llama of 4 layers, random token rows, a program put together without files."""

from __future__ import annotations

import dataclasses as dc
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import config, params
from ftjax.data.batches import PAD_SEGMENT, TokenBatch
from ftjax.data.images import ImageBatch
from ftjax.data.labels import LabelBatch
from ftjax.data.masking import MaskBatch
from ftjax.data.pairs import PairBatch
from ftjax.data.seq2seq import SeqBatch
from ftjax.data.spans import SpanBatch
from ftjax.data.tags import TagBatch
from ftjax.data.together import TaskBatch
from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.models.llama import Llama, LlamaConfig, Rope
from ftjax.objectives.causal_lm import CausalLM
from ftjax.peft.base import cut_for, with_head
from ftjax.peft.lora import LoRA
from ftjax.train import average
from ftjax.train.optimizer import OptimSpec, decay_groups, hyper_of, make_tx
from ftjax.train.state import Frozen, Parts, State, initial, kinds_of, partition
from ftjax.train.step import Program

VOCAB, LENGTH, IMAGE = 96, 16, 16


def llama(numerics: Numerics | None = None, *, head: HeadSpec | None = None, **changes: Any) -> Model:
    """4 layers, 32 wide, 4 heads over 2 key heads."""
    numbers = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope=Rope(1e4, "default", 1.0, 0.0, 0.0, 0), tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        initializer_range=0.1,
    )  # fmt: skip
    return Llama(LlamaConfig(**(numbers | changes)), numerics or Numerics(), head or HeadSpec())


def weights(model: Model, seed: int = 0) -> params.Store:
    """Random weights of a model."""
    return params.init_params(model.table, jax.random.key(seed), dtype=jnp.float32)


def batch(rows: int, *, micro: int = 0, seed: int = 0, length: int = LENGTH) -> TokenBatch:
    """Random rows with unequal prompts; every third row is two packed examples. [rows, T] or [micro, rows / micro, T]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, (rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
    segments = np.zeros_like(tokens)
    loss = np.ones(tokens.shape, np.float32)
    for i in range(rows):
        loss[i, : rng.integers(1, 6)] = 0
        if i % 3 == 2:
            half = length // 2
            segments[i, half:] = 1
            positions[i, half:] -= half
            loss[i, half] = 0
    out = TokenBatch(tokens, positions, segments, loss)
    if micro:
        out = jax.tree.map(lambda x: x.reshape(micro, rows // micro, length), out)
    return jax.tree.map(jnp.asarray, out)


def labelled(rows: int, *, classes: int = 3, seed: int = 0) -> LabelBatch:
    """Random texts of unequal lengths with a class each, [rows, T]; the last row only fills the batch."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, LENGTH + 1, rows)
    real = np.arange(LENGTH)[None] < lengths[:, None]
    tokens = np.where(real, rng.integers(3, VOCAB, (rows, LENGTH)), 0).astype(np.int32)
    positions = np.where(real, np.arange(LENGTH)[None], 0).astype(np.int32)
    weights = np.ones(rows, np.float32)
    weights[-1] = 0
    return LabelBatch(
        tokens, positions, np.where(real, 0, PAD_SEGMENT).astype(np.int32), np.zeros_like(tokens),
        rng.integers(0, classes, rows).astype(np.int32), weights,
    )  # fmt: skip


def pairs(rows: int, *, seed: int = 0) -> PairBatch:
    """Random pairs of answers to common prompts, [rows, 2, T]."""
    rng = np.random.default_rng(seed)
    shape = (rows, 2, LENGTH)
    prompt, lengths = rng.integers(2, 6, (rows, 1, 1)), rng.integers(8, LENGTH + 1, (rows, 2, 1))
    at = np.arange(LENGTH)[None, None]
    tokens = rng.integers(3, VOCAB, shape)
    tokens = np.where(at < prompt, tokens[:, :1], tokens)
    real = at < lengths
    return PairBatch(
        np.where(real, tokens, 0).astype(np.int32), np.where(real, at, 0).astype(np.int32),
        np.where(real, 0, PAD_SEGMENT).astype(np.int32), (real & (at >= prompt)).astype(np.float32),
        rng.integers(0, 2, rows).astype(np.float32), np.ones(rows, np.float32),
    )  # fmt: skip


def masked(rows: int, *, seed: int = 0) -> MaskBatch:
    """Random rows with some tokens hidden."""
    plain, rng = batch(rows, seed=seed), np.random.default_rng(seed)
    chosen = rng.random(plain.tokens.shape) < 0.3
    return MaskBatch(
        np.where(chosen, 2, plain.tokens).astype(np.int32), np.asarray(plain.tokens), np.asarray(plain.positions),
        np.asarray(plain.segments), chosen.astype(np.float32),
    )  # fmt: skip


def images(rows: int, *, classes: int = 3, seed: int = 0) -> ImageBatch:
    """Random images with a class each, [rows, 3, IMAGE, IMAGE]; the last row only fills the batch."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(rows, 3, IMAGE, IMAGE)).astype(np.float32)
    weights = np.ones(rows, np.float32)
    weights[-1] = 0
    return ImageBatch(pixels, rng.integers(0, classes, rows).astype(np.int32), weights)


def answered(rows: int, *, seed: int = 0) -> SeqBatch:
    """Random sources and answers of unequal lengths, [rows, T]."""
    one, two = labelled(rows, seed=seed), labelled(rows, seed=seed + 1)
    real = (np.asarray(two.segments) == 0).astype(np.float32)
    return SeqBatch(one.tokens, one.positions, one.segments, two.tokens, real)


def tagged(rows: int, *, classes: int = 2, seed: int = 0) -> TagBatch:
    """Random texts of unequal lengths with classes on some tokens, [rows, T]."""
    one, rng = labelled(rows, seed=seed), np.random.default_rng(seed)
    chosen = (np.asarray(one.segments) == 0) & (rng.random(one.tokens.shape) < 0.5)
    labels = np.where(chosen, rng.integers(0, classes, chosen.shape), 0).astype(np.int32)
    return TagBatch(one.tokens, one.positions, one.segments, one.types, labels, chosen.astype(np.float32))


def spans(rows: int, *, seed: int = 0) -> SpanBatch:
    """Random windows of unequal lengths with an answer each, [rows, T]; the last row only fills the batch."""
    one, rng = labelled(rows, seed=seed), np.random.default_rng(seed)
    places = np.sort(rng.integers(0, (np.asarray(one.segments) == 0).sum(1)[:, None], (rows, 2)), 1).astype(np.int32)
    index = np.where(one.weights > 0, np.arange(rows, dtype=np.int32), -1).astype(np.int32)
    return SpanBatch(
        one.tokens, one.positions, one.segments, one.types, places[:, 0], places[:, 1], one.weights, index
    )  # fmt: skip


def together(rows: int, *, seed: int = 0) -> TaskBatch:
    """Rows of the two default tasks of `MultiTask`."""
    return TaskBatch({"docs": batch(rows, seed=seed), "text": batch(rows, seed=seed + 1)})


BATCHES: dict[type, Any] = {
    TaskBatch: together,
    SpanBatch: spans,
    TagBatch: tagged,
    SeqBatch: answered,
    ImageBatch: images,
    MaskBatch: masked,
    TokenBatch: batch,
    LabelBatch: labelled,
    PairBatch: pairs,
}


def batch_for(objective: Any, rows: int, *, micro: int, seed: int = 0) -> Any:
    """A random batch of the kind that an objective takes, in `micro` micro-batches."""
    flat = BATCHES[objective.batch](rows, seed=seed)
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(micro, rows // micro, *x.shape[1:]), flat)


@dc.dataclass
class Tiny:
    """A run without files."""

    model: Model
    base: params.Store
    overlay: dict[str, Any]
    parts: Parts
    program: Program
    state: State
    frozen: Frozen


def tiny(
    peft: Any = None, objective: Any = None, *, model: Model | None = None, base: Any = None, seed: int = 0,
    optim: config.Optim | None = None, steps: int = 20, randomize: bool = False,
) -> Tiny:  # fmt: skip
    """Puts a model, a method and an objective together.

    Args:
      peft: a method; LoRA of rank 4 by default.
      objective: CausalLM by default.
      model: the tiny Llama by default.
      base: its weights, random by default.
      seed: of the overlay and dropout.
      optim: optimizer settings.
      steps: schedule length.
      randomize: draw every trainable overlay leaf, so that nothing is zero.
    """
    peft, objective, model = peft or LoRA(rank=4), objective or CausalLM(), model or llama()
    base = weights(model) if base is None else base
    overlay = peft.init(params.key_of(jax.random.key(seed), "peft"), model.table, base)
    base = cut_for(base, overlay, peft, model.table)
    teacher = model if hasattr(objective, "teacher") else None  # the same network with other weights
    own = objective.learned(model, teacher, jax.random.key(seed)) if teacher else {}
    rules = with_head(peft.labels(model.table), model.always_trained)
    parts = partition(base, overlay, model.table, rules, own)
    optim = optim or config.Optim(lr=1e-2, weight_decay=0.01)
    run: Any = SimpleNamespace(optim=optim, train=config.Train(steps=steps), objective=objective)
    spec, hyper = OptimSpec.of(optim, peft), hyper_of(run)
    groups = decay_groups(parts.groups, kinds_of(parts.trainable, model.table))
    if randomize:
        drawn = [
            0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(9), i), x.shape)
            for i, x in enumerate(jax.tree.leaves(parts.trainable))
        ]
        parts = parts.replace(trainable=jax.tree.unflatten(jax.tree.structure(parts.trainable), drawn))
    rng = params.key_of(jax.random.key(seed), "train")
    state = initial(parts, make_tx(spec, groups, hyper, jnp.int32(0)), rng=rng, mutable=parts.mutable, hyper=hyper)
    first = average.start(spec.average, state.trainable)
    state = dc.replace(state, weighting=getattr(objective, "start", dict)(), average=first)
    past = (parts.trainable, parts.mutable) if objective.needs_reference else (None, None)
    return Tiny(
        model,
        base,
        overlay,
        parts,
        Program(model, objective, spec, groups, teacher),
        state,
        Frozen(parts.frozen, *jax.tree.map(jnp.copy, past), teacher and weights(teacher, seed=1)),
    )


def largest(a: Any, b: Any) -> float:
    """Largest absolute difference of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((float(jnp.abs(x - y).max()) for x, y in pairs if jnp.issubdtype(x.dtype, jnp.number)), default=0.0)


def relative(a: Any, b: Any) -> float:
    """Largest difference of two trees, leaf by leaf over the leaf's largest entry in `b`."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-12)) for x, y in pairs)
