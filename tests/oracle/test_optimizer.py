"""Schedules, update rules, decay groups and clipping against transformers, torch and the papers' formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax import tree  # noqa: E402
from ftjax.config import Optim, Train  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.objectives.causal_lm import CausalLM  # noqa: E402
from ftjax.peft.full import Full  # noqa: E402
from ftjax.train.optimizer import (  # noqa: E402
    NO_DECAY,
    OptimSpec,
    clip_by_norm,
    decay_groups,
    hyper_of,
    learning_rate,
    make_tx,
)
from ftjax.train.state import kinds_of, partition  # noqa: E402
from tests.oracle import named, relative, torch_llama  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

STEPS = 40


def hyper(optim: Optim, steps: int = STEPS) -> dict[str, Any]:
    """The numbers of a run as arrays."""
    run: Any = SimpleNamespace(optim=optim, train=Train(steps=steps), objective=CausalLM())
    return hyper_of(run)


# Schedules -------------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "constant": (dict(schedule="constant"), "constant", {}),
    "constant, warm-up": (dict(schedule="constant", warmup=7), "constant_with_warmup", {}),
    "linear": (dict(schedule="linear"), "linear", {}),
    "linear, warm-up": (dict(schedule="linear", warmup=7), "linear", {}),
    "linear to a tenth": (dict(schedule="linear", warmup=7, final=0.1), "polynomial", dict(lr_end=0.1 * 3e-4, power=1)),
    "cosine": (dict(schedule="cosine"), "cosine", {}),
    "cosine, warm-up": (dict(schedule="cosine", warmup=7), "cosine", {}),
    "cosine to a tenth": (dict(schedule="cosine", warmup=7, final=0.1), "cosine_with_min_lr", dict(min_lr_rate=0.1)),
    "wsd": (dict(schedule="wsd", warmup=7, decay_share=0.25), "warmup_stable_decay", dict(num_decay_steps=10)),
    # With a warm-up as well, transformers warms up from the smallest rate and not from 0 as for every other schedule.
    "wsd to a tenth": (
        dict(schedule="wsd", decay_share=0.3, final=0.1), "warmup_stable_decay", dict(num_decay_steps=12, min_lr_ratio=0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    ours, theirs, extra = SCHEDULES[name]
    optim = Optim(lr=3e-4, **ours)
    adam = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=optim.lr)
    schedule = transformers.get_scheduler(
        theirs, adam, num_warmup_steps=optim.warmup, num_training_steps=STEPS, scheduler_specific_kwargs=extra
    )
    want = []
    for _ in range(STEPS + 1):
        want.append(schedule.get_last_lr()[0])
        adam.step()
        schedule.step()
    rate = jax.jit(jax.vmap(lambda t: learning_rate(optim.schedule, hyper(optim), t)))
    got = rate(jnp.arange(STEPS + 5))
    assert len(set(want)) > 1 or name == "constant"
    np.testing.assert_allclose(got[: STEPS + 1], want, rtol=1e-5, atol=1e-10)
    np.testing.assert_array_equal(got[STEPS:], got[STEPS])  # transformers' cosine would rise again


# Update rules ----------------------------------------------------------------------------------------------------------

SHAPES = {
    "base/embed/w": (131, 160), "base/layers[0:3]/q/w": (3, 129, 140), "base/layers[0:3]/q/b": (3, 7), "base/norm/w": (9,),
}  # fmt: skip


def draw(i: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """A random tree, other at each `i`."""
    rng = np.random.default_rng(i)
    return {k: (scale * rng.standard_normal(s)).astype(np.float32) for k, s in SHAPES.items()}


def ours(optim: Optim, groups: dict[str, str], steps: int = 12) -> dict[str, np.ndarray]:
    """The tree after some steps on drawn gradients, whose size jumps by a hundred half way."""
    spec, h = OptimSpec.of(optim), hyper(optim, steps)
    params = jax.tree.map(jnp.asarray, draw(0))
    state = make_tx(spec, groups, h, jnp.int32(0)).init(params)

    @jax.jit
    def step(params, state, grads, i):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = make_tx(spec, groups, h, i).update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for i in range(steps):
        params, state = step(params, state, gradients(i), jnp.int32(i))
    return {k: np.asarray(x) for k, x in params.items()}


def gradients(i: int) -> dict[str, np.ndarray]:
    """The gradients of step `i`."""
    return draw(100 + i, scale=1.0 if i < 6 else 100.0)


def theirs(make: Any, steps: int = 12) -> dict[str, np.ndarray]:
    """The same with a torch optimizer, each layer of a stack a parameter of its own; `make(params) -> optimizer`."""
    torch.set_num_threads(1)
    start = draw(0)
    params = {k: [torch.tensor(x) for x in (v if "[" in k else v[None])] for k, v in start.items()}
    optimizer = make(params)
    rates = [g["lr"] for g in optimizer.param_groups]
    for i in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - i / steps)  # linear
        for k, g in gradients(i).items():
            for p, x in zip(params[k], g if "[" in k else g[None], strict=True):
                p.grad = torch.tensor(x)
        optimizer.step()
    return {k: np.stack(v) if "[" in k else v[0].numpy() for k, v in params.items()}


ONE = dict.fromkeys(SHAPES, "full")
SPLIT = {k: "full" + NO_DECAY if k.endswith("/b") or "norm" in k else "full" for k in SHAPES}


def flat(params: dict[str, list[Any]], keep: Any = lambda k: True) -> list[Any]:
    """The tensors whose key passes."""
    return [p for k, v in params.items() if keep(k) for p in v]


def close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], limit: float) -> None:
    """Equal to a relative limit, and moved at all."""
    start = draw(0)
    assert a.keys() == b.keys()
    for k in a:
        assert relative(b[k], start[k]) > 1e-3, k
        assert relative(a[k], b[k]) < limit, (k, relative(a[k], b[k]))


def test_adamw():
    optim = Optim(lr=1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3)
    kwargs = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    close(ours(optim, ONE), theirs(lambda p: torch.optim.AdamW(flat(p), weight_decay=0.3, **kwargs)), 1e-5)
    kernel = lambda k: SPLIT[k] == "full"  # noqa: E731
    groups = lambda p: [  # noqa: E731
        dict(params=flat(p, kernel), weight_decay=0.3),
        dict(params=flat(p, lambda k: not kernel(k)), weight_decay=0.0),
    ]
    split = theirs(lambda p: torch.optim.AdamW(groups(p), **kwargs))
    close(ours(optim, SPLIT), split, 1e-5)
    assert relative(ours(optim, ONE)["base/norm/w"], split["base/norm/w"]) > 1e-3, "the groups make no difference"


def test_lora_plus():
    """LoRA+ is a second group with a higher rate."""
    optim = Optim(lr=1e-3, weight_decay=0.1, lora_plus=16.0)
    groups = {k: "lora_b" if k.startswith("base/layers") else "lora_a" for k in SHAPES}
    b = lambda k: groups[k] == "lora_b"  # noqa: E731
    want = theirs(
        lambda p: torch.optim.AdamW(
            [dict(params=flat(p, b), lr=16e-3), dict(params=flat(p, lambda k: not b(k)), lr=1e-3)], weight_decay=0.1
        )
    )
    close(ours(optim, groups), want, 1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum):
    """Without decay; torch adds the decay to the gradient, we keep it apart from the momentum as AdamW does."""
    optim = Optim(name="sgd", lr=1e-2, b1=momentum)
    close(ours(optim, ONE), theirs(lambda p: torch.optim.SGD(flat(p), lr=1e-2, momentum=momentum)), 1e-5)


def test_sgd_decay_is_decoupled():
    got = ours(Optim(name="sgd", lr=1e-2, b1=0.9, weight_decay=0.3), ONE)
    p, trace = draw(0), {k: 0.0 for k in SHAPES}
    for i in range(12):
        for k, g in gradients(i).items():
            trace[k] = 0.9 * trace[k] + g
            p[k] = p[k] - 1e-2 * (1 - i / 12) * (trace[k] + 0.3 * p[k])
    close(got, p, 1e-5)


def test_lion():
    """Algorithm 2 of Chen et al. 2023 (arXiv:2302.06675)."""
    got = ours(Optim(name="lion", lr=1e-3, b1=0.9, b2=0.99, weight_decay=0.3), ONE)
    p, m = draw(0), {k: 0.0 for k in SHAPES}
    for i in range(12):
        for k, g in gradients(i).items():
            p[k] = p[k] - 1e-3 * (1 - i / 12) * (np.sign(0.9 * m[k] + 0.1 * g) + 0.3 * p[k])
            m[k] = 0.99 * m[k] + 0.01 * g
    close(got, p, 1e-5)


def test_adafactor():
    """transformers' Adafactor with a given rate; each layer of a stack is factored and clipped on its own."""
    got = ours(Optim(name="adafactor", lr=1e-2, weight_decay=0.3), ONE)
    want = theirs(
        lambda p: transformers.optimization.Adafactor(
            flat(p), lr=1e-2, scale_parameter=False, relative_step=False, weight_decay=0.3, eps=(1e-30, 1e-3)
        )
    )
    close(got, want, 1e-5)


