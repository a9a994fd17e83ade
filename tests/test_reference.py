"""The reference's log-probabilities computed before training: the same losses, a smaller step, a cache that is never stale."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import config
from ftjax.config import Compute, Loader
from ftjax.data.batches import Examples
from ftjax.data.pairs import mismatched
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.dpo import DPO
from ftjax.objectives.kto import KTO
from ftjax.objectives.multi_task import MultiTask, SubTask
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA
from ftjax.peft.sparse import Sparse
from ftjax.train.reference import known
from ftjax.train.setup import compile_train
from tests.preferences import drawn, earlier, project, setup_of

SMALL = LoRA(rank=2, targets=("q_proj",))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return project(tmp_path_factory.mktemp("reference"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


def both(root, objective, **parts):
    """(setup with the live reference, the same with precomputed numbers)."""
    live = setup_of(root, objective=objective, **parts)
    ahead = setup_of(root, objective=objective.model_copy(update={"precompute": True}), **parts)
    return live, known(ahead, say=lambda text: None)


OBJECTIVES = {"dpo": DPO(), "ld": DPO(ld_alpha=0.3, loss=("ipo", "sft")), "kto": KTO()}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_losses_equal_those_of_the_live_reference(root, objective):
    data = Local(path=str(root / ("judged" if objective.name == "kto" else "pairs")) + ".jsonl", eval_share=0.2)
    live, ahead = both(root, objective, data=data, peft=SMALL)
    assert ahead.frozen.reference is None and live.frozen.reference is not None
    moved = drawn(live.state.trainable, seed=5)
    results = []
    for setup in (live, ahead):
        state = setup.state.replace(trainable=moved)
        batch = jax.tree.map(jnp.asarray, setup.batches.next())
        assert (batch.reference is None) == (setup is live)
        results.append(jax.device_get(jax.jit(setup.program.train)(state, setup.frozen, batch)))
    (a, one), (b, two) = results
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-6, rel=1e-6)
    for name in one["metrics"]:
        np.testing.assert_allclose(*(m["metrics"][name][0] for m in (one, two)), rtol=1e-5, atol=1e-5, err_msg=name)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)


def test_the_step_does_not_run_the_reference(root):
    """LoRA over a frozen base: forward and the gradient of the inputs, and a second forward where the reference is live."""
    compute = Compute(layers="unroll", loss_chunk=0)
    setups = both(root, DPO(), peft=SMALL, compute=compute)
    flops = [compile_train(s).cost_analysis()["flops"] for s in setups]
    assert flops[1] < 0.75 * flops[0], flops[1] / flops[0]


def test_full_fine_tuning_holds_no_second_model(root):
    live, ahead = both(root, DPO(), peft=Full())
    assert len(jax.tree.leaves(live.frozen.reference)) == len(jax.tree.leaves(live.state.trainable))
    assert not jax.tree.leaves(ahead.frozen)


def test_only_the_same_run_finds_the_cache(root, tmp_path):
    said: list[str] = []

    def status(**parts):
        objective = parts.pop("objective", DPO(precompute=True))
        known(setup_of(root, objective=objective, **{"peft": SMALL} | parts), say=said.append)
        return said[-1].split("cache: ")[1].split(" ")[0]

    assert status() == "miss" and status() == "hit"
    assert status(objective=DPO(precompute=True, beta=0.5)) == "hit"  # it does not decide the numbers
    assert status(objective=DPO(precompute=True, ld_alpha=0.5)) == "miss"
    folder = earlier(root, SMALL)
    source = Pretrained(path=str(root / "base"), adapter=str(folder))
    assert status(model=source) == "miss" and status(model=source) == "hit"
    earlier(root, SMALL, seed=4)  # the same folder, trained anew
    assert status(model=source) == "miss"
    assert status(loader=Loader(max_length=24)) == "miss"
    changed = tmp_path / "pairs.jsonl"
    changed.write_text((root / "pairs.jsonl").read_text().replace("cat", "dog"))
    assert status(data=Local(path=str(changed), eval_share=0.2)) == "miss"
    assert status() == "hit"


def test_forgotten_numbers_are_not_zeros(root):
    setup = setup_of(root, objective=DPO(precompute=True), peft=SMALL)
    assert np.isnan(setup.batches.next().reference).all()


def test_several_tasks_refuse_it():
    objective = MultiTask(tasks=(SubTask(name="a", data=Local(path="x"), objective=DPO(precompute=True)),))
    run = config.Run(objective=objective)
    assert "one task" in "".join(objective.tasks[0].objective.check(run))


@pytest.mark.parametrize("objective", [DPO(precompute=True), KTO(precompute=True)], ids=lambda o: o.name)
def test_a_method_that_begins_with_gradients_refuses_it(objective):
    run = config.Run(objective=objective, peft=Sparse(choose="fisher"))
    assert "peft=sparse  it begins with gradients" in "".join(objective.check(run))
    assert not [*objective.check(config.Run(objective=objective, peft=Sparse()))]


def test_every_prompt_gets_another_ones_answer_once():
    n = 9
    lengths = [4 + i % 3 for i in range(n)]
    ids = np.concatenate([np.r_[[i, i], np.full(k - 2, 100 + i)] for i, k in enumerate(lengths)]).astype(np.int32)
    weights = (ids >= 100).astype(np.float32)
    offsets = np.cumsum([0, *lengths])
    examples = Examples(ids, offsets, np.arange(n) * 2, tuple(f"x:{i}" for i in range(2 * n)), weights)
    made = mismatched(examples)
    pairs = [(int(made[i].input_ids[0]), int(made[i].input_ids[-1]) - 100) for i in range(n)]
    assert [p for p, _ in pairs] == list(range(n)) and sorted(a for _, a in pairs) == list(range(n))
    assert all(p != a for p, a in pairs)
    assert made.lengths.max() <= examples.lengths.max() and (made.rows == examples.rows).all()
    assert all((made[i].weights == (made[i].input_ids >= 100)).all() for i in range(n))
    assert len(mismatched(examples.take(np.zeros(0, np.int64)))) == 0
