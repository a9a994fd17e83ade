"""The state that a run evaluates and exports: its weights, or their average where one is kept (`ftjax.train.average`).

    seen = averaged(setup, state)                 # the same state where there is no average, or nothing in it yet
    print(described(setup, seen))

Running statistics followed the raw weights, so those of averaged weights are taken anew from training data, as SWA has it
(Izmailov et al. 2018, arXiv:1803.05407, section 3.2); not under ``compute.batch_norm=frozen``, where training saw them fixed.
"""

from __future__ import annotations

import dataclasses as dc

import jax

from ftjax.data.pipeline import eval_batches, permutation
from ftjax.errors import ConfigError
from ftjax.models.batchnorm import reestimate
from ftjax.peft.base import bind
from ftjax.train.average import swa_start
from ftjax.train.setup import Setup
from ftjax.train.state import State


def count(state: State) -> int:
    """How many values the average is of; 0 where there is none."""
    return int(state.average["count"]) if state.average else 0


def averaged(setup: Setup, state: State) -> State:
    """The state with the averaged weights in place of the raw ones, and running statistics that belong to them.

    It is to be looked at, not to be trained on: its weights are the very arrays of the average.
    """
    if not count(state):
        return state
    return with_statistics(setup, dc.replace(state, trainable=state.average["mean"]))


def with_statistics(setup: Setup, state: State) -> State:
    """The state with running statistics of its present weights, from `optim.average_batches` batches of training data.

    Batches are those of a micro-batch, of whole rows only; which examples, is the same every time.

    Raises:
      ConfigError: several tasks share the statistics.
    """
    run, view = setup.run, setup.views[0]
    if not state.mutable or run.compute.batch_norm == "frozen":
        return state
    if view.name:
        raise ConfigError(
            "running statistics of averaged weights would be those of one task: set compute.batch_norm=frozen"
        )
    examples = view.prepared.train
    rows = min(run.train.batch // run.train.accumulate, len(examples))
    some = permutation(len(examples), 0)[: rows * min(run.optim.average_batches, len(examples) // rows)]
    batches = (
        view.objective.inputs(jax.device_put(b, setup.placement.batch(0)))
        for b in eval_batches(examples.take(some), rows, view.length)
    )
    store = setup.store(state)
    known = reestimate(setup.model, bind(store["base"], store["overlay"]), batches)
    return dc.replace(state, mutable={k: known[k] for k in state.mutable})


def described(setup: Setup, state: State) -> str:
    """What is exported, in words; empty for a run without an average."""
    o, n = setup.run.optim, count(state)
    if not o.averaging:
        return ""
    if not n:
        return "No weights were averaged yet at this step: these are the raw ones."
    if o.averaging == "ema":
        return f"Averaged weights: the exponential moving average of {n:,} steps, optim.ema={o.ema:g}."
    since = swa_start(o, setup.run.train.steps)
    return (
        f"Averaged weights: the mean of {n:,} snapshots taken every {o.swa_every:,} steps after step {since:,} (SWA)."
    )
