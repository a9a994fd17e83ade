"""Distillation: the size of its gradients, a teacher that stays as it is and is kept nowhere, refusals, a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import subjaxprs

from ftjax.config import Run
from ftjax.data.new_tokenizer import train_tokenizer
from ftjax.data.rows import Row
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError
from ftjax.headspec import HeadSpec
from ftjax.models import hf
from ftjax.models.base import Numerics
from ftjax.models.sources import Pretrained, embedded_folder
from ftjax.models.thinned import thin
from ftjax.objectives.distill import DistillCausalLM, DistillClassification
from ftjax.peft.full import Full
from ftjax.train.teacher import load_teacher
from ftjax.verbs import main
from tests import tiny, tinymodels


def logits(seed: int, shape=(5, 7)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def gradient(objective, known, z):
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}
    return jax.grad(lambda z: objective.distance(known, z, hyper).sum())(z)


# The divergence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_gradient_is_T_times_the_difference_of_the_distributions(T):  # noqa: N802
    known, z = logits(0), logits(1)
    want = T * (jax.nn.softmax(z / T) - jax.nn.softmax(known / T))
    np.testing.assert_allclose(gradient(DistillCausalLM(temperature=T), known, z), want, atol=2e-6)


@pytest.mark.parametrize(("divergence", "share"), [("forward_kl", 1.0), ("reverse_kl", 1.0), ("jsd", 0.3 * 0.7)])
def test_gradient_keeps_its_size_when_the_temperature_rises(divergence, share):
    """For large T it is (z - z') / C of centred logits, whatever T is (arXiv:1503.02531, eq. 4); JSD: b (1 - b) of it."""
    known, z = (x - x.mean(-1, keepdims=True) for x in (logits(0), logits(1)))
    for T in (50.0, 100.0):
        g = gradient(DistillCausalLM(temperature=T, divergence=divergence, beta=0.3), known, z)
        np.testing.assert_allclose(g, share * (z - known) / z.shape[-1], atol=0.02)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_nothing_to_learn_from_oneself(divergence):
    objective = DistillCausalLM(divergence=divergence)
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}
    z = logits(0)
    assert float(jnp.abs(objective.distance(z, z + 3.0, hyper)).max()) < 1e-6
    assert float(objective.distance(z, logits(1), hyper).min()) > 0.01
    assert float(jnp.abs(objective.distance_each(z, z, hyper)).max()) < 1e-6


# The step --------------------------------------------------------------------------------------------------------------


def sizes(jaxpr):
    """Elements of every array that a program makes, inner programs included."""
    for e in jaxpr.eqns:
        yield from (v.aval.size for v in e.outvars)
    for inner in subjaxprs(jaxpr):
        yield from sizes(inner)


@pytest.mark.parametrize("peft", [None, Full()], ids=["lora", "full"])
def test_the_logits_of_all_tokens_never_exist(peft):
    def largest(chunk):
        numerics = Numerics(loss_chunk=chunk)
        model = tiny.llama(numerics, vocab_size=1999, tie_word_embeddings=False, hidden_size=16)
        run = tiny.tiny(peft, DistillCausalLM(), model=model)
        batch = tiny.batch(8, micro=1)
        return max(sizes(jax.jit(run.program.train).trace(run.state, run.frozen, batch).jaxpr.jaxpr))

    everything = 8 * tiny.LENGTH * 1999
    assert largest(0) >= everything > 2 * largest(32)


