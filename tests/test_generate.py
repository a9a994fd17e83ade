"""Generation: the cache changes nothing, a row does not depend on its batch, shapes compile once, text comes out whole."""

from __future__ import annotations

import dataclasses as dc
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ftjax
from ftjax import config, ops, tree
from ftjax.errors import ConfigError, DataError
from ftjax.generate import api
from ftjax.generate.decode import Rows, Rules, advance, bucket, decode, prefill, row_keys, soft_columns
from ftjax.generate.sampling import Sampling, SamplingArrays, draw, keep
from ftjax.models.base import Numerics
from ftjax.models.layers import KV, Seq
from ftjax.models.llama import Llama
from ftjax.parallel.mesh import Placement, axes_of_store, make_mesh
from ftjax.peft.base import bind
from ftjax.peft.lora import LoRA
from tests import tiny

# Weights this large give answers that wander; the usual ones soon repeat one token, and hide mistakes.
WANDERING = dict(initializer_range=0.5, max_position_embeddings=256)
LENGTHS = (5, 16, 1, 11)
SAMPLED = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=3)


def prompts_of(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, tiny.VOCAB, n).astype(np.int32) for n in lengths]


def answers(model: Any, params: Any, prompts: list[np.ndarray], sampling: Sampling, n: int, **options: Any) -> list:
    """Token ids from `decode`, without an EOS unless given."""
    options = dict(limits=[n] * len(prompts), eos=[], pad=0) | options
    out: list[list[int]] = [[] for _ in prompts]
    for new in decode(model, params, prompts, sampling, **options):
        for row, tokens in zip(out, new, strict=True):
            row += tokens
    return out


def uncached(model: Any, params: Any, prompts: list[np.ndarray], n: int) -> list[list[int]]:
    """The same greedily, by running the whole text anew for every token, padded on the other side."""
    lengths = np.array([len(p) for p in prompts])
    ids = np.zeros((len(prompts), lengths.max() + n), np.int32)
    for row, p in zip(ids, prompts, strict=True):
        row[: len(p)] = p
    prompt_len = np.broadcast_to(lengths[:, None], ids.shape).astype(np.int32)

    @jax.jit
    def next_token(ids: jax.Array, now: jax.Array) -> jax.Array:
        mask = (jnp.arange(ids.shape[1])[None] < now[:, None]).astype(jnp.int32)
        logits = model.apply(params, {"input_ids": ids, "attention_mask": mask, "prompt_len": prompt_len}).logits
        return jnp.argmax(jnp.take_along_axis(logits, (now - 1)[:, None, None], axis=1)[:, 0], axis=-1)

    for i in range(n):
        ids[np.arange(len(prompts)), lengths + i] = next_token(ids, lengths + i)
    return [row[k : k + n].tolist() for row, k in zip(ids, lengths, strict=True)]


def adapted(model: Any) -> Any:
    """Weights under a LoRA on two of four layers, nothing zero: the stack is cut in three."""
    return bound(tiny.tiny(LoRA(rank=4, layers=(1, 2)), model=model, randomize=True))


def bound(t: tiny.Tiny) -> Any:
    store = tree.combine(t.parts.trainable, t.parts.const, t.parts.frozen)
    return bind(store["base"], store["overlay"])


# Taps as methods to come will write them ---------------------------------------------------------------------------------


@struct.dataclass
class SoftPrompt:
    """Puts columns [n, D] in front at the beginning; every later token stands n positions further on."""

    value: jax.Array

    def __call__(self, seq: Seq, _: Any) -> Seq:
        n, B = len(self.value), seq.positions.shape[0]
        if not seq.first:
            return dc.replace(seq, positions=seq.positions + n)

        def front(x: jax.Array, new: Any) -> jax.Array:
            return jnp.concatenate([jnp.broadcast_to(jnp.asarray(new, x.dtype), (B, n, *x.shape[2:])), x], axis=1)

        return dc.replace(
            seq,
            h=front(seq.h, self.value),
            positions=front(seq.positions + n, jnp.arange(n)),
            segments=front(seq.segments, ops.GLOBAL_SEGMENT),
            prompt_len=front(seq.prompt_len, 0),
        )


