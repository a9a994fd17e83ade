"""What the reference says of every example, computed once before training and kept in the cache of the data.

log ref(y | x) for both answers of each pair, under the policy as it is before the first step

    setup = known(prepare(run, say=say), say=say)        # a run with objective.precompute=True, ready to train

The step is then smaller by a forward pass, and full fine-tuning holds no second copy of the weights. An entry of the cache is
found again only by the same weights (their bytes, adapter included), examples, tokenizer, loader, numerics and code.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ftjax.data.cache import Cache
from ftjax.data.layouts import identity
from ftjax.data.pipeline import eval_batches
from ftjax.data.prepare import Prepared
from ftjax.objectives.preference import answers, pair_inputs
from ftjax.tree import leaves_by_path

if TYPE_CHECKING:
    from ftjax.config import Run
    from ftjax.train.setup import Setup

SPLITS = ("train", "eval")


def wanted(run: Run) -> bool:
    """Whether a run's objective reads the reference's log-probabilities from its batches."""
    return getattr(run.objective, "precompute", False)


def awaited(data: Prepared) -> Prepared:
    """The data with places for the reference's numbers. They are NaN: forgotten, they would stop the run at its first step."""
    return _with(data, {s: np.full((len(getattr(data, s)), 2), np.nan, np.float32) for s in SPLITS})


def known(setup: Setup, *, say: Callable[[str], None]) -> Setup:
    """The run with the reference's log-probabilities of all examples, from the cache or computed; other runs as they are.

    Args:
      setup: before the first step.
      say: told what was found or done.
    """
    if not wanted(setup.run):
        return setup
    from ftjax.train.setup import batches_of  # it needs this module in turn

    cache = Cache(f"reference-{setup.run.data.name}", parts_of(setup)) if jax.process_count() == 1 else None
    entry = cache.load() if cache else None
    found = entry.arrays if entry else {s: log_p(setup, getattr(setup.data, s)) for s in SPLITS}
    if cache and not entry:
        cache.store(found, {})
    status = cache.status if cache else "off, there are several hosts"
    say(f"the reference's log-probabilities of {sum(map(len, found.values())):,} examples; cache: {status}")
    data = _with(setup.data, found)
    setup.batches.close()
    return dc.replace(setup, data=data, batches=batches_of(setup.run, data))


def log_p(setup: Setup, examples: Any) -> np.ndarray:
    """log ref of both answers of every example, float32 [examples, 2]."""
    program, p = setup.program, setup.placement
    rows = setup.run.train.batch // setup.run.train.accumulate

    def one(state: Any, frozen: Any, batch: Any) -> jax.Array:
        bound = program.params(state.trainable, state, frozen, None) | state.mutable
        return program.objective.log_p(answers(program.model.apply(bound, pair_inputs(batch)), batch))

    places = (p.tree(setup.state), p.tree(setup.frozen), p.batch(0))
    step = jax.jit(one, in_shardings=places, out_shardings=p.replicated)
    plain = dc.replace(examples, reference=None)
    out = [
        jax.device_get(step(setup.state, setup.frozen, jax.device_put(batch, p.batch(0))))
        for batch in eval_batches(plain, rows, setup.batches.length)
    ]
    return np.concatenate([np.zeros((0, 2), np.float32), *out])[: len(examples)]


def parts_of(setup: Setup) -> dict[str, Any]:
    """Everything that decides the numbers, as JSON-like data."""
    model, state = setup.model, setup.state
    return {
        "weights": digest((setup.frozen.store, state.trainable, state.const, state.mutable)),
        "model": f"{model.family} {model.config} {model.numerics}",
        "objective": {"name": setup.run.objective.name, "ld_alpha": getattr(setup.run.objective, "ld_alpha", None)},
        "data": {k: v for k, v in setup.data.fingerprint.items() if k != "seed"},
        "eval": identity(dc.replace(setup.data.eval, reference=None)),
        "length": setup.batches.length,
        "program": program_hash(),
    }


def digest(tree: Any) -> str:
    """A hash of every array of a tree with its path, dtype and shape; one array at a time is on the host."""
    found = hashlib.sha256()
    for path, leaf in leaves_by_path(tree).items():
        value = np.ascontiguousarray(jax.device_get(leaf))
        found.update(f"{path} {value.dtype} {value.shape}".encode())
        found.update(value.reshape(-1).view(np.uint8))
    return found.hexdigest()


@functools.cache
def program_hash() -> str:
    """A hash of the package's sources and of jax's version."""
    found = hashlib.sha256(jax.__version__.encode())
    folder = Path(__file__).parent.parent
    for path in sorted(folder.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _with(data: Prepared, found: dict[str, np.ndarray]) -> Prepared:
    return dc.replace(data, **{s: dc.replace(getattr(data, s), reference=found[s]) for s in SPLITS})