# Clipping and groups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.1, 50.0, 1e9])
def test_clipping(limit):
    grads = draw(3, scale=0.2)
    tensors = {k: torch.zeros(x.shape, requires_grad=True) for k, x in grads.items()}
    for k, t in tensors.items():
        t.grad = torch.tensor(grads[k])
    norm = torch.nn.utils.clip_grad_norm_(list(tensors.values()), limit)
    got = clip_by_norm(jax.tree.map(jnp.asarray, grads), jnp.float32(norm.item()), jnp.float32(limit))
    for k, t in tensors.items():
        np.testing.assert_allclose(got[k], t.grad.numpy(), rtol=1e-6)


def test_the_parameters_without_decay_are_those_of_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    theirs = torch_llama(tmp_path, attention_bias=True, mlp_bias=True)
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, theirs))
    model, params = hf.load(str(tmp_path))
    parts = partition(params, {}, model.table, Full().labels(model.table))
    groups = decay_groups(parts.groups, kinds_of(parts.trainable, model.table))
    plain = tree.leaves_by_path(groups)
    ours = {
        name
        for key, value in params.items()
        for name, _ in named(model.table, {key: value})
        if plain[f"base/{key}"] == "full"
    }
    assert ours == decayed and len(decayed) < len(list(theirs.parameters()))