@struct.dataclass
class Prefix:
    """Keys and values [n, K, H] that everyone sees and that are in no cache."""

    k: jax.Array
    v: jax.Array

    def __call__(self, kv: KV, _: Seq, **around: jax.Array) -> KV:
        B, n = kv.k.shape[0], len(self.k)
        front = [jnp.broadcast_to(x, (B, *x.shape)) for x in (self.k, self.v)]
        flat = jnp.zeros((B, n), jnp.int32)
        join = lambda a, b: jnp.concatenate([a, b], axis=1)  # noqa: E731
        return KV(
            join(front[0], kv.k), join(front[1], kv.v), join(flat, kv.positions),
            join(flat + ops.GLOBAL_SEGMENT, kv.segments),
        )  # fmt: skip


@struct.dataclass
class LastOfPrompt:
    """Adds a vector [D] at the last position of the prompt."""

    value: jax.Array

    def __call__(self, h: jax.Array, seq: Seq) -> jax.Array:
        return jnp.where((seq.positions == seq.prompt_len - 1)[..., None], h + self.value, h)


def draws(*shape: int) -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(sum(shape)), shape)


TAPS = {
    "soft prompt": {"input/tap": SoftPrompt(draws(3, 32))},
    "prefix": {"layers[0:4]/attn_kv": Prefix(draws(4, 3, 2, 8), draws(4, 3, 2, 8))},
    "intervention": {"layers[1:2]/residual": LastOfPrompt(draws(1, 32))},
}

# The cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_cached_is_uncached_token_for_token(layers):
    model = tiny.llama(Numerics(layers=layers), **WANDERING)
    params = tiny.weights(model)
    got = answers(model, params, prompts_of(*LENGTHS), Sampling(), 64)
    assert got == uncached(model, params, prompts_of(*LENGTHS), 64)
    assert all(len(set(row)) > 10 for row in got), "answers that repeat themselves prove nothing"


def test_cached_is_uncached_with_an_adapter():
    model = tiny.llama(**WANDERING)
    got = answers(model, adapted(model), prompts_of(*LENGTHS), Sampling(), 24)
    assert got == uncached(model, adapted(model), prompts_of(*LENGTHS), 24)
    assert got != answers(model, tiny.weights(model), prompts_of(*LENGTHS), Sampling(), 24)


@pytest.mark.parametrize("name", TAPS)
def test_cached_is_uncached_with_taps(name):
    model = tiny.llama(**WANDERING)
    params = bind(tiny.weights(model), TAPS[name])
    got = answers(model, params, prompts_of(*LENGTHS), Sampling(), 24)
    assert got == uncached(model, params, prompts_of(*LENGTHS), 24)
    assert got != answers(model, tiny.weights(model), prompts_of(*LENGTHS), Sampling(), 24)


def test_a_soft_prompt_has_its_columns_in_the_cache():
    model = tiny.llama(**WANDERING)
    assert soft_columns(model, tiny.weights(model)) == 0
    params = bind(tiny.weights(model), {"input/tap": SoftPrompt(draws(12, 32))})
    assert soft_columns(model, params) == 12
    # 16 columns of prompt and 16 new tokens fill their buckets: without more room, writes would go astray.
    got = answers(model, params, prompts_of(16), Sampling(), 16)
    assert got == uncached(model, params, prompts_of(16), 16)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_the_cache_exists_once(layers):
    # Wide heads, so that the cache outweighs the attention scores of the prefill.
    wide = dict(num_hidden_layers=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=2048)
    model = tiny.llama(Numerics(layers=layers), **wide)
    params = jax.eval_shape(lambda: tiny.weights(model))
    rules = Rules(SamplingArrays.of(SAMPLED), jnp.array([2]), jnp.int32(0))
    B, P, length = 4, 16, 2048
    rows = Rows(jnp.full(B, 9), jnp.full(B, 512), row_keys(prompts_of(*LENGTHS), 0))
    ids = jax.ShapeDtypeStruct((B, P), jnp.int32)
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: model.new_cache(B, length))))

    first = prefill.lower(model, params, ids, rows.lengths, rows, rules, room=length - P).compile().memory_analysis()
    assert cache <= first.output_size_in_bytes < 1.1 * cache
    assert first.temp_size_in_bytes < 0.4 * cache
    carry = jax.eval_shape(lambda p, i: prefill(model, p, i, rows.lengths, rows, rules, room=length - P), params, ids)
    more = advance.lower(model, params, carry, rows, rules, jnp.int32(8)).compile().memory_analysis()
    assert more.alias_size_in_bytes >= cache
    assert more.temp_size_in_bytes < 0.4 * cache


