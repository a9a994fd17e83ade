"""LoftQ: the start of LoRA over a quantized base, against Algorithm 1 in numpy, the base that it leaves."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import params as p
from ftjax.errors import ConfigError
from ftjax.models import hf
from ftjax.models.sources import Pretrained, Scratch, source_of
from ftjax.peft.base import bind, merge
from ftjax.peft.dora import DoRA
from ftjax.peft.lora import LoRA
from ftjax.quant.base import Quantized, pack_store, unpack_store
from ftjax.quant.fp8 import FP8
from ftjax.quant.int8 import Int8
from ftjax.quant.nf4 import NF4, NF4_VALUES
from ftjax.train.state import whole
from tests import tiny


def loftq(rank: int = 4, iterations: int = 1, **changes) -> LoRA:
    return LoRA(rank=rank, start="loftq", loftq_iterations=iterations, **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, its plain weights, their folder): two layers whose kernels fill blocks."""
    model = tiny.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16, num_key_value_heads=4)
    weights = tiny.weights(model)
    return model, weights, str(hf.save(model, weights, tmp_path_factory.mktemp("model")))


def begun(saved, method, storage=None):
    """The tiny program whose base was read from the folder under the method."""
    storage = storage or NF4(double=False)
    model, _, folder = saved
    return tiny.tiny(method, model=model, base=hf.load(folder, storage=method.storage(storage))[1])


def quantized(w: np.ndarray) -> np.ndarray:
    """NF4 of a kernel [in, out] as torch holds it, by trying every value."""
    rows = w.T.reshape(-1, 64)
    scale = np.abs(rows).max(1, keepdims=True)
    at = np.abs((rows / scale)[..., None] - np.array(NF4_VALUES)).argmin(-1)
    return (np.array(NF4_VALUES)[at] * scale).reshape(w.T.shape).T


