"""Several tasks in one run: weightings against the papers' formulas, gradients, order, devices, and a whole run by config."""

from __future__ import annotations

import dataclasses as dc
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import api, config, entry
from ftjax.configfile import build
from ftjax.data.new_tokenizer import train_tokenizer
from ftjax.data.rows import Row
from ftjax.data.tasks.local import Local
from ftjax.data.tasks.tasks import Tasks
from ftjax.data.together import TaskBatch, TaskBatches, allocate, prepare_tasks, shares_of
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError
from ftjax.evals.request import Measured
from ftjax.generate.api import generate
from ftjax.headspec import HeadSpec
from ftjax.models import hf
from ftjax.models.base import Numerics
from ftjax.models.several import Several, TaskHead, load_several
from ftjax.models.sources import Pretrained
from ftjax.objectives.causal_lm import CausalLM
from ftjax.objectives.classification import Classification
from ftjax.objectives.multi_task import MultiTask, SubTask
from ftjax.objectives.weighting import GradNorm, PCGrad, Static, Uncertainty
from ftjax.params import init_params
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA
from ftjax.train.metrics import read_lines
from ftjax.train.setup import prepare
from ftjax.train.weighted import combined
from ftjax.verbs import main
from tests import tiny
from tests.test_matrix import check_devices, check_resume

WEIGHTINGS = (Static(), Uncertainty(), PCGrad(), GradNorm())
PLAIN = config.Optim(name="sgd", b1=0.0, lr=1.0, schedule="constant", clip=0.0)  # an update is minus the gradient


def two_heads_and_text(weighting: Any = None, weights: tuple[float, ...] = (1.0, 0.5, 2.0)) -> MultiTask:
    """Two classifications with other labels, and next tokens."""
    losses = (Classification(), Classification(), CausalLM())
    tasks = [
        SubTask(name=n, objective=o, weight=w, share=p)
        for n, o, w, p in zip(("color", "way", "text"), losses, weights, (0.5, 0.2, 0.3), strict=True)
    ]
    return MultiTask(tasks=tuple(tasks), weighting=weighting or Static())


def several() -> Several:
    """A tiny Llama under their heads."""
    kind = "sequence_classification"
    heads = (
        TaskHead("color", HeadSpec(kind, ("red", "green", "blue")), "color"),
        TaskHead("way", HeadSpec(kind, ("up", "down")), "way"),
        TaskHead("text", HeadSpec("causal_lm"), "text"),
    )
    return Several(tiny.llama(), heads)