def test_a_teacher_is_not_differentiated_and_stays_as_it_is():
    run = tiny.tiny(Full(), DistillCausalLM(alpha=1.0))
    before = jax.tree.map(np.asarray, run.frozen.teacher)
    batch = tiny.batch(8, micro=2)

    def loss(teacher):
        frozen = run.frozen.replace(teacher=teacher)
        out = run.program.output(
            run.state.trainable, {}, run.state, frozen, jax.tree.map(lambda x: x[0], batch), jax.random.key(0)
        )
        return out.sums["divergence"]

    value, grads = jax.jit(jax.value_and_grad(loss))(run.frozen.teacher)
    assert float(value) > 0 and tiny.largest(grads, jax.tree.map(jnp.zeros_like, grads)) == 0
    step, state, losses = jax.jit(run.program.train), run.state, []
    for _ in range(4):
        state, metrics = step(state, run.frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(run.frozen.teacher), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


# Refusals --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_folder())


def decoder(folder: Path, *, vocab: int = 4096, seed: int = 1, tokenizer=embedded_folder(), **numbers):  # noqa: B008
    model = tiny.llama(vocab_size=vocab, **numbers)
    hf.save(model, tiny.weights(model, seed), folder, tokenizer_from=tokenizer)
    return model


def classifier(folder: Path, labels: tuple[str, ...], problem: str = "") -> None:
    small = tinymodels.known()["bert"]()
    shape = type(small.config).from_hf(small.config.to_hf() | {"vocab_size": 4096})
    model = type(small)(shape, Numerics(), HeadSpec("sequence_classification", labels, problem))
    hf.save(model, tiny.weights(model), folder, tokenizer_from=embedded_folder())


def loaded(objective, student, tokenizer):
    notes: list[str] = []
    return load_teacher(Run(objective=objective), student, tokenizer, Numerics(), say=notes.append), notes


def test_refuses_other_tokens(tmp_path, tokenizer):
    student = tiny.llama(vocab_size=4096)
    teach = lambda name: loaded(DistillCausalLM(teacher=Pretrained(path=str(tmp_path / name))), student, tokenizer)  # noqa: E731
    want = decoder(tmp_path / "good", hidden_size=48)
    (model, weights), notes = teach("good")
    assert model == want and not notes and weights.keys() == tiny.weights(want).keys()

    decoder(tmp_path / "wide", vocab=4100)
    with pytest.raises(ConfigError, match=r"vocab_size=4100  the student's is 4096"):
        teach("wide")
    decoder(tmp_path / "narrow", vocab=300)
    with pytest.raises(ConfigError, match=r"(?s)the student's is 4096.*the run's tokenizer has ids up to 4095"):
        teach("narrow")
    rows = [Row({"text": f"something else {i}"}, "") for i in range(50)]
    train_tokenizer("bpe", rows, 300, tmp_path / "words")
    decoder(tmp_path / "foreign", tokenizer=tmp_path / "words")
    with pytest.raises(ConfigError, match=r"tokens differ from the run's; the first: id \d+ is .*, there "):
        teach("foreign")
    decoder(tmp_path / "bare", tokenizer=None)
    assert "has no tokenizer" in teach("bare")[1][0]
    with pytest.raises(ConfigError, match="llama has no head 'masked_lm'"):
        student = tinymodels.known()["bert"]()
        teach("good")


def test_refuses_other_labels(tmp_path, tokenizer):
    head = HeadSpec("sequence_classification", ("bad", "good"), "single_label_classification")
    student = tinymodels.known()["bert"](head=head)

    def teach(name, *labels, **more):
        classifier(tmp_path / name, labels, **more)
        return loaded(DistillClassification(teacher=Pretrained(path=str(tmp_path / name))), student, tokenizer)

    (model, _), notes = teach("same", "bad", "good")
    assert model.head.labels == ("bad", "good") and not notes
    assert "does not name its labels: taken to be bad, good" in teach("unnamed", "LABEL_0", "LABEL_1")[1][0]
    with pytest.raises(ConfigError, match="its label 0 is 'good', the data's is 'bad'; names and order"):
        teach("turned", "good", "bad")
    with pytest.raises(ConfigError, match=r"knows 3 labels \(bad, good, new\), the data 2 \(bad, good\)"):
        teach("more", "bad", "good", "new")
    with pytest.raises(ConfigError, match="was trained for multi_label_classification, the data is single_label"):
        teach("several", "bad", "good", problem="multi_label_classification")
    small = tinymodels.known()["bert"]()
    hf.save(small, tiny.weights(small), tmp_path / "untrained")
    with pytest.raises(ConfigError, match="has a head 'masked_lm'; a teacher needs 'sequence_classification'"):
        loaded(DistillClassification(teacher=Pretrained(path=str(tmp_path / "untrained"))), student, tokenizer)


# From the command line -------------------------------------------------------------------------------------------------

CONFIG = """
from ftjax.config import Checkpoint, Compute, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.distill import DistillCausalLM
from ftjax.peft.lora import LoRA

def get_config():
    return Run(
        name="x", model=Pretrained(path="student"), peft=LoRA(rank=4), data=Local(path="train.jsonl", eval_share=0.2),
        objective=DistillCausalLM(teacher=Pretrained(path="teacher", dtype="bfloat16"), alpha=0.9),
        loader=Loader(max_length=16), optim=Optim(lr=1e-2), train=Train(steps=12, batch=8, log_every=4),
        evaluate=Evaluate(examples=8, generate=1, max_new_tokens=2), checkpoint=Checkpoint(every=6),
        compute=Compute(cache=""),
    )
"""


def test_from_two_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    decoder(Path("student"), seed=0, num_hidden_layers=2)
    decoder(Path("teacher"), hidden_size=64, num_hidden_layers=3)
    rows = [{"prompt": f"{i} and ", "completion": f"{i + 1} is a number"} for i in range(40)]
    Path("train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("x.py").write_text(CONFIG)
    assert main(["--config", "x.py"]) == 0
    lines = [json.loads(x) for x in Path("runs/x/metrics.jsonl").read_text().splitlines()]
    first, *_, last = (x for x in lines if x["event"] == "eval")
    assert last["loss"] < first["loss"] and first["perplexity"] > np.exp(min(first["loss"], 5.0)) / 100
    teacher = sum(p.stat().st_size for p in Path("teacher").glob("*.safetensors")) / 2
    for kept in ("checkpoints", "adapter"):
        size = sum(
            p.stat().st_size for p in Path("runs/x", kept).rglob("*") if p.is_file() and p.name != "tokenizer.json"
        )
        assert 0 < size < teacher / 2, kept
    assert json.loads(Path("runs/x/config.json").read_text())["objective"]["teacher"]["path"] == "teacher"
    decoder(Path("teacher"), vocab=4100)
    capsys.readouterr()
    assert main(["--config", "x.py", "name=y"]) == 2
    assert "objective.teacher.path=teacher" in capsys.readouterr().err


# A student that begins with some of the teacher's layers -----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "modernbert", "distilbert"])
def test_some_layers(family, tmp_path):
    model = tinymodels.known()[family]()
    params = tiny.weights(model)
    small, some = thin(model, params, ())
    assert small.config.num_hidden_layers == (model.config.num_hidden_layers + 1) // 2
    same, everything = thin(model, params, range(model.config.num_hidden_layers))
    assert same == model and everything.keys() == params.keys() and tiny.largest(params, everything) == 0
    hf.save(small, some, tmp_path)
    again, read = hf.load(str(tmp_path))
    assert again.table == small.table and read.keys() == some.keys()
    inputs = {"input_ids": jnp.arange(3, 12, dtype=jnp.int32)[None]}
    assert (again.apply(read, inputs).logits == small.apply(some, inputs).logits).all()


def test_refuses_layers_that_are_not_there():
    model = tiny.llama()
    for layers in ((0, 4), (2, 1), (1, 1), (-1, 2)):
        with pytest.raises(ConfigError, match="must ascend, from 0 to at most 3; the model has 4 layers"):
            thin(model, tiny.weights(model), layers)
    for family, text in (("t5", "no plain stack"), ("modernbert", "keep it first")):
        other = tinymodels.known()[family]()
        with pytest.raises(ConfigError, match=text):
            thin(other, tiny.weights(other), (1,))


def test_a_thinned_student_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    decoder(Path("teacher"), hidden_size=16)
    rows = [{"prompt": f"{i} and ", "completion": f"{i + 1} is a number"} for i in range(40)]
    Path("train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("x.py").write_text(CONFIG)
    assert main(["--config", "x.py", "model=thinned", "model.path=teacher", "peft=full", "train.steps=2"]) == 0
    model, params = hf.load("runs/x/model")
    assert model.config.num_hidden_layers == 2 and {x.shape for x in params.values()}
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in tiny.weights(model).items()}
