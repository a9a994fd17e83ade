"""Runs that go on from an adapter folder: where they begin, what their reference is, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import ConfigError
from ftjax.models import hf
from ftjax.models.sources import Pretrained
from ftjax.objectives.preference import answers, pair_inputs
from ftjax.peft.adapter import Pfeiffer
from ftjax.peft.base import bind, merge
from ftjax.peft.combined import Combine
from ftjax.peft.dora import DoRA
from ftjax.peft.earlier import start_from
from ftjax.peft.ia3 import IA3
from ftjax.peft.interop import load_adapter, save_adapter
from ftjax.peft.lora import LoRA
from ftjax.peft.prefix import Prefix
from ftjax.peft.reft import NoReFT
from ftjax.train.session import export
from tests import tiny
from tests.preferences import drawn, earlier, project, setup_of

METHODS = {
    "lora": LoRA(rank=4, alpha=6.0, targets=("q_proj", "down_proj"), layers=(0, 1, 3)),
    "dora": DoRA(rank=2, targets=("v_proj",)),
    "ia3": IA3(),
    "prefix": Prefix(tokens=3),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return project(tmp_path_factory.mktemp("earlier"))


def source(root, folder):
    return Pretrained(path=str(root / "base"), adapter=str(folder))


def log_p(model, params, batch):
    """log pi of both answers of each pair, by the plain forward pass."""
    return jax.jit(lambda p, b: answers(model.apply(p, pair_inputs(b)), b).sums)(params, batch)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_dpo_begins_at_the_adapter_and_is_measured_against_it(root, tmp_path, method):
    folder = earlier(root, method, f"sft_{method.name}")
    setup = setup_of(root, model=source(root, folder), peft=method)
    model, plain = hf.load(str(root / "base"))
    sft = bind(plain, load_adapter(folder, model.table, plain).overlay)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), setup.batches.next())
    evaluate = jax.jit(setup.program.evaluate)

    metrics = jax.device_get(evaluate(setup.state, setup.frozen, batch))
    mean = {k: float(a / b) for k, (a, b) in {**metrics["terms"], **metrics["metrics"]}.items()}
    assert mean["sigmoid"] == pytest.approx(np.log(2), abs=3e-7)
    known, of_base = log_p(model, sft, batch), log_p(model, plain, batch)
    np.testing.assert_allclose(mean["logps/chosen"], known[:, 0].mean(), rtol=2e-5)
    assert abs(mean["logps/chosen"] - of_base[:, 0].mean()) > 1e-2  # the adapter is felt

    # The policy moves on: its rewards are over the adapter, not over the base.
    later = setup.state.replace(trainable=drawn(setup.state.trainable, seed=5, size=0.1))
    found = jax.device_get(evaluate(later, setup.frozen, batch))["metrics"]
    store = setup.store(later)
    now = log_p(model, bind(store["base"], store["overlay"]), batch)
    for i, side in enumerate(("chosen", "rejected")):
        value = float(found[f"rewards/{side}"][0] / found[f"rewards/{side}"][1])
        assert value == pytest.approx(0.1 * float((now - known)[:, i].mean()), abs=2e-5), side
        assert abs(value - 0.1 * float((now - of_base)[:, i].mean())) > 1e-3, side

    # What is exported is one adapter over the plain base, and it can be gone on from again.
    out = export(setup, later, tmp_path, card="")
    again = bind(plain, load_adapter(out, model.table, plain).overlay)
    np.testing.assert_allclose(log_p(model, again, batch), now, rtol=2e-5)


def test_dropout_is_the_runs_own(root):
    folder = earlier(root, LoRA(rank=4, dropout=0.5), "dropped")
    for rate in (0.0, 0.2):
        state = setup_of(root, model=source(root, folder), peft=LoRA(rank=4, dropout=rate)).state
        rates = {float(d.rate[0]) for d in state.const["overlay"].values() if d.rate is not None}
        assert rates == ({np.float32(rate)} if rate else set())


def test_folded_in_first_with_a_new_adapter_on_top(root, tmp_path):
    """The other form: the earlier adapter is a part of the base, so the reference is the merged model."""
    folder = earlier(root, METHODS["lora"], "folded")
    model, plain = hf.load(str(root / "base"))
    sft = bind(plain, load_adapter(folder, model.table, plain).overlay)
    hf.save(model, merge(sft, model.table), tmp_path / "merged", tokenizer_from=root / "base")
    method = DoRA(rank=2)
    setup = setup_of(root, model=Pretrained(path=str(tmp_path / "merged")), peft=method)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), setup.batches.next())
    metrics = jax.device_get(jax.jit(setup.program.evaluate)(setup.state, setup.frozen, batch))
    assert float(metrics["terms"]["sigmoid"][0]) / 8 == pytest.approx(np.log(2), abs=3e-7)
    np.testing.assert_allclose(
        metrics["metrics"]["logps/chosen"][0] / 8, log_p(model, sft, batch)[:, 0].mean(), rtol=2e-5
    )


@pytest.mark.parametrize(
    ("method", "texts"),
    [
        (DoRA(rank=4), ["holds lora, but peft=dora", "peft=lora"]),
        (LoRA(rank=2), ["peft.rank=2 the folder's is 4", "[4, 64, 2], in the folder [4, 64, 4]"]),
        (LoRA(rank=4, alpha=4.0), ["peft.alpha=4.0 the folder's is 16.0", "by the config 1, in the folder 4"]),
        (LoRA(rank=4, targets=("q_proj",)), ["is in the folder only"]),
        (LoRA(rank=4, start="pissa"), ["a0 is not in the folder"]),
    ],
    ids=["method", "rank", "alpha", "targets", "start"],
)
def test_another_method_is_refused(root, method, texts):
    folder = earlier(root, LoRA(rank=4), "plain")
    with pytest.raises(ConfigError) as error:
        setup_of(root, model=source(root, folder), peft=method)
    said = " ".join(str(error.value).split())
    assert all(text in said for text in texts), said


@pytest.mark.parametrize(
    ("begun", "asked", "texts"),
    [
        (NoReFT(positions="l3"), NoReFT(positions="all"), ["peft.positions='all' the folder's is 'l3'", "everywhere"]),
        (NoReFT(positions="l3"), NoReFT(positions="f3"), ["first by the config 3, in the folder 0"]),
        (Pfeiffer(activation="tanh"), Pfeiffer(), ["by the config 'relu', in the folder 'tanh'"]),
        (
            Combine(methods=(LoRA(rank=2), Pfeiffer(activation="tanh")), gates=True),
            Combine(methods=(LoRA(rank=2), Pfeiffer()), gates=True),
            ["mlp_out/inner/activation by the config 'relu'"],
        ),
        (
            Combine(methods=(LoRA(rank=2), Pfeiffer()), gates=True),
            Combine(methods=(LoRA(rank=2), Pfeiffer())),
            ["peft.gates=False the folder's is True"],
        ),
    ],
    ids=["all", "ends", "activation", "gated", "gates"],
)
def test_choices_that_no_array_shows(tmp_path, begun, asked, texts):
    """The arrays have the same shapes: only the settings tell them apart."""
    model = tiny.llama(num_hidden_layers=2)
    base = tiny.weights(model)
    overlay, fresh = (m.init(jax.random.key(0), model.table, base) for m in (begun, asked))
    save_adapter(tmp_path, overlay, model.table, begun, base_path="")
    start_from(tmp_path, begun, overlay, model.table, base, base_path="")
    with pytest.raises(ConfigError) as error:
        start_from(tmp_path, asked, fresh, model.table, base, base_path="")
    said = " ".join(str(error.value).split())
    assert all(text in said for text in texts), said