def algorithm(w: np.ndarray, rank: int, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q, L) of Algorithm 1 in float64."""
    low = np.zeros_like(w)
    for _ in range(turns):
        q = quantized(w - low)
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return q, low


def updates(t) -> dict[str, np.ndarray]:
    """s A B by key."""
    store = whole(t.parts, t.parts.frozen, {})
    return {k: np.asarray(d.scale[:, None, None] * (d.a @ d.b)) for k, d in store["overlay"].items()}


@pytest.mark.parametrize(("rank", "turns"), [(2, 1), (4, 1), (8, 1), (4, 3)])
def test_every_kernel_equals_the_algorithm_in_numpy(saved, rank, turns):
    _, plain, _ = saved
    t = begun(saved, loftq(rank, turns, alpha=24.0))
    found = updates(t)
    assert len(found) == 7
    for key, low in found.items():
        q = np.asarray(t.base[key].materialize())
        for layer, w in enumerate(np.asarray(plain[key], np.float64)):
            want_q, want_low = algorithm(w, rank, turns)
            # After the first turn a weight at a border between codes may fall on its other side, as in float32.
            assert np.mean(np.abs(q[layer] - want_q) > 1e-5) < (1e-9 if turns == 1 else 2e-3)
            error = np.linalg.norm(w - want_q - want_low)
            assert np.linalg.norm(w - q[layer] - low[layer]) == pytest.approx(error, rel=1e-4 if turns == 1 else 2e-3)
            assert error < np.linalg.norm(w - quantized(w))
            if turns == 1:
                assert np.abs(low[layer] - want_low).max() < 1e-4 * np.abs(w).max()


@pytest.mark.parametrize("storage", [NF4(), Int8(), FP8()], ids=["nf4", "int8", "fp8"])
def test_the_error_falls_with_the_rank_and_with_the_turns(saved, storage):
    _, plain, _ = saved

    def errors(rank, turns=1):
        t = begun(saved, loftq(rank, turns), storage)
        held = unpack_store(t.base)
        return {k: float(jnp.linalg.norm(plain[k] - held[k] - low)) for k, low in updates(t).items()}

    before = pack_store(storage, plain, saved[0].table)
    none = {k: float(jnp.linalg.norm(plain[k] - before[k].materialize())) for k in errors(2)}
    rows = [none, errors(2), errors(4), errors(8)]
    for key in none:
        assert sorted((row[key] for row in rows), reverse=True) == [row[key] for row in rows], key
        assert rows[3][key] < 0.9 * none[key]
    total = [sum(x**2 for x in row.values()) for row in (errors(8, 1), errors(8, 5))]
    assert total[1] < total[0]


def test_logits_are_nearer_to_those_of_the_plain_model(saved):
    model, plain, folder = saved
    inputs = {"input_ids": tiny.batch(8).tokens}
    look = jax.jit(model.apply)
    want = look(plain, inputs).logits

    def distance(t):
        store = whole(t.parts, t.parts.frozen, {})
        return float(jnp.linalg.norm(look(bind(store["base"], store["overlay"]), inputs).logits - want))

    zero = distance(tiny.tiny(LoRA(rank=8), model=model, base=hf.load(folder, storage=NF4())[1]))
    once, often = (distance(begun(saved, loftq(8, turns), NF4())) for turns in (1, 5))
    assert once < 0.85 * zero and often < 0.8 * zero


def test_one_turn_leaves_the_base_as_quantization_makes_it(saved):
    model, plain, folder = saved
    for turns, same in ((1, True), (2, False)):
        base = begun(saved, loftq(4, turns, targets=("q_proj", "up_proj"), layers=(1,)), NF4()).base
        want = p.cut(pack_store(NF4(), plain, model.table), p.bounds(base))
        assert {k for k in base if k.endswith("q/w")} == {"layers[0:1]/q/w", "layers[1:2]/q/w"}
        assert jax.tree.structure(base) == jax.tree.structure(want)
        unequal = [k for k in want if any(map(np.any, jax.tree.leaves(jax.tree.map(np.not_equal, base[k], want[k]))))]
        assert unequal == ([] if same else ["layers[1:2]/q/w", "layers[1:2]/up/w"])
    held = hf.load(folder, storage=LoRA(rank=4).storage(NF4()))[1]
    assert isinstance(held["layers[0:2]/q/w"], Quantized) and LoRA(rank=4).storage(NF4()) == NF4()


def test_ranks_and_scales_of_some_targets(saved):
    t = begun(saved, loftq(4, targets=("q_proj", "v_proj"), ranks=(("v_proj", 2),), alphas=(("v_proj", 3.0),)))
    base, overlay = saved[1], whole(t.parts, t.parts.frozen, {})["overlay"]
    for name, rank, scale in (("q", 4, 4.0), ("v", 2, 1.5)):
        key = f"layers[0:2]/{name}/w"
        assert overlay[key].a.shape[-1] == rank and (overlay[key].scale == scale).all()
        want = algorithm(np.asarray(base[key][1], np.float64), rank, 1)[1]
        assert np.abs(updates(t)[key][1] - want).max() < 1e-4


def test_it_trains_and_merges(saved):
    model, _, _ = saved
    t, data = begun(saved, loftq(4, 2), NF4()), tiny.batch(4, micro=2)
    state, step = t.state, jax.jit(t.program.train)
    losses = []
    for _ in range(5):
        state, out = step(state, t.frozen, data)
        losses.append(float(jax.tree.leaves(out)[0]))
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), state.trainable, t.state.trainable)
    assert all(jax.tree.leaves(moved))
    store = whole(state, t.frozen.store, {})
    bound, inputs = bind(store["base"], store["overlay"]), {"input_ids": tiny.batch(3).tokens}
    folded = merge(bound, model.table)
    assert tiny.largest(model.apply(folded, inputs).logits, model.apply(bound, inputs).logits) < 2e-5


def test_refusals(saved):
    model, plain, folder = saved
    method = loftq()
    with pytest.raises(ConfigError, match="layers/down/w is not quantized"):
        hf.load(folder, storage=method.storage(LoRA().storage(Pretrained().quantize)))
    with pytest.raises(ConfigError, match="head is not quantized|head/w is not quantized"):
        hf.load(folder, storage=loftq(targets=("lm_head",)).storage(NF4()))
    for base in (plain, pack_store(NF4(), plain, model.table)):
        with pytest.raises(ConfigError, match="was not loaded for it"):
            tiny.tiny(method, model=model, base=base)
    for source in (Pretrained(), Scratch()):
        lines = list(method.check(SimpleNamespace(model=source)))
        assert lines and "model.quantize is none" in lines[0]
    assert not list(method.check(SimpleNamespace(model=Pretrained(quantize=NF4()))))
    with pytest.raises(ValueError, match="start"):
        DoRA(start="loftq")  # type: ignore[arg-type]


def test_what_is_loaded_after_training():
    """Without the start where one turn left the base as it would be; with more turns, the method's own base."""
    for turns, own in ((1, False), (2, True)):
        run = SimpleNamespace(peft=loftq(4, turns), model=Pretrained(quantize=NF4()))
        assert source_of(run).quantize != NF4()
        assert (source_of(run, begins=False).quantize == NF4()) != own
    run = SimpleNamespace(peft=LoRA(), model=Pretrained(quantize=NF4()))
    assert source_of(run) is run.model
