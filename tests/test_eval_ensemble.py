"""Ensembles at evaluation: Jensen's inequality, ties of a vote, trained classifiers, language models from run folders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import ConfigError
from ftjax.evals import ensemble
from ftjax.evals.ensemble import MEAN_OF_LOGITS, MEAN_OF_PROBABILITIES, VOTE
from ftjax.headspec import HeadSpec
from ftjax.objectives.classification import Classification
from ftjax.peft.lora import LoRA
from ftjax.regimes.ensemble import Predictions, measured
from ftjax.train.setup import prepare
from ftjax.verbs import main
from tests import tiny
from tests.test_average import config_of, small_project
from tests.test_soup import moved, plant


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
def test_the_mean_of_probabilities_is_at_least_as_likely_as_the_members(scale):
    rng = np.random.default_rng(0)
    z, y = scale * rng.normal(size=(4, 200, 5)).astype(np.float32), rng.integers(0, 5, 200)
    found = ensemble.classification({str(i): x for i, x in enumerate(z)}, y)
    assert found[MEAN_OF_PROBABILITIES]["nll"] < np.mean([found[str(i)]["nll"] for i in range(4)])
    nll = -np.log(np.maximum(softmax(z.astype(np.float64)), 1e-300))[:, np.arange(200), y]
    both = ensemble.tokens({str(i): x for i, x in enumerate(nll)}, np.ones(200))
    assert both[MEAN_OF_PROBABILITIES]["nll"] <= nll.mean()


def test_the_numbers_are_the_definitions():
    rng = np.random.default_rng(1)
    z, y = rng.normal(size=(3, 50, 4)), rng.integers(0, 4, 50)
    found = ensemble.classification(dict(zip("abc", z, strict=True)), y)
    p = softmax(z)
    for name, mean in {"b": p[1], MEAN_OF_PROBABILITIES: p.mean(0), MEAN_OF_LOGITS: softmax(z.mean(0))}.items():
        assert found[name]["nll"] == pytest.approx(-np.log(mean[np.arange(50), y]).mean())
        assert found[name]["accuracy"] == (mean.argmax(-1) == y).mean()
        assert 0 < found[name]["ece"] < 1
    assert "nll" not in found[VOTE]
    w = rng.random(50)
    nll = -np.log(p[:, np.arange(50), y])
    each = ensemble.tokens(dict(zip("abc", nll, strict=True)), w)
    assert each["c"]["nll"] == pytest.approx((nll[2] * w).sum() / w.sum())
    mixed = -np.log(p[:, np.arange(50), y].mean(0))
    assert each[MEAN_OF_PROBABILITIES]["nll"] == pytest.approx((mixed * w).sum() / w.sum())
    assert each["a"]["perplexity"] == pytest.approx(np.exp(each["a"]["nll"]))


def test_ties_of_a_vote_go_to_the_larger_mean_probability_then_to_the_lower_number():
    p = np.array([
        [[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.5, 0.3, 0.2], [0.7, 0.3, 0.0]],
        [[0.1, 0.9, 0.0], [0.6, 0.4, 0.0], [0.5, 0.1, 0.4], [0.7, 0.3, 0.0]],
        [[0.0, 0.1, 0.9], [0.1, 0.1, 0.8], [0.1, 0.2, 0.7], [0.0, 0.0, 1.0]],
    ]) + 1e-12  # fmt: skip
    winner, share = ensemble.majority(np.log(p))
    # One vote each: class 1 has the largest mean; one each: 0 and 1 have 1.1 / 3, class 2 less, and 0 is the lower number.
    assert winner.tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(share[2], [2 / 3, 0, 1 / 3])
    found = ensemble.classification({str(i): np.log(x) for i, x in enumerate(p)}, np.array([1, 0, 0, 2]))
    assert found[VOTE]["accuracy"] == 0.75


def test_two_trained_classifiers():
    model, objective = tiny.llama(head=HeadSpec("sequence_classification", ("a", "b", "c"))), Classification()
    data, held = tiny.batch_for(objective, 12, micro=1), tiny.labelled(40, seed=7)
    t = tiny.tiny(LoRA(rank=2), objective, model=model)
    step, evaluate, said = jax.jit(t.program.train), jax.jit(t.program.evaluate), {}
    for seed in (0, 1):
        state = tiny.tiny(LoRA(rank=2), objective, model=model, seed=seed).state
        for _ in range(8):
            state, _ = step(state, t.frozen, data)
        rows = jax.device_get(evaluate(state, t.frozen, jax.tree.map(jnp.asarray, held))["rows"])
        real = rows["weights"] > 0
        said[str(seed)] = Predictions(rows["logits"][real], rows["labels"][real], rows["weights"][real])
    found = measured(said)
    assert abs(found["0"]["nll"] - found["1"]["nll"]) > 1e-4  # they differ
    assert found[MEAN_OF_PROBABILITIES]["nll"] < (found["0"]["nll"] + found["1"]["nll"]) / 2
    first = said["0"]
    with pytest.raises(ConfigError, match="b and a have other held-out labels"):
        measured({"a": first, "b": Predictions(first.values, first.truth[::-1], first.weights)})
    with pytest.raises(ConfigError, match="b predicts 2 classes, but a 3 classes"):
        measured({"a": first, "b": Predictions(first.values[:, :2], first.truth, first.weights)})


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    small_project(tmp_path)
    return tmp_path


def planted(root, run):
    setup = prepare(run, say=lambda _: None)
    for name, size in {"a": 1.0, "b": -1.0}.items():
        plant(root / name, run, moved(setup.state, size))


def test_two_classifiers_by_the_command(project, capsys):
    lines = [f"{w} {i},{k}" for i in range(12) for k, w in zip(("x", "y"), ("red", "green"), strict=True)]
    (project / "labels.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    data = config_of("a").data.model_copy(update={"path": "labels.csv"})
    planted(project, config_of("a").model_copy(update={"objective": Classification(), "data": data}))
    assert main(["eval", "--runs", "a", "b"]) == 0
    rows = {" ".join(x.split()[:-3]): x.split()[-3:] for x in capsys.readouterr().out.splitlines()[-5:]}
    assert list(rows) == ["a", "b", MEAN_OF_PROBABILITIES, MEAN_OF_LOGITS, VOTE] and rows[VOTE][1] == "-"
    assert rows["a"][1] != rows["b"][1]
    assert float(rows[MEAN_OF_PROBABILITIES][1]) <= (float(rows["a"][1]) + float(rows["b"][1])) / 2


def test_two_language_models_by_the_command(project, capsys):
    planted(project, config_of("a"))
    assert main(["eval", "--runs", "a", "b", "evaluate.examples=4"]) == 0
    rows = {" ".join(x.split()[:-2]): x.split()[-2:] for x in capsys.readouterr().out.splitlines()[-3:]}
    assert float(rows[MEAN_OF_PROBABILITIES][0]) <= (float(rows["a"][0]) + float(rows["b"][0])) / 2
    assert main(["eval", "--run", "a", "evaluate.examples=4"]) == 0  # a member's number is what `eval` says of it alone
    assert f"held-out loss {float(rows['a'][0]):.4f}" in capsys.readouterr().out
    assert main(["eval", "--runs", "a", "b", "--run", "a"]) == 2
    assert "give either --runs" in capsys.readouterr().err