# The batch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_is_its_rows_one_by_one(sampling):
    model = tiny.llama(**WANDERING)
    params, prompts = tiny.weights(model), prompts_of(3, 16, 40, 9)  # two buckets
    together = answers(model, params, prompts, sampling, 24)
    assert together == [answers(model, params, [p], sampling, 24)[0] for p in prompts]
    assert together[::-1] == answers(model, params, prompts[::-1], sampling, 24)


def test_draws_depend_on_the_seed_and_equal_prompts_differ():
    model = tiny.llama(**WANDERING)
    params, prompts = tiny.weights(model), prompts_of(7) * 3
    first = answers(model, params, prompts, SAMPLED, 16)
    assert first == answers(model, params, prompts, SAMPLED, 16)
    assert len({tuple(row) for row in first}) == 3
    assert first != answers(model, params, prompts, dc.replace(SAMPLED, seed=4), 16)


def test_pieces_of_any_size_join_to_the_same():
    model = tiny.llama(**WANDERING)
    params, prompts = tiny.weights(model), prompts_of(3, 9)
    whole = answers(model, params, prompts, SAMPLED, 70)  # more than one chunk
    assert whole == answers(model, params, prompts, SAMPLED, 70, every=3)
    assert [len(row) for row in whole] == [70, 70]


def test_rows_end_at_any_eos_and_at_their_limits():
    model = tiny.llama(**WANDERING)
    params, prompts = tiny.weights(model), prompts_of(3, 9, 5)
    free = answers(model, params, prompts, Sampling(), 32)
    eos = [free[0][4], free[1][0]]
    ends = [next((i for i, t in enumerate(row) if t in eos), 32) for row in free]
    assert answers(model, params, prompts, Sampling(), 32, eos=eos) == [r[:e] for r, e in zip(free, ends, strict=True)]
    limits = [1, 32, 17]
    assert answers(model, params, prompts, Sampling(), 0, limits=limits) == [
        r[:n] for r, n in zip(free, limits, strict=True)
    ]


def test_decoding_stops_on_the_device_when_all_rows_have_ended():
    model = tiny.llama(**WANDERING)
    params, prompts = tiny.weights(model), prompts_of(4, 4)
    free = answers(model, params, prompts, Sampling(), 32)
    at = next(i for i in range(4, 32) if free[0][i] not in [*free[0][:i], *free[1][: i + 1]])
    rules = Rules(None, jnp.array([free[0][at]]), jnp.int32(0))
    rows = Rows(jnp.array([4, 4]), jnp.array([32, 3]), row_keys(prompts, 0))
    ids = np.zeros((2, 16), np.int32)
    ids[:, 12:] = prompts
    carry = prefill(model, params, ids, rows.lengths, rows, rules, room=32)
    carry, tokens = advance(model, params, carry, rows, rules, jnp.int32(31))
    assert int(carry.count) == at + 1
    assert tokens[0].tolist() == [*free[0][1 : at + 1], *[0] * (64 - at)]
    assert tokens[1].tolist() == [*free[1][1:3], *[0] * 62], "pads after the limit"


def test_shards_give_the_same_tokens():
    model = tiny.llama(**WANDERING)
    params, prompts = tiny.weights(model), prompts_of(*LENGTHS)
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, tensor=2), jax.devices())
    store = {"base": params, "overlay": {}}
    placed = jax.device_put(store, Placement(mesh, axes_of_store(store, model.table)).tree(store))["base"]
    assert any(not x.sharding.is_fully_replicated for x in placed.values())
    assert answers(model, placed, prompts, Sampling(), 16) == answers(model, params, prompts, Sampling(), 16)


# Compilation ---------------------------------------------------------------------------------------------------------


@dc.dataclass(frozen=True)
class Counted(Llama):
    """Counts its traces: compiled code does not pass here."""

    traces: ClassVar[list[int]] = []

    def apply(self, params: Any, inputs: Any, **options: Any) -> Any:
        self.traces.append(1)
        return super().apply(params, inputs, **options)


