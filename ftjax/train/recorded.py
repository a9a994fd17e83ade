"""What a teacher says of every example, asked once before training and kept in the cache of the data.

    setup = known(prepare(run, say=say), say=say)      # a run with objective.top_k=64 or objective.cached=True

The step then runs no teacher and no device holds its weights: they are read into the host's memory, their hash is part of the
entry's key, and only on a miss are they placed on the devices, for one pass. An entry is found again by the same weights,
examples, tokenizer, lengths, numerics and code alone. Arrays are float32 and int32, as the entry has them, so that a run from
the cache is the run that wrote it, bit by bit.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ftjax.data.cache import Cache
from ftjax.data.layouts import identity
from ftjax.data.packing import plan_rows
from ftjax.data.prepare import Prepared
from ftjax.data.recorded import awaiting, plain, recorded, spots
from ftjax.data.together import loader_for
from ftjax.errors import ConfigError
from ftjax.parallel.mesh import Placement, axes_of_store
from ftjax.peft.base import bind
from ftjax.train.reference import digest, program_hash

if TYPE_CHECKING:
    from ftjax.config import Run
    from ftjax.train.setup import Setup

SPLITS = ("train", "eval")
Arrays = dict[str, dict[str, np.ndarray]]


def wanted(run: Run) -> bool:
    """Whether a run's objective reads the teacher's words from its batches."""
    return getattr(run.objective, "records", False)


def awaited(run: Run, data: Prepared) -> Prepared:
    """The data with places for what the teacher will say; as they are where nobody will ask."""
    if not wanted(run):
        return data
    width = getattr(run.objective, "top_k", 0) or len(data.labels)
    return _with(data, {s: awaiting(getattr(data, s), width) for s in SPLITS})


def where(run: Run) -> contextlib.AbstractContextManager[Any]:
    """Where a teacher is loaded: in the host's memory if it is only asked once."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0]) if wanted(run) else contextlib.nullcontext()
    except RuntimeError:  # JAX_PLATFORMS names no processor
        return contextlib.nullcontext()


def apart(run: Run, student: Any, teacher: Any, weights: Any) -> tuple[tuple[Any, Any], tuple[Any, Any] | None]:
    """The teacher for the step, and the one to be asked before it; of a pair, each (model, weights).

    Raises:
      ConfigError: it has fewer tokens than are wanted.
    """
    if not wanted(run):
        return (teacher, weights), None
    k = getattr(run.objective, "top_k", 0)
    if k > student.config.vocab_size:  # the teacher's is the same
        raise ConfigError(f"objective.top_k={k}: the vocabulary has {student.config.vocab_size:,} tokens")
    return (None, None), (teacher, weights)


def known(setup: Setup, *, say: Callable[[str], None]) -> Setup:
    """The run with the teacher's words on all examples, from the cache or asked for; other runs as they are.

    Args:
      setup: before the first step.
      say: told what was found or done.
    """
    if not wanted(setup.run) or setup.asked is None:
        return setup
    from ftjax.train.setup import batches_of  # it needs this module in turn

    cache = Cache(f"teacher-{setup.run.data.name}", parts_of(setup)) if jax.process_count() == 1 else None
    entry = cache.load() if cache else None
    found = _nested(entry.arrays) if entry else answers(setup)
    if cache and not entry:
        cache.store({f"{s}.{k}": v for s, part in found.items() for k, v in part.items()}, {})
    say(f"{_described(setup, found)}; cache: {cache.status if cache else 'off, there are several hosts'}")
    data = _with(setup.data, found)
    setup.batches.close()
    return dc.replace(setup, data=data, batches=batches_of(setup.run, data), asked=None)


def answers(setup: Setup) -> Arrays:
    """What the teacher says of all examples, by split and name: arrays as `ftjax.data.recorded` has them."""
    assert setup.asked is not None
    model, weights = setup.asked
    placement = Placement(setup.placement.mesh, axes_of_store({"teacher": weights}, model.table))
    shardings = placement.tree({"teacher": weights})
    objective = setup.run.objective

    def one(held: Any, batch: Any) -> dict[str, jax.Array]:
        return objective.record(model.apply(bind(held["teacher"], {}), objective.inputs(batch)))

    step = jax.jit(one, in_shardings=(shardings, placement.batch(0)), out_shardings=placement.replicated)
    held = jax.device_put({"teacher": weights}, shardings)
    ask = lambda batch: jax.device_get(step(held, jax.device_put(batch, placement.batch(0))))  # noqa: E731
    return {s: _read(plain(getattr(setup.data, s)), setup, ask) for s in SPLITS}


def _read(examples: Any, setup: Setup, ask: Callable[[Any], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The teacher's words on some examples, in their order whatever rows they were read in."""
    count, length = setup.run.train.batch // setup.run.train.accumulate, setup.batches.length
    rows = plan_rows(examples.lengths, length, _packing(setup)).fill(np.arange(len(examples)))
    kind = recorded(examples, awaiting(examples, 1))  # its fields say which arrays go with tokens
    found: dict[str, np.ndarray] = {}
    for start in range(0, max(len(rows), 1), count):  # once at least: of no examples the shapes are wanted
        part = [r.tolist() for r in rows[start : start + count]]
        said = ask(examples.build(part, length, count=count))
        for name, value in said.items():
            by_token = name in kind.per_token
            if name not in found:
                size = len(examples.input_ids) if by_token else len(examples)
                found[name] = np.zeros((size, *value.shape[1 + by_token :]), value.dtype)
            for r, i, at in spots(part, examples.lengths):
                if by_token:
                    found[name][examples.part(i)] = value[r, at]
                else:
                    found[name][i] = value[r]
    return found


def parts_of(setup: Setup) -> dict[str, Any]:
    """Everything that decides the answers, as JSON-like data."""
    assert setup.asked is not None
    model, weights = setup.asked
    return {
        "teacher": digest(weights),
        "model": repr(model),
        "objective": {"name": setup.run.objective.name, "top_k": getattr(setup.run.objective, "top_k", 0)},
        "data": {k: v for k, v in setup.data.fingerprint.items() if k != "seed"},
        "eval": identity(plain(setup.data.eval)),
        "length": setup.batches.length,
        "packing": _packing(setup),
        "program": program_hash(),
    }


def _packing(setup: Setup) -> Any:
    return loader_for(setup.run.loader, setup.run.objective).packing


def _described(setup: Setup, found: Arrays) -> str:
    size = sum(v.nbytes for part in found.values() for v in part.values())
    k = getattr(setup.run.objective, "top_k", 0)
    if not k:
        count = sum(len(v) for part in found.values() for v in part.values())
        return f"the teacher's logits of {count:,} texts ({size / max(count, 1):.0f} bytes a text, {size / 1e6:.1f} MB)"
    count = sum(len(part["top_ids"]) for part in found.values())
    each = size / max(count, 1)
    return f"the teacher's {k} likeliest at each of {count:,} tokens ({each:.0f} bytes a token, {size / 1e6:.1f} MB)"


def _nested(arrays: dict[str, np.ndarray]) -> Arrays:
    found: Arrays = {s: {} for s in SPLITS}
    for name, value in arrays.items():
        split, _, rest = name.partition(".")
        found[split][rest] = value
    return found


def _with(data: Prepared, found: Arrays) -> Prepared:
    return dc.replace(data, **{s: recorded(getattr(data, s), found[s]) for s in SPLITS})
