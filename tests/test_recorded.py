"""A teacher asked once: the same losses as the live one, numbers that stay with their tokens, a cache that is never stale."""

from __future__ import annotations

import dataclasses as dc
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import subjaxprs

from ftjax.config import Compute, Loader, Run, Train
from ftjax.data.batches import Examples
from ftjax.data.recorded import RecordedBatch, plain, recorded
from ftjax.data.tasks.local import Local
from ftjax.errors import ConfigError
from ftjax.headspec import HeadSpec
from ftjax.models import hf
from ftjax.models.base import Numerics
from ftjax.models.sources import Pretrained
from ftjax.objectives.distill import DistillCausalLM, DistillClassification, DistillMaskedLM
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA
from ftjax.peft.sparse import Sparse
from ftjax.train.recorded import known
from ftjax.train.setup import compile_train
from ftjax.verbs import main
from tests import tiny, tinymodels
from tests.preferences import WORDS, drawn, project, setup_of
from tests.test_distill import CONFIG, decoder

SMALL = LoRA(rank=2, targets=("q_proj",))


def teacher(root, name="teacher", seed=7):
    """A folder with the vocabulary of the base, one layer, other weights."""
    vocab = hf.load(str(root / "base"))[0].config.vocab_size
    model = tiny.llama(vocab_size=vocab, num_hidden_layers=1, hidden_size=16, eos_token_id=(2,), bos_token_id=1)
    hf.save(model, tiny.weights(model, seed), root / name, tokenizer_from=root / "base")
    return vocab


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp("recorded"), rows=20)
    teacher(folder)
    text = lambda i: {"prompt": f"{WORDS[i % 10]} {i}", "completion": " " + " ".join(WORDS[i % 3 : 3 + i % 7])}  # noqa: E731
    (folder / "sft.jsonl").write_text("".join(json.dumps(text(i)) + "\n" for i in range(20)))
    label = lambda i: {"text": f"{WORDS[i % 10]} {WORDS[i % 7]}", "label": ["bad", "fine", "good"][i % 3]}  # noqa: E731
    (folder / "labels.jsonl").write_text("".join(json.dumps(label(i)) + "\n" for i in range(20)))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


def setup_for(root, objective=None, *, name="teacher", loader=None, **parts):
    """A setup of distillation, before its teacher was asked."""
    objective = (objective or DistillCausalLM(top_k=4)).model_copy(
        update={"teacher": Pretrained(path=str(root / name))}
    )
    data = Local(path=str(root / "sft.jsonl"), eval_share=0.2)
    loader = loader or Loader(max_length=24, packing="none")
    given = {"data": data, "peft": SMALL, "compute": Compute(cache="", loss_chunk=40)}
    return setup_of(root, objective=objective, loader=loader, **(given | parts))


def asked(*args, say=lambda text: None, **parts):
    return known(setup_for(*args, **parts), say=say)


def evaluated(setup, batch):
    return jax.jit(setup.program.evaluate)(setup.state, setup.frozen, jax.tree.map(jnp.asarray, batch))["terms"]


