"""The one train step: accumulation, packing, populations, devices, guards, memory."""

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ftjax import config
from ftjax.models.base import Numerics
from ftjax.objectives.causal_lm import CausalLM
from ftjax.parallel.mesh import AXES, Placement, axes_of_store, make_mesh
from ftjax.peft.base import bind
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA
from tests import tiny
from tests.tiny import batch, largest, relative


def run(t, batches, steps=3):
    step = jax.jit(t.program.train)
    state = t.state
    for _ in range(steps):
        state, metrics = step(state, t.frozen, batches)
    return state, metrics, step


@pytest.mark.parametrize("peft", [LoRA(rank=4), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("micro", [2, 3, 6])
def test_any_split_into_micro_batches_equals_the_large_batch(peft, micro):
    t = tiny.tiny(peft, objective=CausalLM(label_smoothing=0.1))
    whole, m1, _ = run(t, batch(6, micro=1))
    parts, m2, _ = run(t, batch(6, micro=micro))
    # Sums in another order; Adam divides by the root of tiny second moments, which magnifies the last bit.
    assert abs(float(m1["loss"] - m2["loss"])) < 2e-6
    assert largest(whole.trainable, parts.trainable) < 2e-4


def test_a_micro_batch_of_padding_changes_nothing():
    t = tiny.tiny()
    b = batch(4, micro=2)
    empty = dc.replace(b, weights=b.weights.at[1].set(0.0))
    half = jax.tree.map(lambda x: x[:1], b)
    a, ma, _ = run(t, empty)
    c, mc, _ = run(t, half)
    assert largest(a.trainable, c.trainable) < 1e-6 and float(ma["loss"]) == pytest.approx(float(mc["loss"]), rel=1e-6)


def test_packed_equals_unpacked_per_token():
    model, base = tiny.llama(), tiny.weights(tiny.llama())
    rng = np.random.default_rng(0)
    a, b = rng.integers(3, 96, 7), rng.integers(3, 96, 9)
    ids = jnp.asarray(np.concatenate([a, b])[None], jnp.int32)
    positions = jnp.asarray(np.concatenate([np.arange(7), np.arange(9)])[None], jnp.int32)
    segments = jnp.asarray(np.array([0] * 7 + [1] * 9)[None], jnp.int32)
    packed = model.apply(base, {"input_ids": ids, "positions": positions, "segments": segments}).logits[0]
    for part, alone in ((packed[:7], a), (packed[7:], b)):
        want = model.apply(base, {"input_ids": jnp.asarray(alone[None], jnp.int32)}).logits[0]
        assert largest(part, want) < 1e-5


def test_padding_on_either_side_changes_no_logit():
    model, base = tiny.llama(), tiny.weights(tiny.llama())
    ids = jnp.asarray(np.random.default_rng(1).integers(3, 96, (1, 6)), jnp.int32)
    want = model.apply(base, {"input_ids": ids}).logits
    pad, one, zero = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 6), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    left = {"input_ids": jnp.concatenate([pad, ids], 1), "attention_mask": jnp.concatenate([zero, one], 1)}
    right = {"input_ids": jnp.concatenate([ids, pad], 1), "attention_mask": jnp.concatenate([one, zero], 1)}
    assert largest(model.apply(base, left).logits[:, 3:], want) < 1e-5
    assert largest(model.apply(base, right).logits[:, :6], want) < 1e-5


@pytest.mark.parametrize("chunk", [0, 5, 16, 40])
def test_the_chunked_loss_equals_the_plain_one(chunk):
    model, b = tiny.llama(Numerics(loss_chunk=chunk)), batch(3)
    base = tiny.weights(model)

    def plain(p):
        z = jax.nn.log_softmax(model.apply(p, {"input_ids": b.tokens}).logits)
        nll = -jnp.take_along_axis(z, b.tokens[..., None], -1)[..., 0]
        return ((0.9 * nll - 0.1 * z.mean(-1)) * b.weights).sum()

    def ours(p):
        out = model.apply(p, {"input_ids": b.tokens}).nll(b.tokens, smoothing=jnp.float32(0.1))
        return (out.nll * b.weights).sum()

    def frozen_head(p):
        return ours({**p, "head/w": jax.lax.stop_gradient(p["head/w"])})

    want, got, frozen = jax.grad(plain)(base), jax.grad(ours)(base), jax.grad(frozen_head)(base)
    assert relative(got, want) < 2e-5
    assert (
        relative({k: v for k, v in frozen.items() if k != "head/w"}, {k: v for k, v in want.items() if k != "head/w"})
        < 2e-5
    )
    assert float(jnp.abs(frozen["head/w"]).max()) == 0


def test_identity_at_step_0_is_bit_for_bit():
    t = tiny.tiny(LoRA(rank=4, dropout=0.3))
    b = {"input_ids": batch(3).tokens}
    plain = jax.jit(lambda: t.model.apply(t.base, b).logits)()
    adapted = jax.jit(lambda: t.model.apply(bind(t.base, t.overlay), b).logits)()
    assert (plain == adapted).all()


@pytest.mark.parametrize("peft", [LoRA(rank=4, dropout=0.2), Full()], ids=["lora", "full"])
def test_scan_unroll_and_remat_agree(peft):
    results = []
    for numerics in (
        Numerics(),
        Numerics(layers="unroll"),
        Numerics(remat="full"),
        Numerics(remat="dots", layers="unroll"),
    ):
        t = tiny.tiny(peft, model=tiny.llama(numerics))
        results.append(run(t, batch(4, micro=1))[0].trainable)
    assert all(largest(r, results[0]) < 1e-5 for r in results[1:])


def test_a_layer_subset_leaves_the_other_layers_bare():
    t = tiny.tiny(LoRA(rank=4, layers=(1, 2)))
    bound = bind(t.base, t.overlay)
    assert {type(v).__name__ for k, v in bound.items() if k.startswith("layers[1:3]/q")} == {"Adapted"}
    assert not any(
        type(v).__name__ == "Adapted" for k, v in bound.items() if k.startswith(("layers[0:1]", "layers[3:4]"))
    )
    state, _, _ = run(t, batch(4, micro=1))
    assert largest(state.trainable, t.state.trainable) > 1e-4


def test_dropout_masks_do_not_depend_on_cuts():
    whole = tiny.tiny(LoRA(rank=4, dropout=0.5), randomize=True)
    from ftjax.params import cut

    key, b = jax.random.key(3), {"input_ids": batch(2).tokens}
    store = {"base": whole.base, "overlay": whole.parts.trainable["overlay"]}
    from ftjax import tree

    overlay = tree.combine(whole.parts.trainable, whole.parts.const, whole.parts.frozen)["overlay"]
    one = whole.model.apply(bind(store["base"], overlay, key), b).logits
    two = whole.model.apply(bind(store["base"], cut(overlay, {"layers": {1, 3}}), key), b).logits
    other = whole.model.apply(bind(store["base"], overlay, jax.random.key(4)), b).logits
    assert largest(one, two) < 1e-5 < largest(one, other)


def test_a_population_equals_separate_runs():
    """4 trials, two rates, two seeds, two ranks by zero padding: one vmapped program against 4 programs."""
    steps, trials = 20, [(0, 4, 1e-2), (1, 2, 1e-2), (0, 2, 3e-3), (1, 4, 3e-3)]
    base, data = tiny.weights(tiny.llama()), batch(4, micro=2)
    alone, states = [], []
    for seed, rank, lr in trials:
        t = tiny.tiny(
            LoRA(rank=rank, alpha=8.0, dropout=0.1), base=base, seed=seed, optim=config.Optim(lr=lr), steps=steps
        )
        state, metrics, _ = run(t, data, steps)
        alone.append((state, metrics["loss"], rank))
        states.append(pad_rank(t.state, 4))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    step = jax.jit(jax.vmap(t.program.train, in_axes=(0, None, None)))
    for _ in range(steps):
        stacked, metrics = step(stacked, t.frozen, data)
    for i, (state, loss, rank) in enumerate(alone):
        assert float(metrics["loss"][i]) == pytest.approx(float(loss), rel=1e-5)
        mine = jax.tree.map(lambda x, i=i: x[i], stacked.trainable)
        assert relative(mine, pad_rank(state, 4).trainable) < 1e-3
        for delta in mine["overlay"].values():  # what was padded stays exactly zero
            assert not jnp.abs(delta.a[..., rank:]).any() and not jnp.abs(delta.b[..., rank:, :]).any()


def pad_rank(state, rank):
    """The state with every A [.., in, r] and B [.., r, out] (and their moments) padded to `rank` by zeros."""
    from ftjax.tree import path_of

    def pad(path, x):
        name = path_of(path).rsplit("/", 1)[-1]
        if name not in ("a", "b") or "overlay" not in path_of(path):
            return x
        widths = [(0, 0)] * x.ndim
        axis = x.ndim - 1 if name == "a" else x.ndim - 2
        widths[axis] = (0, rank - x.shape[axis])
        return jnp.pad(x, widths)

    return jax.tree_util.tree_map_with_path(pad, state)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("peft", [LoRA(rank=4, dropout=0.1), Full()], ids=["lora", "full"])
def test_eight_devices_equal_one(sizes, peft):
    t = tiny.tiny(peft)
    data = batch(16, micro=2)
    want, m1, _ = run(t, data)
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(config.Mesh(**dict(zip(AXES, sizes, strict=True))), devices)
    p = Placement(mesh, axes_of_store({"base": t.base, "overlay": t.overlay}, t.model.table))
    states, frozen = p.tree(t.state), p.tree(t.frozen)
    step = jax.jit(
        t.program.train,
        in_shardings=(states, frozen, p.batch(1)),
        out_shardings=(states, p.replicated),
        donate_argnums=0,
    )
    state = jax.device_put(jax.tree.map(jnp.copy, t.state), states)
    held, placed = jax.device_put(t.frozen, frozen), jax.device_put(data, p.batch(1))
    for _ in range(3):
        state, m8 = step(state, held, placed)
    assert step._cache_size() == 1
    assert abs(float(m1["loss"] - m8["loss"])) < 5e-6
    assert largest(state.trainable, want.trainable) < 3e-4
    if sizes == (1, 1, 2):
        leaf = (
            held.store["base"]["layers[0:4]/q/w"]
            if isinstance(peft, LoRA)
            else state.trainable["base"]["layers[0:4]/q/w"]
        )
        assert leaf.sharding.shard_shape(leaf.shape) == (4, 32, 16)


def test_axis_types_are_auto():
    assert set(make_mesh(config.Mesh(), jax.devices()).axis_types) == {AxisType.Auto}


def test_a_non_finite_step_changes_nothing_but_the_count():
    t = tiny.tiny()
    bad = t.frozen.replace(store=jax.tree.map(lambda x: x * jnp.nan, t.frozen.store))
    state, metrics = jax.jit(t.program.train)(t.state, bad, batch(4, micro=1))
    assert not bool(metrics["finite"]) and int(state.step) == 1
    assert largest(state.trainable, t.state.trainable) == 0 and largest(state.opt, t.state.opt) == 0


def test_frozen_leaves_are_bit_identical_and_trained_ones_move():
    t = tiny.tiny(LoRA(rank=4))
    before = jax.tree.map(np.asarray, t.frozen)
    state, _, _ = run(t, batch(4, micro=1), 5)
    assert all(
        (np.asarray(a) == b).all() for a, b in zip(jax.tree.leaves(t.frozen), jax.tree.leaves(before), strict=True)
    )
    assert largest(state.const, t.state.const) == 0
    assert all(
        float(jnp.abs(x - y).max()) > 0
        for x, y in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(t.state.trainable), strict=True)
    )


