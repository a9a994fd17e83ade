"""Soups: one model of the weights of several runs (Wortsman et al. 2022, arXiv:2203.05482, section 2 and recipe 1).

theta = 1/k sum_i theta_i   over all runs (uniform), or over those that do not raise the held-out loss (greedy)

    python run.py soup --runs runs/a runs/b runs/c --how greedy --out soups/abc

Of LoRAs the mean of the updates A B is not the update of the mean A and mean B. `--lora cat` (default) is the first, exactly,
at the sum of the ranks; `svd` the nearest update of the members' own rank; `factors` the second. Merged, cat equals the mean
of the merged models. Of every other method the trained numbers themselves are averaged.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import Run
from ftjax.configfile import load
from ftjax.errors import ConfigError
from ftjax.peft.adapters import is_lora, load_adapters
from ftjax.peft.interop import AdapterFile
from ftjax.peft.lora import LoRADelta
from ftjax.peft.merges import merge_adapters
from ftjax.regimes.fit import card_of, restored_state
from ftjax.report.console import Console
from ftjax.report.grid import Grid, plain
from ftjax.report.units import number
from ftjax.train.averaged import averaged, with_statistics
from ftjax.train.metrics import read_lines
from ftjax.train.runfolder import RunFolder
from ftjax.train.session import Evaluator, export
from ftjax.train.setup import Setup, assemble, prepare
from ftjax.train.state import State
from ftjax.tree import path_of

FREE = {"alpha", "alphas", "rslora", "dropout"}
"""Settings of a method that may differ among members: they decide no shape."""


@dc.dataclass(frozen=True)
class Member:
    """A run's weights as it exports them."""

    folder: Path
    run: Run
    state: State
    step: int


@dc.dataclass(frozen=True)
class Choice:
    """What became of a member: its own loss, the loss of the soup with it (nan: not tried), whether it stayed."""

    member: int
    alone: float
    together: float
    kept: bool


def soup(runs: Sequence[Path], to: Path, *, how: str, lora: str) -> int:
    """Makes a soup of runs, prints its members, and writes what a run would; returns the exit code.

    Args:
      runs: their folders; held-out data are those of the first.
      to: a new folder; "adapter" or "model" is written in it.
      how: "uniform" or "greedy".
      lora: see `Mixer`.
    """
    console = Console()
    setup, members = gather(runs, console)
    mixer = Mixer(setup, members, lora)
    evaluator = Evaluator(mixer.setup, console.compiling)
    found: dict[tuple[int, ...], dict[str, float]] = {}

    def loss_of(chosen: Sequence[int]) -> float:
        key = tuple(sorted(chosen))
        if key not in found:
            found[key] = evaluator.held_out(mixer.weighed(key))
        return found[key].get("loss", math.nan)

    choices = {"uniform": uniform, "greedy": greedy}[how](len(members), loss_of)
    kept = [c.member for c in choices if c.kept]
    loss_of(kept)
    console.note("\n".join(plain(table_of(choices, members, how))))
    names = ", ".join(str(members[i].folder) for i in kept)
    notes = f"A soup ({how}) of {len(kept)} of {len(members)} runs: {names}. {mixer.means}"
    console.note(notes)
    own, state = mixer.exported(kept)
    before = next((r for r in read_lines(RunFolder(runs[0]).metrics) if r["event"] == "eval" and not r["step"]), {})
    after = found[tuple(sorted(kept))]
    step = max(members[i].step for i in kept)
    card = card_of(own, step, before, after, adapter=own.adapted, notes=notes)
    console.where({"soup": export(own, state, to, card=card)})
    return 0


# Members ---------------------------------------------------------------------------------------------------------------


