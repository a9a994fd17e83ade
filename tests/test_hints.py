"""Hidden values as a target: which layers meet, what is asked of the models, and a projection that no export holds."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ftjax.errors import ConfigError
from ftjax.models.base import Numerics
from ftjax.objectives.distill import DistillCausalLM
from ftjax.objectives.hints import spread
from ftjax.peft.full import Full
from ftjax.peft.prompt import Prompt
from ftjax.verbs import main
from tests import tiny, tinymodels
from tests.test_distill import CONFIG, decoder


def test_layers_are_spread_evenly_and_the_last_meets_the_last():
    assert spread(4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))
    assert spread(2, 3) == ((0, 1), (1, 2))
    assert spread(3, 3) == ((0, 0), (1, 1), (2, 2))
    assert spread(4, 2) == ((0, 0), (1, 0), (2, 1), (3, 1))


def test_hidden_values_are_those_of_the_layers_however_they_run():
    model, inputs = tiny.llama(), {"input_ids": tiny.batch(2).tokens}
    weights = tiny.weights(model)
    out = model.apply(weights, inputs, layers=True)
    plain = model.apply(weights, inputs)
    assert plain.layers is None and (plain.hidden == out.hidden).all()
    last = model.norm.apply({"params": {"w": weights["norm/w"]}}, out.layers[-1])
    np.testing.assert_allclose(last, out.hidden, atol=1e-6)
    unrolled = tiny.llama(Numerics(layers="unroll")).apply(weights, inputs, layers=True)
    np.testing.assert_allclose(out.layers, unrolled.layers, atol=1e-5)
    assert out.layers.shape == (4, *out.hidden.shape)


def test_a_soft_prompt_has_no_hidden_values_of_its_own():
    t = tiny.tiny(Prompt(tokens=3), DistillCausalLM(hidden=1.0))
    out = t.program.evaluate(t.state, t.frozen, tiny.batch(2))
    assert np.isfinite(float(out["terms"]["hidden"][0]))


def test_the_term_alone_brings_the_student_nearer():
    t = tiny.tiny(Full(), DistillCausalLM(hidden=10.0, alpha=0.0))
    step, state, batch, far = jax.jit(t.program.train), t.state, tiny.batch(4, micro=2), []
    for _ in range(5):
        state, metrics = step(state, t.frozen, batch)
        far.append(float(metrics["terms"]["hidden"][0] / metrics["terms"]["hidden"][1]))
    assert far[-1] < 0.9 * far[0]


def test_refuses_layers_that_are_not_there_and_families_that_give_none():
    rng, small, large = jax.random.key(0), tiny.llama(num_hidden_layers=2), tiny.llama(hidden_size=48)
    assert DistillCausalLM().learned(small, large, rng) == {}
    assert DistillCausalLM(hidden=1.0).learned(small, small, rng) == {}
    assert DistillCausalLM(hidden=1.0).learned(small, large, rng)["projection"].shape == (32, 48)
    for pair in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(ConfigError, match="is no pair of layers; the student has 2, the teacher 4"):
            DistillCausalLM(hidden=1.0, hidden_layers=(pair,)).learned(small, large, rng)
    with pytest.raises(ConfigError, match="the teacher, t5, gives no hidden values"):
        DistillCausalLM(hidden=1.0).learned(small, tinymodels.known()["t5"](), rng)


def test_a_projection_is_trained_kept_in_checkpoints_and_not_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    decoder(Path("student"), seed=0, num_hidden_layers=2)
    decoder(Path("teacher"), hidden_size=64, num_hidden_layers=3)
    rows = [{"prompt": f"{i} and ", "completion": f"{i + 1} is a number"} for i in range(40)]
    Path("train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("x.py").write_text(CONFIG)
    given = ["--config", "x.py", "objective.hidden=1.0", "evaluate.every=0", "train.steps=6"]
    assert main([*given, "name=short"]) == 0
    events = [json.loads(x) for x in Path("runs/short/metrics.jsonl").read_text().splitlines()]
    terms = [x["hidden"] for x in events if x["event"] == "train" and "hidden" in x]
    assert terms and all(np.isfinite(terms)), events[:3]
    kept = "".join(p.read_text(errors="ignore") for p in Path("runs/short/checkpoints").rglob("*") if p.is_file())
    assert "['objective']['projection']" in kept.replace('\\"', '"')
    assert not any("projection" in p.read_text(errors="ignore") for p in Path("runs/short/adapter").iterdir())
