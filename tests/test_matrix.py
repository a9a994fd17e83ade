"""Every objective x method x family that is registered, and methods over a quantized base, through the one step. A new file is
tested here the moment it exists.

    pytest tests/test_matrix.py                  # a covering set
    pytest tests/test_matrix.py --matrix=full    # every cell; also writes docs/matrix.md

One cell asserts: the adapted model equals the base bit for bit before the first step (where the method promises it); frozen
leaves stay bit-identical and every trained leaf moves; one compilation; going on from a saved state equals not stopping, bit
for bit; 8 devices equal one; the merged weights equal the adapted ones.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import config, registry, tree
from ftjax.data.batches import TokenBatch
from ftjax.data.images import ImageBatch
from ftjax.data.labels import LabelBatch
from ftjax.data.pairs import PairBatch
from ftjax.data.seq2seq import SeqBatch
from ftjax.errors import ConfigError
from ftjax.headspec import VOCABULARY, label_names
from ftjax.models.sources import trained_keys
from ftjax.parallel.mesh import Placement, axes_of_store, make_mesh
from ftjax.params import Store
from ftjax.peft.base import bind, merge
from ftjax.quant.base import Quantized, pack_store, refuse_trained
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.state import whole
from tests import tiny, tinymodels

# What a component needs beyond its defaults to run on a tiny model; a new one that needs nothing needs no entry.
SMALL = {
    "lora": {"rank": 4, "dropout": 0.1},
    "dora": {"rank": 4},
    "loha": {"rank": 4},
    "lokr": {"rank": 2},
    "compacter": {"reduction": 4},
    "oft": {"block_size": 4},
    "vera": {"rank": 4, "dropout": 0.1},
    "sparse": {"rank": 2},
}
# Settings of a method that make it another one: cells beside those of the registry.
UNIPELT = (
    {"name": "lora", "rank": 2, "targets": ("q", "v"), "dropout": 0.1},
    {"name": "prefix", "tokens": 3},
    {"name": "pfeiffer", "reduction": 4},
)
VARIANTS = {
    "combine_gates": (
        "combine",
        {"methods": tuple(registry.get("peft", m["name"])(**m) for m in UNIPELT), "gates": True},
    ),
    "loreft_all": ("loreft", {"positions": "all"}),
}
MODELS = tinymodels.known()
CHEAP = ("llama", "bert", "vit")
COMMON = ("full", "lora", "prefix")
# Quantized bases: every method over these families with one objective each, and every objective with lora.
QUANTIZED = {"llama": "causal_lm", "gpt2": "causal_lm", "bert": "classification", "resnet": "image_classification"}
WIDE = (TokenBatch, LabelBatch, PairBatch, SeqBatch, ImageBatch)
# Trained leaves without a gradient, and why.
STILL = {
    "reward_model": ("base/head/b",),  # what is added to every reward cancels in their differences
    "question_answering": ("base/head/b",),  # what is added to every place's logit cancels in the softmax over places
}
# Adam divides by the root of a second moment: a gradient that is rounding alone (a key's bias shifts all scores alike)
# becomes a whole step of random sign unless eps is well above it.
OPTIM = config.Optim(lr=1e-2, weight_decay=0.01, eps=1e-4)

# Half the time to compile, for cells that are only trained.
QUICK = {"xla_backend_optimization_level": 0}


@dc.dataclass(frozen=True)
class Cell:
    """One combination, by names."""

    objective: str
    peft: str
    family: str
    quant: str = "none"

    def __str__(self) -> str:
        return f"{self.objective}-{self.peft}-{self.family}" + ("" if self.quant == "none" else f"-{self.quant}")


# The cells of `VARIANTS`; the first and the last are gone through in full.
VARIED = [
    Cell("causal_lm", "combine_gates", "llama"),
    Cell("classification", "combine_gates", "bert"),
    Cell("seq2seq", "combine_gates", "t5"),
    Cell("causal_lm", "loreft_all", "llama"),
    Cell("seq2seq", "loreft_all", "t5"),
    Cell("causal_lm", "combine_gates", "llama", "nf4"),
]


def method_of(name: str) -> Any:
    """A method on a tiny model, or one of `VARIANTS`."""
    kind, settings = VARIANTS.get(name, (name, SMALL.get(name, {})))
    return registry.get("peft", kind)(**settings)


def impossible(cell: Cell) -> str:
    """Why a combination cannot be; empty: it can."""
    wanted, had = registry.get("objective", cell.objective).heads, registry.get("family", cell.family).heads
    if not head_kind(cell):
        return f"{cell.objective} needs a head {' or '.join(wanted)}; {cell.family} has {', '.join(had)}"
    return refused(cell.peft, cell.family, cell.quant)


@functools.cache
def refused(peft: str, family: str, quant: str) -> str:
    """Why a method itself refuses a model (no such weights, no biases, or it trains what is quantized); empty: it can."""
    table, method = MODELS[family]().table, method_of(peft)
    storage = registry.get("quant", quant)()
    try:
        storage.fit(table)
        method.labels(table)
        if hasattr(method, "keys"):
            method.keys(table)
        refuse_trained(trained_keys(method, table, storage), method=f"over {quant}: {peft}")
    except ConfigError as error:
        return f"{family}: {str(error).splitlines()[-1].strip()}"
    return ""


@functools.cache
def packed(family: str, quant: str) -> Store:
    """The quantized weights of a family's blocks, which are the same under any head."""
    model = MODELS[family]()
    held = pack_store(registry.get("quant", quant)(), tiny.weights(model), model.table)
    return {k: v for k, v in held.items() if isinstance(v, Quantized)}