def gather(folders: Sequence[Path], console: Console) -> tuple[Setup, list[Member]]:
    """The first run's setup and all runs' weights; the base is loaded once.

    Raises:
      ConfigError: a run has another base, method or shape than the first.
    """
    runs = [load(folder / "config.json", [f"out={folder}"]) for folder in folders]
    problems = [
        line for f, run in zip(folders[1:], runs[1:], strict=True) for line in unlike(folders[0], runs[0], f, run)
    ]
    if problems:
        raise ConfigError("a soup is of runs of one base, method and shape", problems)
    setup = prepare(runs[0], say=console.note)
    if jax.tree.leaves(setup.frozen.store["overlay"]) and len({r.seed for r in runs}) > 1:
        raise ConfigError(f"peft={runs[0].peft.name} draws numbers that stay from the seed, and the runs' seeds differ")
    members = []
    for folder, run in zip(folders, runs, strict=True):
        run = run.model_copy(update={"objective": setup.run.objective})
        _, state, _ = assemble(run, setup.model, setup.parts)
        own = dc.replace(setup, run=run, state=jax.device_put(state, setup.placement.tree(state)))
        state, step = restored_state(own, RunFolder(folder, message=console.note), console.warn)
        members.append(Member(folder, run, averaged(own, state), step))
    return setup, members


def unlike(first: Path, one: Run, folder: Path, other: Run) -> list[str]:
    """Why two runs make no soup, line by line."""
    if one.model != other.model:
        return [f"{folder}  began from {_base(other)}, but {first} from {_base(one)}: another base"]
    if not one.model.label and one.seed != other.seed:
        return [
            f"{folder}  began from the random weights of seed {other.seed}, but {first} of seed {one.seed}: another base"
        ]
    if one.objective.name != other.objective.name:
        return [f"{folder}  objective={other.objective.name}, but {first} has {one.objective.name}"]
    if one.peft.name != other.peft.name:
        return [f"{folder}  peft={other.peft.name}, but {first} has {one.peft.name}"]
    a, b = one.peft.model_dump(), other.peft.model_dump()
    differ = [k for k in a if k not in FREE and a[k] != b[k]]
    if bool(a.get("dropout")) != bool(b.get("dropout")):
        differ.append("dropout")
    return [f"{folder}  peft.{k}={b[k]}, but {first} has {a[k]}" for k in differ]


def _base(run: Run) -> str:
    words = [f"{k}={v}" for k, v in run.model.model_dump(exclude={"name"}, exclude_defaults=True).items()]
    return f"{run.model.name} {' '.join(words)}".rstrip()


# Mixing ----------------------------------------------------------------------------------------------------------------


class Mixer:
    """Means of the members' weights; `setup` is that of the soups, whose shapes are the same whoever is in them.

    Args:
      setup: of the first run.
      members: at least one.
      lora: "cat", "svd" or "factors"; of use for LoRAs of matrices only.

    Raises:
      ConfigError: numbers that are averaged by their means differ in what is not trained.
    """

    def __init__(self, setup: Setup, members: Sequence[Member], lora: str):
        self.members, self.lora = members, lora
        overlays = [setup.store(m.state)["overlay"] for m in members]
        self.products = lora != "factors" and all(o and is_lora(o) for o in overlays)
        if self.products:
            files = {
                str(i): AdapterFile(m.run.peft, o, m.run.model.label)
                for i, (m, o) in enumerate(zip(members, overlays, strict=True))
            }
            self.adapters = load_adapters(setup.model, setup.store(setup.state)["base"], files)
        else:
            self._same_constants()
        self._first = setup
        self.setup = dc.replace(setup, state=self.weighed(range(len(members))))

    @property
    def means(self) -> str:
        """What was averaged, in words."""
        if not self.products:
            return "The mean of the trained numbers."
        exact = "exactly, at the sum of the ranks" if self.lora == "cat" else "as near as the rank allows"
        return f"The mean of the updates A B, {exact}."

    def weighed(self, chosen: Sequence[int]) -> State:
        """The mean of some members, of the same shapes whichever they are: the others have the weight 0."""
        return self._state([1 / len(chosen) if i in chosen else 0.0 for i in range(len(self.members))])[1]

    def exported(self, chosen: Sequence[int]) -> tuple[Setup, State]:
        """The mean of some members, and the setup that writes it."""
        method, state = self._state([1 / len(chosen) if i in chosen else None for i in range(len(self.members))])
        run = self._first.run.model_copy(update={"peft": method})
        return dc.replace(self.setup, run=run, state=state), state

    def _state(self, weights: Sequence[float | None]) -> tuple[Any, State]:
        """(method, state) of the mean by weight; a member whose weight is None is not looked at."""
        used = [(m, w) for m, w in zip(self.members, weights, strict=True) if w is not None]
        trees = [m.state.trainable for m, _ in used]
        state = dc.replace(self._first.state, trainable=mean(trees, [w for _, w in used]))
        method = self._first.run.peft
        if self.products:
            file = merge_adapters(self.adapters, {str(i): w for i, w in enumerate(weights) if w is not None}, self.lora)
            method, state = file.method, _with_loras(state, file.overlay)
        state = jax.device_put(state, self._first.placement.tree(state))
        return method, with_statistics(self._first, state)

    def _same_constants(self) -> None:
        first = self.members[0]
        for other in self.members[1:]:
            pairs = jax.tree_util.tree_flatten_with_path(first.state.const)[0]
            for (path, x), y in zip(pairs, jax.tree.leaves(other.state.const), strict=True):
                name = path_of(path)
                if not name.endswith("/rate") and not np.array_equal(np.asarray(x), np.asarray(y)):
                    raise ConfigError(
                        f"{other.folder}: {name} is not trained and differs from that of {first.folder} (another alpha or "
                        "seed), so that a mean of the trained numbers has no meaning"
                    )