def test_a_shape_bucket_compiles_once():
    model = Counted(tiny.llama(**WANDERING).config)
    params = tiny.weights(model)

    def traced(prompts: list[np.ndarray], sampling: Sampling, n: int, **options: Any) -> int:
        before = len(model.traces)
        answers(model, params, prompts, sampling, n, **options)
        return len(model.traces) - before

    assert traced(prompts_of(3, 9), SAMPLED, 12, eos=[2]) > 0
    for sampling in (SAMPLED, Sampling(temperature=0.1), Sampling(temperature=2.0, top_p=0.5, min_p=0.1, seed=9)):
        assert traced(prompts_of(16, 2), sampling, 16, eos=[7], every=5) == 0
    assert traced(prompts_of(3, 9), Sampling(), 12, eos=[2]) > 0, "greedy is a program of its own"
    assert traced(prompts_of(5, 5), Sampling(), 9, eos=[1]) == 0
    assert traced(prompts_of(3, 17), Sampling(), 9, eos=[1]) > 0, "another bucket"
    assert [bucket(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]


def test_bfloat16():
    model = tiny.llama(Numerics(dtype="bfloat16"), **WANDERING)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.weights(model))
    for sampling in (Sampling(), SAMPLED):
        assert [len(r) for r in answers(model, params, prompts_of(3, 9), sampling, 8)] == [8, 8]


# Sampling ------------------------------------------------------------------------------------------------------------


def kept(logits: Any, **options: Any) -> list[list[int]]:
    """Ids that stay, by row."""
    numbers = SamplingArrays.of(Sampling(**({"temperature": 1.0} | options)))
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in keep(jnp.asarray(logits, jnp.float32), numbers)]


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), [0, 1, 2, 3]),
        (dict(top_p=1e-9), [1]),
        (dict(top_p=0.5), [1]),  # the likeliest alone reaches 0.5
        (dict(top_p=0.51), [1, 3]),
        (dict(top_p=0.999), [0, 1, 2, 3]),
        (dict(top_k=1), [1]),
        (dict(top_k=3), [0, 1, 3]),
        (dict(top_k=99), [0, 1, 2, 3]),
        (dict(top_k=2, top_p=0.7), [1, 3]),  # of the two left, renormalised, the likelier has 0.625
        (dict(top_k=2, top_p=0.6), [1]),
        (dict(min_p=0.5), [1, 3]),
        (dict(min_p=1.0), [1]),
        (dict(min_p=0.5, temperature=2.0), [0, 1, 3]),
    ],
)
def test_what_is_kept(options, expected):
    p = [0.15, 0.5, 0.05, 0.3]
    assert kept([np.log(p)] * 2, **options) == [expected] * 2


def test_ties():
    assert kept([[1.0, 1.0, 1.0, 0.0]], top_k=2) == [[0, 1, 2]]  # as transformers: what ties with the last stays
    assert len(kept([[0.0] * 4], top_p=0.5)[0]) == 2


def test_nothing_left_out_changes_nothing():
    logits = jax.random.normal(jax.random.key(0), (3, 50))
    assert (keep(logits, SamplingArrays.of(Sampling(temperature=1.0))) == logits).all()


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.5), dict(top_k=5), dict(top_p=0.8), dict(min_p=0.2)])
def test_draws_follow_the_distribution(options):
    n, V = 20_000, 12
    logits = jnp.asarray(np.random.default_rng(1).normal(size=V), jnp.float32)
    sampling = Sampling(**({"temperature": 1.0} | options))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(n))
    drawn = np.bincount(draw(jnp.tile(logits, (n, 1)), keys, SamplingArrays.of(sampling)), minlength=V)
    allowed = kept([logits], **options)[0]
    assert len(allowed) > 1
    assert drawn.sum() == drawn[allowed].sum() == n
    z = np.asarray(logits, np.float64)[allowed] / sampling.temperature
    expected = n * np.exp(z) / np.exp(z).sum()
    assert stats.chisquare(drawn[allowed], expected).pvalue > 1e-3


def test_wrong_numbers_are_named_all_at_once():
    with pytest.raises(ConfigError) as e:
        Sampling(0, -1.0, -2, 1.5, ("",), -3, 2.0)
    assert str(e.value).splitlines() == [
        "sampling: 7 problems",
        "  max_new_tokens=0  expected at least 1",
        "  temperature=-1.0  expected a number >= 0",
        "  top_k=-2          expected at least 1, or 0 for all",
        "  top_p=1.5         expected a share > 0 and <= 1",
        "  stop=('',)        expected texts that are not empty",
        "  seed=-3           expected 0 to 2147483647",
        "  min_p=2.0         expected a share from 0 to 1",
    ]
    for wrong in (dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_p=0.0)):
        with pytest.raises(ConfigError, match="1 problem"):
            Sampling(**wrong)


# Text ----------------------------------------------------------------------------------------------------------------