def test_lora_plus_scales_the_rate_of_b_only():
    one = tiny.tiny(optim=config.Optim(name="sgd", lr=1e-2, clip=0.0), randomize=True)
    ten = tiny.tiny(optim=config.Optim(name="sgd", lr=1e-2, clip=0.0, lora_plus=10.0), randomize=True)
    data = batch(4, micro=1)
    a, b = run(one, data, 1)[0].trainable, run(ten, data, 1)[0].trainable
    for key, start in one.state.trainable["overlay"].items():
        assert largest(a["overlay"][key].a, b["overlay"][key].a) == 0
        ratio = (b["overlay"][key].b - start.b) / (a["overlay"][key].b - start.b)
        assert float(jnp.median(ratio)) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_every_optimizer_learns(name):
    lr = {"adamw": 1e-2, "adafactor": 1e-2, "lion": 1e-3, "sgd": 0.5}[name]
    t = tiny.tiny(optim=config.Optim(name=name, lr=lr, schedule="constant"))
    data = batch(4, micro=1)
    first = run(t, data, 1)[1]["loss"]
    assert float(run(t, data, 20)[1]["loss"]) < float(first) - 0.05


def test_merged_equals_adapted():
    from ftjax import tree
    from ftjax.peft.base import merge

    t = tiny.tiny(LoRA(rank=4, layers=(0, 3)), randomize=True)
    overlay = tree.combine(t.parts.trainable, t.parts.const, t.parts.frozen)["overlay"]
    bound, b = bind(t.base, overlay), {"input_ids": batch(3).tokens}
    merged = merge(bound, t.model.table)
    assert set(merged) == set(tiny.weights(t.model))
    assert largest(t.model.apply(merged, b).logits, t.model.apply(bound, b).logits) < 1e-5
    assert largest(t.model.apply(merged, b).logits, t.model.apply(t.base, b).logits) > 1e-3


@pytest.mark.parametrize("kind", [bool, np.int64, np.float32], ids=lambda k: k.__name__)
def test_an_attention_mask_may_be_of_any_kind(kind):
    model, base = tiny.llama(), tiny.weights(tiny.llama())
    ids = np.random.default_rng(1).integers(3, 96, (2, 6))
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    want = model.apply(base, {"input_ids": ids, "attention_mask": jnp.asarray(mask, jnp.int32)}).logits
    got = model.apply(base, {"input_ids": ids, "attention_mask": mask.astype(kind)}).logits
    assert want.dtype == jnp.float32 and largest(got, want) == 0