def mean(trees: Sequence[Any], weights: Sequence[float]) -> Any:
    """The sum of trees of float32 arrays by weight; where a weight is 0 also what is not finite counts as nothing."""

    def one(*arrays: jax.Array) -> jax.Array:
        parts = [jnp.float32(w) * x for w, x in zip(weights, arrays, strict=True) if w]
        return sum(parts[1:], start=parts[0])

    return jax.tree.map(one, *trees)


def _with_loras(state: State, overlay: dict[str, Any]) -> State:
    trainable = {**state.trainable, "overlay": {k: dc.replace(d, scale=None) for k, d in overlay.items()}}
    nothing: Any = None
    const = {**state.const, "overlay": {k: LoRADelta(nothing, nothing, d.scale) for k, d in overlay.items()}}
    return dc.replace(state, trainable=trainable, const=const)


# Choosing --------------------------------------------------------------------------------------------------------------


def uniform(n: int, loss_of: Callable[[Sequence[int]], float]) -> list[Choice]:
    """Everyone."""
    together = loss_of(range(n))
    return [Choice(i, loss_of([i]), together, True) for i in range(n)]


def greedy(n: int, loss_of: Callable[[Sequence[int]], float]) -> list[Choice]:
    """The best member, then each in order of its own loss that does not raise the loss of the soup so far.

    Raises:
      ConfigError: there is nothing to measure by.
    """
    alone = [loss_of([i]) for i in range(n)]
    if all(math.isnan(x) for x in alone):
        raise ConfigError("a greedy soup is chosen by the held-out loss, and the first run has no held-out examples")
    order = sorted(range(n), key=lambda i: (not math.isfinite(alone[i]), alone[i], i))
    kept, best, choices = [order[0]], alone[order[0]], [Choice(order[0], alone[order[0]], alone[order[0]], True)]
    for i in order[1:]:
        together = loss_of([*kept, i])
        stays = together <= best  # not so for nan
        if stays:
            kept, best = [*kept, i], together
        choices.append(Choice(i, alone[i], together, stays))
    return choices


def table_of(choices: Sequence[Choice], members: Sequence[Member], how: str) -> Grid:
    """Members with their own loss, that of the soup with them, and whether they stayed."""
    rows = tuple(
        (str(members[c.member].folder), number(c.alone), number(c.together), "yes" if c.kept else "no") for c in choices
    )
    return Grid(f"{how} soup", ("member", "held-out loss", "soup with it", "kept"), rows, words=frozenset({0, 3}))