def byte_fallback() -> PreTrainedTokenizerFast:
    """Words and bytes as Llama 2 has them; ids below tiny.VOCAB are specials, words and the bytes of a few characters."""
    words = ["▁the", "▁cat", "▁sat", "▁on", "▁a", "▁mat", ".", "\n", "s", "▁"]
    tokens = ["<pad>", "<s>", "</s>", *words, *(f"<0x{i:02X}>" for i in (*range(0x80, 0xC0), 0xC3, 0xE4, 0xF0, 0x61))]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes as GPT-2 has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


TOKENIZERS = {"byte fallback": byte_fallback, "byte level": byte_level}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def fallback():
    return byte_fallback()


def say(monkeypatch: pytest.MonkeyPatch, ids: list[int], rng: np.random.Generator) -> None:
    """Lets every model answer `ids`, in pieces of random size."""

    def fake(model: Any, params: Any, prompts: Any, sampling: Any, **_: Any) -> Any:
        at = 0
        while at < len(ids):
            n = int(rng.integers(1, 6))
            yield [ids[at : at + n]] * len(prompts)
            at += n

    monkeypatch.setattr(api, "decode", fake)


def utterance(tokenizer: Any, rng: np.random.Generator) -> list[int]:
    """Tokens of whole and broken characters, among words."""
    if tokenizer.bos_token_id is None:
        text = "".join(rng.choice(list("aé你😀. \n"), 12)).encode()
        return tokenizer.convert_tokens_to_ids(list(byte_chars(text + bytes(rng.choice([0xE4, 0x80, 0x41], 2)))))
    whole = ([3], [4], [5], [9], [10], [11], [12], bytes_of(tokenizer, "ä"), bytes_of(tokenizer, "你"), [13], [79])
    picked = [whole[i] for i in rng.integers(0, len(whole), 12)]
    return [t for group in picked for t in group]