def head_kind(cell: Cell) -> str:
    """The head of a cell's model; empty where the family has none that the objective trains."""
    family = registry.get("family", cell.family)
    return next((kind for kind in registry.get("objective", cell.objective).heads if kind in family.heads), "")


def all_cells() -> list[Cell]:
    names = (registry.known(kind) for kind in ("objective", "peft", "family"))
    return [*itertools.starmap(Cell, itertools.product(*names)), *quantized_cells()]


def quantized_cells() -> list[Cell]:
    """Every objective with lora over the first family that it can train, and every method over the families of `QUANTIZED`."""
    families, cells = sorted(registry.known("family"), key=lambda f: f not in CHEAP), []
    for objective in registry.known("objective"):
        able = (c for f in families if not impossible(c := Cell(objective, "lora", f, "nf4")))
        cells += itertools.islice(able, 1)
    cells += [Cell(o, peft, family, "nf4") for family, o in QUANTIZED.items() for peft in registry.known("peft")]
    return list(dict.fromkeys(cells))


def covering(cells: list[Cell]) -> list[Cell]:
    """A small set in which every family occurs, every objective with `COMMON` methods, every method with `WIDE` batches.

    What a method meets of an objective is the model's inputs and its head, which the kind of batch decides. Greedily,
    small families first. Over a quantized base every method occurs, and every objective with lora.
    """
    chosen, seen = [], set()
    for c in sorted(cells, key=lambda c: c.family not in CHEAP):
        batch = registry.get("objective", c.objective).batch
        pairs = {(batch, c.peft) if batch in WIDE else c.objective, c.family}
        pairs |= {(c.objective, c.peft)} if c.peft in COMMON else set()
        if c.quant != "none":
            pairs = {(c.quant, c.peft)} | ({(c.quant, c.objective)} if c.peft == "lora" else set())
        if pairs - seen:
            chosen.append(c)
            seen |= pairs
    return chosen