def batch(micro: int = 2, rows: int = 16) -> TaskBatch:
    """Rows of the three tasks."""
    flat = {
        "color": tiny.labelled(rows, classes=3),
        "way": tiny.labelled(rows, classes=2, seed=1),
        "text": tiny.batch(rows, seed=2),
    }
    split = lambda x: jnp.asarray(x).reshape(micro, rows // micro, *x.shape[1:])  # noqa: E731
    return TaskBatch(jax.tree.map(split, flat))


def made(weighting: Any = None, peft: Any = None, optim: Any = None, **more: Any) -> tiny.Tiny:
    model: Any = several()
    return tiny.tiny(peft or LoRA(rank=4), two_heads_and_text(weighting), model=model, optim=optim, **more)


# Weightings ------------------------------------------------------------------------------------------------------------


def by_the_paper(grads: np.ndarray, orders: list[list[int]]) -> np.ndarray:
    """PCGrad as its Algorithm 1 is written, on whole vectors [K, n]."""
    total = np.zeros(grads.shape[1])
    for i, order in enumerate(orders):
        g = grads[i].copy()
        for j in order:
            if j != i and g @ grads[j] < 0:
                g = g - g @ grads[j] / (grads[j] @ grads[j]) * grads[j]
        total += g
    return total


def test_pcgrad_on_two_quadratics_is_the_projection_by_hand():
    # (x - 1)^2 + y^2 and (x + 2)^2 + 3 y^2 at (0, 1): the gradients (-2, 2) and (4, 6) do not conflict in y, but at
    # (0, 0.1) they do: (-2, 0.2) and (4, 0.6), product -7.88
    a, b = np.array([-2.0, 0.2]), np.array([4.0, 0.6])
    by_hand = a + b - (a @ b) / (b @ b) * b - (a @ b) / (a @ a) * a
    grads = {"overlay": {"x": jnp.asarray(np.stack([a, b]), jnp.float32)}}
    found, gram = combined(PCGrad(), grads, jax.random.key(0))
    np.testing.assert_allclose(found["overlay"]["x"], by_hand, atol=2e-6)  # of terms as large as 4, which cancel
    np.testing.assert_allclose(gram, np.stack([a, b]) @ np.stack([a, b]).T, rtol=1e-6)
    agreeing = {"overlay": {"x": jnp.asarray([[1.0, 2.0], [3.0, 0.0]])}}
    np.testing.assert_array_equal(combined(PCGrad(), agreeing, jax.random.key(0))[0]["overlay"]["x"], [4.0, 2.0])


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_of_many_tasks_equals_the_algorithm_on_whole_vectors(seed: int):
    K, key = 5, jax.random.key(seed)
    grads = np.random.default_rng(seed).normal(size=(K, 7))
    orders = [np.asarray(jax.random.permutation(jax.random.fold_in(key, i), K)).tolist() for i in range(K)]
    leaves = {"a": jnp.asarray(grads[:, :3], jnp.float32), "b": jnp.asarray(grads[:, 3:], jnp.float32).reshape(K, 2, 2)}
    own = jnp.asarray(np.eye(K), jnp.float32)
    found, _ = combined(PCGrad(), {"overlay": leaves, "base": {"heads/t/w": own}}, key)
    together = np.concatenate([found["overlay"]["a"], found["overlay"]["b"].ravel()])
    np.testing.assert_allclose(together, by_the_paper(grads, orders), rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(found["base"]["heads/t/w"], np.ones(K))  # a head's own gradient is left alone


def test_uncertainty_finds_the_noise_of_each_task():
    # L_k(theta) = mean (theta - y_k)^2 over targets with noise sigma_k; at the optimum the factor is 1 / (2 sigma_k^2)
    rng, sigma = np.random.default_rng(0), np.array([0.5, 2.0])
    y = jnp.asarray(rng.normal(size=(2, 4000)) * sigma[:, None], jnp.float32)
    w = Uncertainty(rate=0.02)

    @jax.jit
    def step(theta: jax.Array, state: Any) -> Any:
        losses = jax.vmap(lambda row: ((theta - row) ** 2).mean())(y)
        gradient = (w.scales(state) * 2 * (theta - y.mean(1))).sum()
        return theta - 0.05 * gradient, w.update(state, losses, None)

    theta, state = jnp.float32(1.0), w.start(2)
    for _ in range(800):
        theta, state = step(theta, state)
    noise = ((np.asarray(y) - float(theta)) ** 2).mean(1)
    np.testing.assert_allclose(w.scales(state), 1 / (2 * noise), rtol=1e-3)
    np.testing.assert_allclose(w.scales(state), 1 / (2 * sigma**2), rtol=0.05)


def test_gradnorm_makes_all_gradients_equally_long():
    # losses c_k |x - t_k|^2 / 2: the gradient of task k is c_k (x - t_k), its pull s_k times that
    c, pulls = jnp.asarray([10.0, 1.0, 0.5]), jnp.ones(3)
    w = GradNorm(alpha=0.0, rate=0.005)
    state, update = w.start(3), jax.jit(w.update)
    for _ in range(1500):
        length = w.scales(state) * c * pulls
        state = update(state, c, jnp.diag(length**2))
    length = np.asarray(w.scales(state) * c * pulls)
    assert length.max() / length.min() < 1.1
    np.testing.assert_allclose(float(w.scales(state).mean()), 1.0, rtol=1e-6)


def test_gradnorm_favours_the_task_that_is_behind():
    w = GradNorm(alpha=1.5, rate=0.01)
    state = w.update(w.start(2), jnp.asarray([1.0, 1.0]), jnp.eye(2))
    for _ in range(20):
        s = w.scales(state)
        state = w.update(state, jnp.asarray([1.0, 0.1]), jnp.diag(s**2))  # the second has learned almost everything
    assert float(state["scales"][0]) > 1.05 > 0.95 > float(state["scales"][1])


# Gradients -------------------------------------------------------------------------------------------------------------


def moved(t: tiny.Tiny, data: Any) -> Any:
    """Minus the gradient of a step."""
    state, _ = jax.jit(t.program.train)(t.state, t.frozen, data)
    return jax.tree.map(lambda a, b: a - b, state.trainable, t.state.trainable)


def test_the_gradient_is_the_weighted_sum_of_those_of_single_tasks():
    t, data = made(optim=PLAIN, randomize=True), batch()
    model, objective = several(), two_heads_and_text()
    whole = moved(t, data)
    for task in objective.tasks:
        own, seen = model.view(task.name, t.base)
        one = tiny.tiny(LoRA(rank=4), task.objective, model=own, base=seen, optim=PLAIN)
        _, values = model.view(task.name, t.state.trainable["base"])
        one.state = dc.replace(one.state, trainable={**t.state.trainable, "base": values})
        g = jax.tree.map(lambda x, f=task.factor: f * x, moved(one, data.parts[task.name]))
        head = TaskHead(task.name, own.head, task.name)
        for k, x in g["base"].items():
            if x is not None:
                np.testing.assert_allclose(whole["base"][head.key(k)], x, rtol=2e-5, atol=1e-6)
        whole["overlay"] = jax.tree.map(lambda a, b: a - b, whole["overlay"], g["overlay"])
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole["overlay"])) < 1e-6


