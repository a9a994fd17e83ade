"""Several teachers as one: the mean by hand, whatever the chunks; the command line and the refusal of one that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.config import Run
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError
from ftjax.models.base import Numerics
from ftjax.models.ensemble import together
from ftjax.models.sources import Pretrained, embedded_folder
from ftjax.objectives.distill import DistillCausalLM
from ftjax.train.teacher import load_teacher
from ftjax.verbs import main
from tests import tiny
from tests.test_distill import CONFIG, decoder


def members():
    made = [tiny.llama(num_hidden_layers=1), tiny.llama(num_hidden_layers=2, hidden_size=48)]
    return [(m, tiny.weights(m, seed=i)) for i, m in enumerate(made)]


@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_mean_by_hand(mean):
    both, inputs = members(), {"input_ids": tiny.batch(2).tokens}
    model, weights = together(both, mean)
    got = model.apply(weights, inputs).logits
    each = [np.asarray(m.apply(w, inputs).logits, np.float64) for m, w in both]
    if mean == "logits":
        np.testing.assert_allclose(got, sum(each) / 2, atol=2e-6)
        return
    p = [np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in each]
    np.testing.assert_allclose(jnp.exp(got), sum(p) / 2, atol=2e-6)


def test_a_teacher_twice_is_the_teacher_however_it_is_cut():
    t = tiny.tiny(None, DistillCausalLM(), model=tiny.llama(Numerics(loss_chunk=12)))
    batch = tiny.batch(2)
    want = t.program.evaluate(t.state, t.frozen, batch)["terms"]["divergence"][0]
    for mean in ("logits", "probabilities"):
        model, weights = together([(t.program.teacher, t.frozen.teacher)] * 2, mean)
        program = type(t.program)(t.model, t.program.objective, t.program.optim, t.program.groups, model)
        got = program.evaluate(t.state, t.frozen.replace(teacher=weights), batch)["terms"]["divergence"][0]
        assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    decoder(Path("student"), seed=0, num_hidden_layers=1)
    decoder(Path("teacher"), hidden_size=48, num_hidden_layers=1)
    decoder(Path("other"), seed=2, num_hidden_layers=1)
    rows = [{"prompt": f"{i} and ", "completion": f"{i + 1} is a number"} for i in range(40)]
    Path("train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("x.py").write_text(CONFIG)
    several = 'objective.teachers=[{"name":"pretrained","path":"other"}]'
    assert main(["--config", "x.py", several, "train.steps=2"]) == 0
    decoder(Path("other"), vocab=4100, num_hidden_layers=1)
    objective = DistillCausalLM(teacher=Pretrained(path="teacher"), teachers=(Pretrained(path="other"),))
    with pytest.raises(ConfigError, match=r"objective\.teachers\.0\.path=other"):
        load_teacher(
            Run(objective=objective),
            tiny.llama(vocab_size=4096),
            load_tokenizer(embedded_folder()),
            Numerics(),
            say=print,
        )
