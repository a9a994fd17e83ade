"""Averages of weights along a run: against plain recursions, skipped steps, populations, resume, statistics, export."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import config
from ftjax.config import Checkpoint, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.peft.adalora import AdaLoRA
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA
from ftjax.peft.oft import OFTDelta
from ftjax.peft.reft import LoReFT
from ftjax.train.average import moved, numbers, start, swa_start
from ftjax.train.averaged import averaged, described
from ftjax.train.signals import Interrupted
from tests import tiny
from tests.tiny import largest

PLAIN = dict(lr=1e-2, clip=0.0, weight_decay=0.0, schedule="constant")
EMA, SWA, EVERY = Optim(**PLAIN, ema=0.8), Optim(**PLAIN, swa_from=0.25, swa_every=3), Optim(**PLAIN, swa_from=0.0)
STEPS = 12


def walk(t, steps=STEPS, *, bad=()):
    """(weights after every step, final state): one compiled program; at the steps `bad` the base is not finite."""
    step, data, state, found = jax.jit(t.program.train), tiny.batch(4, micro=1), t.state, []
    broken = t.frozen.replace(store=jax.tree.map(lambda x: x * jnp.nan, t.frozen.store))
    for i in range(steps):
        state, _ = step(state, broken if i in bad else t.frozen, data)
        found.append(jax.tree.map(np.asarray, state.trainable))
    return found, state


def ema_of(weights, d):
    """The definition in double precision: an average that starts at zero, divided by what it lacks of one."""
    total, share = jax.tree.map(lambda x: np.zeros(x.shape), weights[0]), 0.0
    for w in weights:
        total = jax.tree.map(lambda t, x: d * t + (1 - d) * x.astype(np.float64), total, w)
        share = d * share + (1 - d)
    return jax.tree.map(lambda t: t / share, total)


def mean_of(weights):
    return jax.tree.map(lambda *x: np.mean([y.astype(np.float64) for y in x], 0), *weights)


@pytest.mark.parametrize("peft", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_ema_is_the_recursion(peft):
    weights, state = walk(tiny.tiny(peft, optim=EMA, steps=STEPS))
    assert int(state.average["count"]) == STEPS
    assert largest(state.average["mean"], ema_of(weights, 0.8)) < 1e-6
    assert largest(state.average["mean"], state.trainable) > 1e-3


@pytest.mark.parametrize("d", [0.5, 0.99, 0.99999])
def test_ema_of_scalars_over_many_steps(d):
    hyper = {k: jnp.float32(v) for k, v in numbers(Optim(ema=d), 1).items()}
    values = np.random.default_rng(0).normal(size=400).astype(np.float32) + 3
    one = lambda avg, x: (moved("ema", avg, x, hyper, step=jnp.int32(0), taken=jnp.bool_(True)), None)  # noqa: E731
    got = jax.jit(lambda first, xs: jax.lax.scan(one, first, xs)[0])(start("ema", jnp.float32(99)), jnp.asarray(values))
    # The start, 99, has no part in it; at 0.99999 the average is nearly the plain mean.
    assert float(got["mean"]) == pytest.approx(float(ema_of(list(values), d)), rel=1e-6)


def test_swa_is_the_mean_of_its_snapshots():
    assert swa_start(SWA, STEPS) == 3 and swa_start(Optim(swa_from=0.29), 100) == 29
    weights, state = walk(tiny.tiny(optim=SWA, steps=STEPS))
    taken = [weights[i - 1] for i in (6, 9, 12)]
    assert int(state.average["count"]) == 3
    assert largest(state.average["mean"], mean_of(taken)) < 1e-6
    assert largest(state.average["mean"], mean_of(weights[3:])) > 1e-4


@pytest.mark.parametrize("optim", [EMA, EVERY], ids=["ema", "swa"])
def test_skipped_steps_do_not_enter(optim):
    used = [0, 2, 3, 4]
    weights, state = walk(tiny.tiny(optim=optim, steps=5), 5, bad=(1,))
    want = ema_of([weights[i] for i in used], 0.8) if optim.ema else mean_of([weights[i] for i in used])
    assert int(state.average["count"]) == 4
    assert largest(state.average["mean"], want) < 1e-6
    every = ema_of(weights, 0.8) if optim.ema else mean_of(weights)
    assert largest(state.average["mean"], every) > 1e-5


def test_nothing_is_held_without_an_average():
    t = tiny.tiny()
    assert t.state.average == {} and not {"ema_rate", "swa_start"} & set(t.state.hyper)
    assert averaged(None, t.state) is t.state  # type: ignore[arg-type]


def test_averages_do_not_change_what_is_trained():
    plain, ema, swa = (walk(tiny.tiny(optim=o, steps=4), 4)[1] for o in (Optim(**PLAIN), EMA, SWA))
    assert largest(plain.trainable, ema.trainable) == largest(plain.trainable, swa.trainable) == 0


def test_a_population_has_averages_of_its_own():
    """Trials of other decays in one vmapped program."""
    decays, base = (0.5, 0.9), tiny.weights(tiny.llama())
    trials = [tiny.tiny(base=base, seed=i, optim=Optim(**PLAIN, ema=d), steps=4) for i, d in enumerate(decays)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[t.state for t in trials])
    step = jax.jit(jax.vmap(trials[0].program.train, in_axes=(0, None, None)))
    for _ in range(4):
        stacked, _ = step(stacked, trials[0].frozen, tiny.batch(4, micro=1))
    for i, t in enumerate(trials):
        alone = walk(t, 4)[1].average["mean"]
        assert largest(jax.tree.map(lambda x, i=i: x[i], stacked.average["mean"]), alone) < 2e-4


def test_sharded_as_the_weights():
    from ftjax.parallel.mesh import AXES, Placement, axes_of_store, make_mesh

    t = tiny.tiny(Full(), optim=EMA)
    mesh = make_mesh(config.Mesh(**dict(zip(AXES, (1, 1, 2), strict=True))), jax.devices()[:2])
    p = Placement(mesh, axes_of_store({"base": t.base, "overlay": t.overlay}, t.model.table)).tree(t.state)
    assert jax.tree.leaves(p.average["mean"]) == jax.tree.leaves(p.trainable)
    assert not all(s.is_fully_replicated for s in jax.tree.leaves(p.trainable))


# Parametrisations that are more than numbers ---------------------------------------------------------------------------


def test_averaged_rotations_stay_rotations():
    """OFT's numbers are those of a skew matrix, ReFT's rows are made orthonormal when they are used: the mean is of these."""
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 6))
    block = OFTDelta((a + b) / 2, terms=0).turn() + jnp.eye(4)
    np.testing.assert_allclose(block @ block.swapaxes(-1, -2), np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-5)
    t = tiny.tiny(LoReFT(rank=2), optim=Optim(**PLAIN, ema=0.9), steps=6)
    _, state = walk(t, 6)
    for tap in state.average["mean"]["overlay"].values():
        free = tap.r @ tap.r.swapaxes(-1, -2)
        assert float(jnp.abs(free - jnp.eye(2)).max()) > 1e-4  # the mean itself has left the manifold
        used = tap.rotation @ tap.rotation.swapaxes(-1, -2)  # what the model multiplies by and what is written
        assert float(jnp.abs(used - jnp.eye(2)).max()) < 1e-5


# Settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "peft", "text"),
    [
        (Optim(ema=0.9, swa_from=0.5), LoRA(), "a run keeps one average"),
        (Optim(swa_from=0.5, swa_every=6), LoRA(), "no snapshot would be taken: 5 of train.steps=10"),
        (Optim(ema=0.9), AdaLoRA(), "optim.ema, peft=adalora  the method takes parts of its update out"),
    ],
)
def test_settings_that_cannot_be(optim, peft, text):
    run = Run(optim=optim, peft=peft, train=Train(steps=10))
    assert any(text in line for line in optim.check(run))
    assert not list(Optim(ema=0.9).check(Run(peft=LoRA(), train=Train(steps=10))))
    assert any("swa_every=2  has no effect" in x for x in Optim(swa_every=2).advise(Run()))


# Whole runs ------------------------------------------------------------------------------------------------------------


def config_of(out, **optim) -> Run:
    return Run(
        name="avg", out=str(out), model=Pretrained(path="base"), peft=LoRA(rank=2, alpha=4.0),
        data=Local(path="data.jsonl", eval_share=0.2), loader=Loader(max_length=24),
        optim=Optim(lr=2e-2, **optim), train=Train(steps=6, batch=8),
        evaluate=Evaluate(every=3, examples=8, generate=0, metric_examples=0),
        checkpoint=Checkpoint(every=2, keep=3, keep_best=False),
    )  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A tiny base of its own vocabulary and a data set, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    small_project(tmp_path)
    return tmp_path


def small_project(root, layers=1):
    from ftjax.data.new_tokenizer import train_tokenizer
    from ftjax.data.rows import Row
    from ftjax.models import hf

    words = ["red", "green", "blue", "one", "two", "cat", "dog"]
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"{w} {i} ", "completion": " ".join(rng.choice(words, 4))} for i in range(12) for w in words[:3]]
    (root / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train_tokenizer("bpe", [Row(r, "") for r in rows], 300, root / "base")
    vocab = json.loads((root / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    model = tiny.llama(vocab_size=len(vocab) + 3, eos_token_id=(2,), bos_token_id=1, num_hidden_layers=layers)
    hf.save(model, tiny.weights(model), root / "base")


def lines_of(out):
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_resumes_bit_for_bit_and_exports_the_average(project, capsys, monkeypatch):
    from safetensors.numpy import load_file

    from ftjax import entry
    from ftjax.options import FolderArgs
    from ftjax.regimes import fit
    from ftjax.regimes.fit import restored_state
    from ftjax.train.runfolder import RunFolder
    from ftjax.train.setup import prepare

    run = config_of("whole", ema=0.7)
    assert run.regime.train(run, allow=()) == 0
    said = capsys.readouterr().out
    assert "exporting: Averaged weights: the exponential moving average of 6 steps, optim.ema=0.7." in said
    last = [x for x in lines_of(project / "whole") if x["event"] == "eval"][-1]
    assert last["loss"] != last["raw/loss"] and "raw/loss" in said
    assert "the exponential moving average of 6 steps" in (project / "whole/adapter/README.md").read_text()

    cut = config_of("cut", ema=0.7)  # stopped after step 2 as by a signal
    real = fit.Loop._milestone

    def stop(self, state, n):
        if n == 2:
            self.signals.received = signal.SIGTERM
        real(self, state, n)

    monkeypatch.setattr(fit.Loop, "_milestone", stop)
    with pytest.raises(Interrupted):
        cut.regime.train(cut, allow=())
    monkeypatch.setattr(fit.Loop, "_milestone", real)
    cut.regime.train(cut, allow=())
    assert "resuming after step 2" in capsys.readouterr().out
    assert (project / "cut/metrics.jsonl").read_text() == (project / "whole/metrics.jsonl").read_text()
    a, b = (load_file(project / x / "adapter/adapter_model.safetensors") for x in ("whole", "cut"))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)

    setup = prepare(run, say=lambda _: None)
    state, step = restored_state(setup, RunFolder(run.folder, message=print), print)
    assert step == 6 and int(state.average["count"]) == 6
    mean = state.average["mean"]["overlay"]["layers[0:1]/q/w"]
    raw = state.trainable["overlay"]["layers[0:1]/q/w"]
    written = a["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].T
    np.testing.assert_array_equal(written, np.asarray(mean.a)[0])
    assert np.abs(written - np.asarray(raw.a)[0]).max() > 1e-4
    assert described(setup, state).startswith("Averaged weights")

    entry.export_run(FolderArgs(run=run.folder, to=project / "exported"))
    c = load_file(project / "exported/adapter/adapter_model.safetensors")
    assert all((a[k] == c[k]).all() for k in a)
    capsys.readouterr()
    entry.evaluate(run.folder, ())
    assert f"raw/loss {last['raw/loss']:.4f}" in capsys.readouterr().out


def test_statistics_of_averaged_weights_are_taken_anew():
    """Under SWA a ResNet's running statistics are those of `reestimate` over the training data, not the raw weights' own."""
    from ftjax.data.images import ImageExamples, Recipe
    from ftjax.models.batchnorm import reestimate
    from ftjax.objectives.image_classification import ImageClassification
    from ftjax.peft.base import bind
    from ftjax.train.state import whole
    from tests import tinymodels

    model = tinymodels.known()["resnet_cifar"]()
    t = tiny.tiny(Full(), ImageClassification(), model=model, optim=Optim(**PLAIN, swa_from=0.0))
    step, state = jax.jit(t.program.train), t.state
    for i in range(3):
        state, _ = step(state, t.frozen, tiny.batch_for(t.program.objective, 4, micro=1, seed=i))
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (10, 3, tiny.IMAGE, tiny.IMAGE), dtype=np.uint8)
    train = ImageExamples.of(pictures, rng.integers(0, 3, 10), names=("a", "b", "c"), recipe=Recipe())
    view = SimpleNamespace(name="", objective=t.program.objective, prepared=SimpleNamespace(train=train), length=1)
    run = SimpleNamespace(optim=Optim(), train=Train(batch=4), compute=config.Compute())
    placement = SimpleNamespace(batch=lambda _: jax.devices()[0])
    setup = SimpleNamespace(
        run=run, views=(view,), placement=placement, model=model, store=lambda s: whole(s, t.frozen.store, s.mutable)
    )
    seen = averaged(setup, state)  # type: ignore[arg-type]
    assert largest(seen.trainable, state.average["mean"]) == 0
    assert largest(seen.mutable, state.mutable) > 1e-3
    from ftjax.data.pipeline import permutation

    order = permutation(10, 0)[:8]  # two whole batches
    inputs = [{"pixel_values": jnp.asarray(train.build([[i] for i in part], key=(0, s, 0)).pixels)}
              for s, part in ((0, order[:4]), (4, order[4:]))]  # fmt: skip
    store = whole(seen, t.frozen.store, state.mutable)
    want = reestimate(model, bind(store["base"], store["overlay"]), inputs)
    assert largest(seen.mutable, {k: want[k] for k in seen.mutable}) < 1e-6
    frozen = SimpleNamespace(
        **{**vars(setup), "run": SimpleNamespace(**{**vars(run), "compute": config.Compute(batch_norm="frozen")})}
    )
    assert largest(averaged(frozen, state).mutable, state.mutable) == 0  # type: ignore[arg-type]