# The same as the live teacher --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["none", "bfd"])
def test_the_whole_vocabulary_is_the_live_teacher(root, packing):
    loader = Loader(max_length=24, packing=packing)
    vocab = teacher(root)
    numbers = {"alpha": 0.7, "temperature": 3.0, "label_smoothing": 0.1}
    live = setup_for(root, DistillCausalLM(**numbers), loader=loader, peft=Full())
    once = asked(root, DistillCausalLM(top_k=vocab, **numbers), loader=loader, peft=Full())
    assert live.frozen.teacher is not None
    assert once.frozen.teacher is None and once.program.teacher is None and once.asked is None
    one, two = live.batches.next(), once.batches.next()
    assert packing == "none" or one.segments.max() > 0
    for name in ("tokens", "positions", "segments", "weights"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))

    def gradients(setup, batch):
        first = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)

        def loss(trainable):
            out = setup.program.output(trainable, {}, setup.state, setup.frozen, first, jax.random.key(0))
            return out.sums["divergence"], out

        (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(setup.state.trainable)
        assert value > 0.1
        return out.sums, out.metrics, grads

    a, b = gradients(live, one), gradients(once, two)
    assert tiny.relative(b[:2], a[:2]) < 1e-5
    assert tiny.relative(b[2], a[2]) < 1e-5


def test_evaluation_reads_the_teacher_too(root):
    vocab = teacher(root)
    setups = setup_for(root, DistillCausalLM()), asked(root, DistillCausalLM(top_k=vocab))
    one, two = (evaluated(s, s.data.eval.build([[0], [1], [2]], s.batches.length, count=4)) for s in setups)
    assert tiny.relative(two, one) < 1e-5


@pytest.mark.parametrize("several", [False, True])
def test_classes(root, several):
    head = HeadSpec("sequence_classification", ("bad", "fine", "good"))
    bert = tinymodels.known()["bert"]()
    shape = type(bert.config).from_hf(bert.config.to_hf() | {"vocab_size": teacher(root), "num_hidden_layers": 1})
    model = type(bert)(shape, Numerics(), head)
    hf.save(model, tiny.weights(model, 3), root / "judge", tokenizer_from=root / "base")
    path = root / "labels.jsonl"
    if several:
        rows = [json.loads(x) for x in path.read_text().splitlines()]
        path = root / "several.jsonl"
        path.write_text("".join(json.dumps(r | {"label": [r["label"]]}) + "\n" for r in rows))
    parts = {
        "name": "judge",
        "data": Local(path=str(path), eval_share=0.2),
        "model": Pretrained(path=str(root / "judge")),
    }
    said: list[str] = []
    live = setup_for(root, DistillClassification(), peft=Full(), **parts)
    once = asked(root, DistillClassification(cached=True), peft=Full(), say=said.append, **parts)
    assert "the teacher's logits of 20 texts (12 bytes a text" in said[0]
    assert once.frozen.teacher is None
    # At the start the student is the teacher: it is moved.
    live, once = (dc.replace(s, state=dc.replace(s.state, trainable=drawn(s.state.trainable))) for s in (live, once))
    one, two = (evaluated(s, jax.tree.map(lambda x: x[0], s.batches.next())) for s in (live, once))
    assert one["divergence"][0] > 0.01 and tiny.relative(two, one) < 1e-5
    batch = once.data.eval.build([[0], [2]], once.batches.length, count=3)
    assert np.abs(batch.said[:2]).min() > 0 and (batch.said[2] == 0).all()


# Numbers that stay with their tokens -------------------------------------------------------------------------------------


def examples(n=7, k=3):
    """Examples whose numbers say which token they belong to."""
    lengths = np.asarray([3 + i % 4 for i in range(n)])
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(offsets[-1], dtype=np.int32)
    given = Examples(ids, offsets, np.arange(n), tuple(map(str, range(n))), np.ones(len(ids), np.float32))
    beside = {
        "top_ids": ids[:, None] * 10 + np.arange(k, dtype=np.int32),
        "top_log_p": -ids[:, None].astype(np.float32) * np.ones(k, np.float32),
    }
    return given, recorded(given, beside)


def test_numbers_go_where_their_token_goes():
    given, known = examples()
    rows = [[3, 0], [6], [1, 5]]
    batch, same = known.build(rows, 12, count=4), given.build(rows, 12, count=4)
    assert isinstance(batch, RecordedBatch)
    for name in ("tokens", "positions", "segments", "weights"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(same, name))
    real = batch.segments >= 0
    np.testing.assert_array_equal(batch.top_ids[real][:, 0], batch.tokens[real] * 10)
    np.testing.assert_array_equal(batch.top_log_p[real][:, 2], -batch.tokens[real])
    assert not batch.top_ids[~real].any() and not batch.top_log_p[~real].any()
    taken = known.take(np.asarray([4, 2]))
    np.testing.assert_array_equal(taken.top_ids[:, 0], taken.input_ids * 10)
    np.testing.assert_array_equal(plain(known).input_ids, given.input_ids)


def test_order_micro_batches_and_resuming_are_those_of_the_plain_examples(root):
    train = {"train": Train(steps=4, batch=16, accumulate=2), "loader": Loader(max_length=24)}
    plainly, once = setup_for(root, DistillCausalLM(), **train), asked(root, **train)
    assert once.batches.fingerprint == plainly.batches.fingerprint
    batches = [once.batches.next() for _ in range(3)]
    for batch in batches:
        np.testing.assert_array_equal(batch.tokens, plainly.batches.next().tokens)
        assert batch.top_ids.shape == (2, 8, 24, 4)
    again = asked(root, **train)
    again.batches.restore({"next_index": 2})
    assert tiny.largest(batches[2], again.batches.next()) == 0
    # Of every token the first of its numbers is the likeliest under the teacher itself.
    model, weights = hf.load(str(root / "teacher"))
    for batch in batches:
        inputs = {
            k: batch.__dict__[v][0]
            for k, v in (("input_ids", "tokens"), ("positions", "positions"), ("segments", "segments"))
        }
        z = np.asarray(model.apply(weights, inputs).logits)
        real = batch.segments[0] >= 0
        np.testing.assert_array_equal(batch.top_ids[0, ..., 0][real], z.argmax(-1)[real])


# The cache ---------------------------------------------------------------------------------------------------------------


def test_only_the_same_teacher_and_data_find_the_cache(root, tmp_path):
    said: list[str] = []

    def status(objective=None, **parts):
        found = asked(root, objective, say=said.append, **parts)
        return found, said[-1].split("cache: ")[1].split(" ")[0]

    (first, one), (second, two) = status(), status()
    assert (one, two) == ("miss", "hit")
    assert "the teacher's 4 likeliest at each of" in said[-1] and "(32 bytes a token" in said[-1]
    assert tiny.largest(first.batches.next(), second.batches.next()) == 0
    assert status(DistillCausalLM(top_k=4, temperature=1.0, alpha=0.1))[1] == "hit"  # they do not decide the numbers
    assert status(DistillCausalLM(top_k=5))[1] == "miss"
    assert status(loader=Loader(max_length=12, packing="none"))[1] == "miss"
    teacher(root, "other", seed=8)
    assert status(name="other")[1] == "miss" and status(name="other")[1] == "hit"
    teacher(root, "other", seed=9)  # the same folder, trained anew
    assert status(name="other")[1] == "miss"
    changed = tmp_path / "sft.jsonl"
    changed.write_text((root / "sft.jsonl").read_text().replace("cat", "dog"))
    assert status(data=Local(path=str(changed), eval_share=0.2))[1] == "miss"
    assert status()[1] == "hit"


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """A run misses the cache, its evaluation finds it."""
    monkeypatch.chdir(tmp_path)
    decoder(Path("student"), seed=0, num_hidden_layers=1)
    decoder(Path("teacher"), hidden_size=16, num_hidden_layers=1)
    rows = [{"prompt": f"{i} and ", "completion": f"{i + 1} is a number"} for i in range(40)]
    Path("train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("x.py").write_text(CONFIG)
    assert main(["--config", "x.py", "objective.top_k=8", "train.steps=2", "evaluate.generate=0"]) == 0
    assert "(64 bytes a token" in (text := capsys.readouterr().out) and "cache: miss" in text
    assert main(["eval", "--run", "runs/x"]) == 0
    assert "cache: hit" in capsys.readouterr().out


# The step ----------------------------------------------------------------------------------------------------------------


def sizes(jaxpr):
    """Elements of every array that a program makes, inner programs included."""
    for e in jaxpr.eqns:
        yield from (v.aval.size for v in e.outvars)
    for inner in subjaxprs(jaxpr):
        yield from sizes(inner)


def test_the_logits_of_all_tokens_never_exist_and_the_step_is_smaller(root):
    def largest(chunk):
        run = tiny.tiny(Full(), DistillCausalLM(top_k=4), model=tiny.llama(Numerics(loss_chunk=chunk), vocab_size=1999))
        b, beside = tiny.batch(8, micro=1), jnp.zeros((1, 8, tiny.LENGTH, 4))
        batch = RecordedBatch(b.tokens, b.positions, b.segments, b.weights, beside.astype(jnp.int32), beside)
        return max(sizes(jax.jit(run.program.train).trace(run.state, run.frozen, batch).jaxpr.jaxpr))

    everything = 8 * tiny.LENGTH * 1999
    assert largest(0) >= everything > 2 * largest(32)
    flat = Compute(cache="", layers="unroll", loss_chunk=0)
    live, once = (setup_for(root, DistillCausalLM(top_k=k), compute=flat) for k in (0, 4))
    flops = [compile_train(s).cost_analysis()["flops"] for s in (live, once)]
    assert flops[1] < flops[0]


def test_forgotten_numbers_are_not_zeros(root):
    setup = setup_for(root)
    batch = setup.batches.next()
    assert np.isnan(batch.top_log_p[batch.segments >= 0]).all()
    assert setup.data.train.top_log_p.strides == (0, 0)  # they take no memory


def test_refusals(root):
    def told(objective, **parts):
        return "\n".join(objective.check(Run(objective=objective, **parts)))

    for other in ("reverse_kl", "jsd"):
        assert f"objective.top_k=8  objective.divergence={other} needs" in told(
            DistillCausalLM(top_k=8, divergence=other)
        )
        assert "top_k" not in told(DistillCausalLM(divergence=other))
    assert "hidden=1  it needs a teacher at every step" in told(DistillCausalLM(top_k=8, hidden=1.0))
    assert "hidden=1  it needs a teacher at every step" in told(DistillClassification(cached=True, hidden=1.0))
    assert "begins with gradients" in told(DistillCausalLM(top_k=8), peft=Sparse(choose="fisher"))
    with pytest.raises(ConfigError, match=r"objective\.top_k=999: the vocabulary has \d+ tokens"):
        setup_for(root, DistillCausalLM(top_k=999))
    with pytest.raises(ValueError, match="top_k"):
        DistillMaskedLM(top_k=8)  # pyright: ignore[reportCallIssue]