def thorough(cells: list[Cell]) -> set[Cell]:
    """Those cells that are the first of their objective, method, family or storage: the others are only trained."""
    seen: set[tuple[str, str]] = set()
    chosen = set()
    for c in cells:
        new = {("objective", c.objective), ("peft", c.peft), ("family", c.family), ("quant", c.quant)} - seen
        seen |= new
        chosen |= {c} if new else set()
    return chosen


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = [c for c in all_cells() if not impossible(c)]
        full = metafunc.config.getoption("--matrix") == "full"
        chosen = cells if full else covering(cells)
        every = set(chosen) if full else thorough(chosen)
        chosen, every = [*chosen, *VARIED], every | {VARIED[0], VARIED[-1]}
        metafunc.parametrize("cell, whole", [(c, c in every) for c in chosen], ids=[str(c) for c in chosen])


def test_every_registered_family_has_a_tiny_model():
    assert set(registry.known("family")) == set(MODELS)


def test_cell(cell, whole, tmp_path):
    peft = method_of(cell.peft)
    objective = registry.get("objective", cell.objective)()
    labels = label_names(3) if head_kind(cell) not in VOCABULARY else ()
    model = MODELS[cell.family](head=objective.head(labels))
    base = tiny.weights(model) | (packed(cell.family, cell.quant) if cell.quant != "none" else {})
    t = tiny.tiny(peft, objective, model=model, base=base, optim=OPTIM)
    data = tiny.batch_for(objective, 16, micro=2)
    inputs = objective.inputs(jax.tree.map(lambda x: x[0], data))

    leaves = jax.tree.leaves(t.state)
    assert len({*map(id, leaves)}) == len(leaves)  # a run donates them: no array may stand in two places

    if peft.identity_at_init:
        apply = jax.jit(t.model.apply)  # compiled as runs are: the last bit depends on how sums are vectorized
        assert (apply(bind(t.base, t.overlay), inputs).logits == apply(t.base, inputs).logits).all()

    step = jax.jit(t.program.train, compiler_options=None if whole else QUICK)
    held = jax.tree.map(np.asarray, t.frozen)
    states = [t.state]
    for _ in range(3):
        states.append(step(states[-1], t.frozen, data)[0])
    assert step._cache_size() == 1
    for now, before in zip(jax.tree.leaves(t.frozen), jax.tree.leaves(held), strict=True):
        np.testing.assert_array_equal(np.asarray(now), before)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), states[-1].trainable, t.state.trainable)
    still = [k for k, v in tree.leaves_by_path(moved).items() if not v]
    assert set(still) <= set(STILL.get(cell.objective, ()))
    if not whole:
        return

    check_resume(t, step, states, data, tmp_path)
    check_devices(t, states[2], data)
    if peft.mergeable:
        check_merge(t, states[-1], inputs)


def check_resume(t, step, states, data, folder: Path):
    with Checkpoints(folder, message=pytest.fail) as checkpoints:
        checkpoints.save(1, states[1], extra={})
        checkpoints.wait()
        state = checkpoints.restore(t.state).state
    for _ in range(2):
        state = step(state, t.frozen, data)[0]
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(states[3].trainable), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def check_devices(t, want, data):
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, tensor=2), jax.devices())
    p = Placement(mesh, axes_of_store({"base": t.base, "overlay": t.overlay}, t.model.table))
    states, frozen = p.tree(t.state), p.tree(t.frozen)
    placed = jax.device_put(t.frozen, frozen), jax.device_put(data, p.batch(1))
    step = jax.jit(
        t.program.train,
        in_shardings=(states, frozen, p.batch(1)),
        out_shardings=(states, p.replicated),
        donate_argnums=0,
    )
    state = jax.device_put(jax.tree.map(jnp.copy, t.state), states)
    for _ in range(2):
        state, _ = step(state, *placed)
    assert tiny.largest(state.trainable, want.trainable) < 3e-4


def check_merge(t, state, inputs):
    store = whole(state, t.frozen.store, state.mutable)
    bound = bind(store["base"], store["overlay"])
    folded = merge(bound, t.model.table)
    assert set(folded) == {k for k, s in t.model.table.items() if s.kind != "site"}
    assert tiny.largest(t.model.apply(folded, inputs).logits, t.model.apply(bound, inputs).logits) < 2e-5