def test_gradients_one_by_one_add_up_to_the_plain_gradient():
    # with factors of 1 GradNorm's first step is the plain one
    a, b = moved(made(optim=PLAIN), batch()), moved(made(GradNorm(), optim=PLAIN), batch())
    assert tiny.largest(a, b) < 1e-6


@pytest.mark.parametrize("weighting", [Static(), PCGrad()], ids=lambda w: w.name)
def test_micro_batches_do_not_matter(weighting: Any):
    one, two = (moved(made(weighting, optim=PLAIN), batch(micro=m)) for m in (1, 4))
    assert tiny.largest(one, two) < 2e-6


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:], ids=lambda w: w.name)  # static: tests/test_matrix.py
def test_a_cell_of_the_matrix(weighting: Any, tmp_path):
    optim = config.Optim(lr=1e-2, weight_decay=0.01, eps=1e-4)
    t, data = made(weighting, LoRA(rank=4, dropout=0.1), optim), batch(rows=16)
    step = jax.jit(t.program.train)
    states = [t.state]
    for _ in range(3):
        states.append(step(states[-1], t.frozen, data)[0])
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert all(
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(states[-1].trainable), jax.tree.leaves(t.state.trainable), strict=True)
    )
    for a, b in zip(jax.tree.leaves(states[-1].weighting), jax.tree.leaves(t.state.weighting), strict=True):
        assert bool((a != b).any())
    check_resume(t, step, states, data, tmp_path)
    check_devices(t, states[2], data)


def test_dropout_masks_differ_between_tasks():
    model = several()
    t = made(peft=LoRA(rank=4, dropout=0.5), randomize=True)
    bound = t.program.params(t.state.trainable, t.state, t.frozen, jax.random.key(0))
    a, b = (jax.random.key_data(model.view(n, bound)[1]["layers[0:4]/q/w"].key) for n in ("color", "way"))
    assert a.shape[0] == 4 and not (np.asarray(a) == np.asarray(b)).all(-1).any()


# Rows ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shares, rows, want",
    [
        ((0.7, 0.3), 10, [7, 3]),
        ((0.98, 0.01, 0.01), 8, [6, 1, 1]),
        ((0.5, 0.25, 0.25), 6, [3, 2, 1]),
        ((1 / 3, 1 / 3, 1 / 3), 3, [1, 1, 1]),
    ],
)
def test_rows_by_largest_remainder_at_least_one_each(shares, rows, want):
    assert allocate(shares, rows) == want