def byte_chars(raw: bytes) -> str:
    """GPT-2's printable stand-ins for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in plain} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in plain)
    }
    return "".join(table[b] for b in raw)


def bytes_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids([f"<0x{b:02X}>" for b in text.encode()])


@pytest.mark.parametrize("stop", [(), (".",), ("cat", "t.", " a"), ("\n", "ä"), ("你",)], ids=str)
def test_a_stream_is_the_answer_in_pieces(tokenizer, stop, monkeypatch):
    model = tiny.llama(**WANDERING)
    params, rng = tiny.weights(model), np.random.default_rng(0)
    for _ in range(60):
        ids = utterance(tokenizer, rng)
        prompt = [1, 3] if tokenizer.bos_token_id == 1 else [40, 41]
        monkeypatch.setattr(api, "prompt_ids", lambda *_, p=prompt, **options: np.array(p))
        say(monkeypatch, ids, rng)
        pieces = list(api.stream(model, params, tokenizer, "x", Sampling(temperature=1.0, stop=stop)))
        whole = api.completion(tokenizer, prompt, ids, stop)
        assert "".join(pieces) == whole
        assert "" not in pieces
        if "\ufffd" not in whole:
            assert not any("\ufffd" in p for p in pieces)
        assert api.generate(model, params, tokenizer, ["x"], stop=stop) == [whole]
        found = api.generate_ids(model, params, tokenizer, [np.array(prompt)], Sampling(stop=stop))[0]
        assert found == ids[: len(found)]
        assert api.completion(tokenizer, prompt, found, stop) == whole


def test_characters_arrive_whole(fallback, monkeypatch):
    model = tiny.llama(**WANDERING)
    monkeypatch.setattr(api, "prompt_ids", lambda *_, **options: np.array([1, 3]))
    say(monkeypatch, [4, *bytes_of(fallback, "😀你"), 5], np.random.default_rng(0))
    pieces = list(api.stream(model, tiny.weights(model), fallback, "x", Sampling()))
    assert pieces == [" cat", "😀你 sat"]


def test_the_stop_text_that_is_complete_first_ends_the_answer(fallback):
    ids = [1], [3, 4, 5]  # "the cat sat" after nothing
    assert api.completion(fallback, *ids) == "the cat sat"
    assert api.completion(fallback, *ids, ("cat sat", "at")) == "the c"
    assert api.completion(fallback, *ids, ("sat", "at s")) == "the c"
    assert api.completion(fallback, *ids, ("at", "cat")) == "the "
    assert api.completion(fallback, *ids, ("dog",)) == "the cat sat"


def test_a_completion_keeps_its_first_space_and_drops_specials(fallback):
    assert api.completion(fallback, [1, 3], [4, 0, 5, 2]) == " cat sat"
    assert fallback.decode([4, 5]) == "cat sat"


def test_spaces_are_not_cleaned_up_behind_a_stream():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, ".": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=True)
    assert tokenizer.decode([1, 2, 3]) == "the cat."
    assert api.completion(tokenizer, [1], [2, 3]) == " cat ."


# Prompts and options --------------------------------------------------------------------------------------------------


def test_an_empty_prompt_begins_with_bos(fallback):
    assert api.prompt_ids(fallback, "").tolist() == [1]
    with pytest.raises(DataError, match="the prompt is empty, and the tokenizer has no BOS token to begin a text with"):
        api.prompt_ids(byte_level(), "")


def test_no_prompts_and_a_text_instead_of_a_list(fallback):
    model = tiny.llama()
    assert api.generate(model, tiny.weights(model), fallback, []) == []
    with pytest.raises(ConfigError, match=r"prompts='the cat': expected a list of texts, got one text. Write \[text\]"):
        api.generate(model, tiny.weights(model), fallback, "the cat")


def test_eos_of_tokenizer_and_config(fallback):
    model = tiny.llama(eos_token_id=(7, 5), vocab_size=81, **WANDERING)
    assert api.eos_ids(model, fallback) == [2, 5, 7]
    assert api.eos_ids(model, byte_level()) == [5, 7]
    ids = api.generate_ids(model, tiny.weights(model), fallback, prompts_of(*range(1, 9)), Sampling(200, 1.0))
    assert not {2, 5, 7} & {t for row in ids for t in row}
    assert any(len(row) < 200 for row in ids)


def test_a_prompt_that_fills_the_context(fallback):
    model = tiny.llama(max_position_embeddings=24)
    text = "prompt 2 of 2: 24 tokens leave no room for an answer in the model's context of 24"
    with pytest.raises(DataError) as e:
        api.generate_ids(model, tiny.weights(model), fallback, prompts_of(3, 24), Sampling(4))
    assert str(e.value) == text
    params = bind(tiny.weights(model), TAPS["soft prompt"])
    with pytest.raises(DataError, match="21 tokens leave .* in the model's context of 24 less 3 for the soft prompt"):
        api.generate_ids(model, params, fallback, prompts_of(21), Sampling(4))


def test_answers_are_clipped_to_the_context_row_by_row(fallback):
    model = tiny.llama(**(WANDERING | dict(max_position_embeddings=24)))
    params, prompts = tiny.weights(model), prompts_of(20, 9, 3, 15)
    text = (
        "prompt 1 of 4: 20 tokens + 12 new ones exceed the model's context of 24: its answer ends after 4 "
        "(3 prompts are too long for 12; this is the longest)"
    )
    with pytest.warns(UserWarning) as caught:
        got = api.generate_ids(model, params, fallback, prompts[:1] + prompts[2:] + prompts[3:], Sampling(12))
    assert [str(w.message) for w in caught] == [text]
    assert [len(row) for row in got] == [4, 12, 9, 9]
    assert got[0] == answers(model, params, prompts[:1], Sampling(), 4)[0]
    with pytest.warns(UserWarning, match=r"prompt 1 of 1: 20 tokens \+ 12 new ones .* its answer ends after 4$"):
        api.generate_ids(model, params, fallback, prompts[:1], Sampling(12))


def test_the_front_door(fallback):
    model = tiny.llama(vocab_size=81, **WANDERING)
    params = tiny.weights(model)
    prompts = ["a", "aa"]
    assert [api.prompt_ids(fallback, p).tolist() for p in prompts] == [[80], [80, 80]]
    options = dict(max_new_tokens=20, temperature=0.8, top_k=9, seed=1, stop="s")
    texts = ftjax.generate(model, params, fallback, prompts, **options)
    assert texts == api.generate(model, params, fallback, prompts, 20, 0.8, 9, 1.0, ("s",), 1)
    sampling = Sampling(20, 0.8, 9, 1.0, ("s",), 1)
    assert texts == ["".join(api.stream(model, params, fallback, p, sampling)) for p in prompts]


def test_the_function_is_not_lost_behind_the_package_of_its_name():
    ask = "assert ftjax.generate(None, {}, None, []) == []"
    code = f"import ftjax; {ask}; {ask}; import ftjax.generate.api; {ask}; from ftjax import generate as f; f(0, {{}}, 0, [])"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(ftjax.__file__).parents[1])