def test_shares():
    assert shares_of("proportional", [30, 10], [1, 1], 2.0) == [0.75, 0.25]
    np.testing.assert_allclose(shares_of("temperature", [90, 10], [1, 1], 2.0), [0.75, 0.25])
    np.testing.assert_allclose(shares_of("fixed", [90, 10], [1.0, 3.0], 2.0), [0.25, 0.75])
    with pytest.raises(ConfigError, match=r"train\.batch=1  2 tasks need"):
        allocate([0.5, 0.5], 1)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A base model with a tokenizer, two labelled data sets and a text."""
    root = tmp_path_factory.mktemp("tasks")
    words = {"red": "fire blood rose", "green": "leaf grass frog", "blue": "sky sea ice", "up": "rise", "down": "fall"}
    texts = {"color": ("red", "green", "blue"), "way": ("up", "down")}
    rng = np.random.default_rng(0)
    for name, labels in texts.items():
        rows = [
            {"text": f"{rng.choice(words[y].split())} {i} is what it is", "label": y} for i in range(24) for y in labels
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [{"text": f"the {w} is {i} of {y}"} for y, w in words.items() for i in range(12)]
    (root / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = [x for n in ("color", "way", "text") for x in (root / f"{n}.jsonl").read_text().splitlines()]
    every = [Row(json.loads(x), "") for x in lines]
    train_tokenizer("bpe", every, 300, root / "base")
    vocab = json.loads((root / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    model = tiny.llama(vocab_size=len(vocab) + 3, eos_token_id=(2,), bos_token_id=1)
    hf.save(model, init_params(model.table, jax.random.key(0), dtype=jnp.float32), root / "base")
    return root


def tasks_of(root) -> tuple[SubTask, ...]:
    def local(name: str) -> Local:
        return Local(path=str(root / f"{name}.jsonl"), eval_share=0.2)

    return (
        SubTask(name="color", data=local("color"), objective=Classification()),
        SubTask(name="way", data=local("way"), objective=Classification()),
        SubTask(name="text", data=local("text"), objective=CausalLM()),
        SubTask(name="hue", data=local("color"), objective=Classification(), train=False, head="color"),
    )


def a_run(root, out, *overrides: str, tasks: Any = None, weighting: Any = None, **more: Any) -> config.Run:
    run = config.Run(
        name="several", out=str(out), model=Pretrained(path=str(root / "base")), peft=more.pop("peft", LoRA(rank=4)),
        objective=MultiTask(tasks=tasks or tasks_of(root), weighting=weighting or Static()),
        data=Tasks(mixing="temperature"), loader=config.Loader(max_length=32), optim=config.Optim(lr=1e-2),
        train=config.Train(steps=6, batch=16, accumulate=2, log_every=3),
        evaluate=config.Evaluate(every=3, examples=8, generate=1, max_new_tokens=4, metric_examples=0),
        checkpoint=config.Checkpoint(every=3), mesh=config.Mesh(data=8), **more,
    )  # fmt: skip
    return build(run.model_dump(mode="json"), overrides, title="test")


def test_rows_depend_on_the_step_alone(project):
    tokenizer, tasks = load_tokenizer(project / "base"), tasks_of(project)
    loader = config.Loader(max_length=32)
    data = prepare_tasks(tasks, Tasks(), loader, tokenizer, seed=0)
    assert [*data.shares] == ["color", "way", "text"] and abs(sum(data.shares.values()) - 1) < 1e-12
    objectives = {t.name: t.objective for t in tasks}

    def real(accumulate: int, ways: int, start: int, steps: int) -> list[dict[str, np.ndarray]]:
        batches = TaskBatches(data, objectives, loader=loader, batch=11, accumulate=accumulate, ways=ways)
        batches.restore({"next_index": start})
        found = []
        for _ in range(steps):
            parts = batches.next().parts
            assert all(p.tokens.shape[0] == accumulate and p.tokens.shape[1] % ways == 0 for p in parts.values())
            flat = {n: (p.tokens.reshape(-1, p.tokens.shape[-1]), p.segments) for n, p in parts.items()}
            found.append({n: x[(s.reshape(x.shape) >= 0).any(-1)] for n, (x, s) in flat.items()})
        assert sum(len(x) for x in found[0].values()) == 11
        batches.close()
        return found

    want = real(1, 1, 0, 9)
    for other in (real(1, 8, 4, 5), real(3, 2, 4, 5)):
        for a, b in zip(want[4:], other, strict=True):
            assert all((a[n] == b[n]).all() for n in a)


# A run -----------------------------------------------------------------------------------------------------------------


def test_a_run_trains_evaluates_and_exports_every_task(project, tmp_path, capsys):
    run = a_run(project, tmp_path / "run", weighting=PCGrad())
    assert run.regime.train(run, allow=()) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    train, held = ([r for r in lines if r["event"] == e] for e in ("train", "eval"))
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in held] == [0, 3, 6]
    assert {"color/accuracy", "way/accuracy", "text/nll", "conflicts"} <= set(train[-1]) and "hue/nll" not in train[-1]
    names = {"color/loss", "color/macro_f1", "way/accuracy", "text/perplexity", "hue/accuracy", "loss"}
    assert names <= set(held[-1]) and held[-1]["loss"] < held[0]["loss"]
    assert held[-1]["hue/loss"] == held[-1]["color/loss"]  # the same rows through the same head

    capsys.readouterr()
    assert entry.evaluate(tmp_path / "run", ()) == 0
    assert f"color/accuracy {held[-1]['color/accuracy']:.4f}" in capsys.readouterr().out

    ids = {"input_ids": jnp.asarray([[5, 6, 7, 8]], jnp.int32)}
    for name, shape in (("color", (1, 3)), ("way", (1, 2)), ("text", None), ("hue", (1, 3))):
        model, params = api.load_pretrained(project / "base", adapter=tmp_path / "run" / "adapter" / name)
        logits = model.apply(params, ids).logits
        assert shape is None or logits.shape == shape
        assert model.head.kind == ("causal_lm" if name == "text" else "sequence_classification")


def test_the_exported_model_computes_what_the_run_did(project, tmp_path):
    run = a_run(project, tmp_path / "run", peft=Full(), weighting=Uncertainty())
    run.regime.train(run, allow=())
    setup, state, _ = entry._open(tmp_path / "run", (), entry.Console())
    store, ids = setup.store(state), {"input_ids": jnp.asarray([[5, 6, 7, 8]], jnp.int32)}
    assert not (np.asarray(state.weighting["log_variance"]) == 0).any()
    for name in ("color", "way", "text"):
        part, seen = setup.model.view(name, store["base"])
        model, params = api.load_pretrained(tmp_path / "run" / "model" / name)
        assert model.head.labels == part.head.labels
        np.testing.assert_allclose(model.apply(params, ids).logits, part.apply(seen, ids).logits, atol=1e-5)


def test_one_task_of_a_run_answers_and_is_written_alone(project, tmp_path, capsys):
    run = a_run(project, tmp_path / "run", "train.steps=2", "checkpoint.every=2", "evaluate.every=2")
    run.regime.train(run, allow=())
    folder, prompt = str(tmp_path / "run"), ["--prompt", "the fire is", "--max-new-tokens", "6"]

    def said(*words: str) -> str:
        capsys.readouterr()
        assert main(["generate", *words, *prompt]) == 0
        return capsys.readouterr().out

    answer = said("--run", folder)  # the only task that speaks
    assert answer.strip() and answer == said("--run", folder, "--task", "text")
    assert answer == said("--model", str(project / "base"), "--adapter", f"{folder}/adapter/text")
    for verb in ("merge", "export"):
        assert main([verb, "--run", folder, "--to", str(tmp_path / verb), "--task", "text"]) == 0
    assert answer == said("--model", str(tmp_path / "merge"))
    assert answer == said("--model", str(project / "base"), "--adapter", str(tmp_path / "export" / "adapter"))
    assert main(["merge", "--run", folder, "--to", str(tmp_path / "all")]) == 0
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"color", "way", "text", "hue"}
    assert main(["export", "--run", folder, "--to", str(tmp_path / "one"), "--task", "way"]) == 0
    model, _ = api.load_pretrained(project / "base", adapter=tmp_path / "one" / "adapter")
    assert len(model.head.labels) == 2  # of the three tasks, this one

    class Fake:
        label = "fake"

        def measure(self, model: Any, params: Any, tokenizer: Any, *, template: str) -> Measured:
            assert generate(model, params, tokenizer, ["the fire is"], 6) == [answer.removesuffix("\n")]
            return Measured("a table", {"head": model.head.kind})

    assert entry._measure(tmp_path / "run", Fake(), entry.Console(), "") == 0
    assert json.loads((tmp_path / "run" / "evals" / "fake-text.json").read_text()) == {"head": "causal_lm"}


# Errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, text",
    [
        (["objective.tasks.1.name=color"], "objective.tasks  2 tasks are called 'color'"),
        (["data=stdlib_docs"], "objective=multi_task, data=stdlib_docs  every task has data of its own"),
        (["objective=causal_lm"], "data=tasks, objective=causal_lm  there are no tasks"),
        (["objective.tasks.0.data=tasks"], "objective.tasks.0.data=tasks  a task needs a data set"),
        (["objective.tasks.3.head=colour"], "objective.tasks.3.head=colour  no such task. Tasks: color, way"),
        (["objective.tasks.3.head=text"], "objective.tasks.3.head=text  is no trained head of its own, or of another"),
        (["objective.tasks.1.train=false"], "objective.tasks.1.train=False  task 'way' would be evaluated on a head"),
        (["train.batch=2"], "train.batch=2, objective.tasks  3 tasks are trained"),
        (["objective.tasks.0.objective=multi_task"], "a task cannot itself be multi_task"),
    ],
)
def test_tasks_that_cannot_be_together(project, tmp_path, changes, text):
    with pytest.raises(ConfigError) as error:
        a_run(project, tmp_path, *changes)
    assert text in str(error.value)


def test_a_head_for_other_labels_is_refused(project, tmp_path):
    tasks = tasks_of(project)
    with pytest.raises(ConfigError, match=r"objective\.tasks\.3\.head=way  has the labels down, up; hue has blue"):
        run = a_run(project, tmp_path, tasks=(*tasks[:3], tasks[3].model_copy(update={"head": "way"})))
        prepare(run, say=lambda _: None)


@pytest.mark.parametrize(
    "verb, words, text",
    [
        (
            "generate",
            ["--task", "color", "--prompt", "a"],
            "--task color  its objective is classification, which predicts no",
        ),
        (
            "generate",
            ["--task", "txt", "--prompt", "a"],
            "--task txt  is no task of RUN. Did you mean 'text'? Tasks: color, way",
        ),
        ("eval", ["--task", "way", "evals=lm_eval", "tasks=a"], "which predicts no text. Tasks that do: text"),
        (
            "eval",
            ["--task", "text"],
            "eval: --task text  is for evals=NAME; without it every task of the run is evaluated",
        ),
        ("merge", ["--task", "tex", "--to", "NEW"], "--task tex  is no task of RUN. Did you mean 'text'?"),
        ("export", ["--task", "tex", "--to", "NEW"], "--task tex  is no task of RUN. Did you mean 'text'?"),
        ("generate", ["--prompt", "a"], "holds neither an adapter nor a model yet: it has not finished training"),
        (
            "eval",
            ["evals=lm_eval", "tasks=a"],
            "holds neither an adapter nor a model yet: it has not finished training",
        ),
    ],
)
def test_tasks_that_are_asked_for_and_cannot_answer(project, tmp_path, capsys, verb, words, text):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(a_run(project, folder).model_dump_json())
    words = [str(tmp_path / "new") if w == "NEW" else w for w in words]
    assert main([verb, "--run", str(folder), *words]) == 2
    assert text.replace("RUN", str(folder)) in capsys.readouterr().err


def test_which_task_answers(project, tmp_path):
    tasks = tasks_of(project)
    more = tasks[2].model_copy(update={"name": "prose"})
    with pytest.raises(ConfigError, match="--task  is missing: 2 tasks of x answer: text, prose"):
        entry.speaking(a_run(project, tmp_path, tasks=(*tasks, more)), Path("x"), "")
    with pytest.raises(ConfigError, match=r"x  is a run of color \(classification\), .* predicts no text. .* do: none"):
        entry.speaking(a_run(project, tmp_path, tasks=tasks[:2]), Path("x"), "")
    plain = config.Run()
    assert (
        entry.speaking(plain, Path("x"), "") == "" and entry.speaking(a_run(project, tmp_path), Path("x"), "") == "text"
    )
    with pytest.raises(ConfigError, match="--task text  is no task of x. It has one task; leave --task out"):
        entry.speaking(plain, Path("x"), "text")


def test_a_head_that_the_model_cannot_have_names_its_task(project):
    heads = (several().tasks[0], TaskHead("text", HeadSpec("masked_lm"), "text"))
    with pytest.raises(ConfigError, match=r"objective\.tasks\.1\.objective  task 'text': llama has no head"):
        load_several(Pretrained(path=str(project / "base")), Numerics(), heads, seed=0, vocab=0, say=lambda _: None)
