"""Every PEFT method on one task: a story model learns plays, each with its own learning rate from a small grid.

    python -m experiments.e004_methods.sweep train --model DIR --text tinyshakespeare.txt   # results.csv; goes on where it was
    python -m experiments.e004_methods.sweep time --model DIR --text tinyshakespeare.txt    # cost.csv, on a quiet machine
    python -m experiments.e004_methods.sweep table                                          # table.md, learnt_forgotten.svg

The grid has three rates, a factor of 3 apart, and goes on outwards while an edge is best (twice at most). It is searched
with seed 0; the best rate is then run with the other seeds. A method compiles once; nothing is saved. ReFT edits every token,
since plain text has no prompts whose ends it could edit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.e004_methods.plot import scatter
from experiments.stories import stories, story_loss
from ftjax import configfile, tree
from ftjax.config import Run
from ftjax.regimes.fit import memory_of
from ftjax.train.session import Evaluator
from ftjax.train.setup import Setup, compile_train, prepare

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent.parent / "configs" / "adapt_text.py"
UNIPELT = 'peft.methods=[{"name":"lora"},{"name":"prefix"},{"name":"pfeiffer","reduction":4}]'
# Method -> (middle of the grid, overrides).
METHODS: dict[str, tuple[float, tuple[str, ...]]] = {
    "full": (2e-3, ("peft=full",)),
    "partial, last 2 layers": (4e-3, ("peft=partial", "peft.last=2")),
    "norms": (1e-2, ("peft=norms",)),
    "sparse": (1e-2, ("peft=sparse",)),
    "lora": (1e-2, ("peft=lora",)),
    "lora, rsLoRA": (1e-2, ("peft=lora", "peft.rslora=true")),
    "lora+ (B 4 times)": (5e-3, ("peft=lora", "optim.lora_plus=4")),
    "lora-fa": (2e-2, ("peft=lora", "peft.train_a=false")),
    "lora, PiSSA": (5e-3, ("peft=lora", "peft.start=pissa")),
    "lora, OLoRA": (5e-3, ("peft=lora", "peft.start=olora")),
    "lora over nf4": (1e-2, ("peft=lora", "model.quantize=nf4")),
    "dora": (1e-2, ("peft=dora",)),
    "adalora": (1e-2, ("peft=adalora", "peft.hold=20", "peft.settle=40", "peft.every=5")),
    "vera": (3e-2, ("peft=vera",)),
    "loha": (1e-2, ("peft=loha",)),
    "lokr": (1e-2, ("peft=lokr",)),
    "oft": (5e-3, ("peft=oft", "peft.block_size=4")),
    "ia3": (5e-2, ("peft=ia3",)),
    "prompt": (1e-1, ("peft=prompt",)),
    "p_tuning": (1e-2, ("peft=p_tuning",)),
    "prefix": (5e-2, ("peft=prefix",)),
    "houlsby": (1e-2, ("peft=houlsby", "peft.reduction=4")),
    "pfeiffer": (1e-2, ("peft=pfeiffer", "peft.reduction=4")),
    "parallel": (1e-2, ("peft=parallel", "peft.reduction=4")),
    "compacter": (1e-2, ("peft=compacter", "peft.reduction=4")),
    "loreft": (1e-2, ("peft=loreft", "peft.rank=8", "peft.positions=all")),
    "noreft": (1e-2, ("peft=noreft", "peft.rank=8", "peft.positions=all")),
    "direft": (1e-2, ("peft=direft", "peft.rank=8", "peft.positions=all")),
    "lora, prefix and pfeiffer (UniPELT)": (1e-2, ("peft=combine", "peft.gates=true", UNIPELT)),
    "prefix and parallel (MAM)": (1e-2, ("peft=combine", 'peft.methods=[{"name":"prefix"},{"name":"parallel","reduction":4}]')),
}  # fmt: skip
FACTOR, EXTEND = 3.0, 2
COLUMNS = ("method", "lr", "seed", "text_before", "text_after", "story_before", "story_after", "trained", "all")


def run_of(args: argparse.Namespace, method: str, *, lr: float, seed: int = 0) -> Run:
    """The config of a trial."""
    settings = [
        f"model.path={args.model}", f"data.path={args.text}", "loader.max_length=128", f"train.steps={args.steps}",
        "train.batch=8", "evaluate.examples=128", f"optim.lr={lr:g}", f"seed={seed}",
    ]  # fmt: skip
    return configfile.load(CONFIG, [*settings, *METHODS[method][1]])


class Trials:
    """Trials of one method, which share their programs."""

    def __init__(self, args: argparse.Namespace, method: str, rows: jax.Array):
        self.args, self.method, self.rows = args, method, rows
        self.step: Any = None
        self.held: dict[str, Any] = {}  # filled by the first evaluator

    def __call__(self, lr: float, seed: int) -> dict[str, Any]:
        """Trains once."""
        setup = prepare(run_of(self.args, self.method, lr=lr, seed=seed), say=lambda _: None)
        self.step = self.step or compile_train(setup)
        evaluator = Evaluator(setup, contextlib.nullcontext, self.held)
        before, old = (
            evaluator.held_out(setup.state)["loss"],
            story_loss(setup.model, evaluator.policy(setup.state), self.rows),
        )
        state = setup.state
        for batch in itertools.islice(setup.batches, self.args.steps):
            state, _ = self.step(state, setup.frozen, batch)
        setup.batches.close()
        after, new = evaluator.held_out(state)["loss"], story_loss(setup.model, evaluator.policy(state), self.rows)
        own = tree.count(setup.parts.trainable)
        base = sum(int(np.prod(s.shape)) for s in setup.model.table.values() if s.kind != "site")
        numbers = (self.method, lr, seed, before, after, old, new, own, base)
        return dict(zip(COLUMNS, numbers, strict=True))


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a table written by `append`, numbers as numbers."""
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return [{k: v if k == "method" else float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, with a header before the first."""
    first = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.writer(f)
        if first:
            writer.writerow(row)
        writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in row.values()])


def best(rows: list[dict[str, Any]]) -> float:
    """The rate with the lowest loss of seed 0; diverged trials do not count."""
    return min((r for r in rows if r["seed"] == 0 and np.isfinite(r["text_after"])), key=lambda r: r["text_after"])[
        "lr"
    ]


def wanted(rows: list[dict[str, Any]], middle: float, seeds: int) -> Iterator[tuple[float, int]]:
    """Trials of a method that are still to be run; `rows` grows meanwhile."""
    grid = [middle / FACTOR, middle, middle * FACTOR]
    for _ in range(EXTEND + 1):
        done = [r["lr"] for r in rows if r["seed"] == 0]
        yield from ((lr, 0) for lr in grid if not any(np.isclose(lr, x, rtol=1e-3) for x in done))
        at = int(np.argmin([abs(lr - best(rows)) for lr in grid]))
        if 0 < at < len(grid) - 1:
            break
        grid = [grid[0] / FACTOR, *grid] if at == 0 else [*grid, grid[-1] * FACTOR]
    done = {r["seed"] for r in rows if np.isclose(r["lr"], best(rows), rtol=1e-3)}
    yield from ((best(rows), seed) for seed in range(seeds) if seed not in done)


def train(args: argparse.Namespace) -> None:
    """Fills results.csv."""
    path, texts = HERE / "results.csv", stories(args.model, 32)
    for method, (middle, _) in METHODS.items():
        rows = [r for r in read(path) if r["method"] == method]
        trials = Trials(args, method, texts)
        for lr, seed in wanted(rows, middle, args.seeds):
            found = trials(lr, seed)
            append(path, found)
            rows.append(found)
            print(*(f"{x:.5g}" if isinstance(x, float) else x for x in found.values()), flush=True)
        jax.clear_caches()


def cost(args: argparse.Namespace) -> None:
    """Fills cost.csv: milliseconds a step, all methods taking turns, and bytes of one step by the compiler's account."""
    made: dict[str, tuple[Setup, Any, Any]] = {}
    for method, (middle, _) in METHODS.items():
        setup = prepare(run_of(args, method, lr=middle), say=lambda _: None)
        made[method] = setup, compile_train(setup), next(iter(setup.batches))
    memory = {m: memory_of(s, step).total for m, (s, step, _) in made.items()}
    states = {m: jax.tree.map(jnp.copy, s.state) for m, (s, _, _) in made.items()}
    times: dict[str, list[float]] = {m: [] for m in made}
    for turn in range(args.turns):
        for method, (setup, step, batch) in made.items():
            start = time.perf_counter()
            for _ in range(5):
                states[method], _ = step(states[method], setup.frozen, batch)
            jax.block_until_ready(states[method])
            if turn:
                times[method].append((time.perf_counter() - start) / 5)
    path = HERE / "cost.csv"
    path.unlink(missing_ok=True)
    for method in made:
        mine, full = np.array(times[method]), np.array(times["full"])
        numbers = {"step_ms": 1e3 * float(mine.min()), "of_full": float(np.median(mine / full))}
        append(path, {"method": method, **numbers, "mib": memory[method] / 2**20})
        made[method][0].batches.close()


def table(_: argparse.Namespace) -> None:
    """Writes table.md and the plot."""
    rows, costs = read(HERE / "results.csv"), {r["method"]: r for r in read(HERE / "cost.csv")}
    lines = [
        "| method | rate | play loss | story loss | trained | share % | step / full | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    points = []
    by_method = {m: [r for r in rows if r["method"] == m] for m in METHODS}
    chosen = {m: [r for r in rs if np.isclose(r["lr"], best(rs), rtol=1e-3)] for m, rs in by_method.items() if rs}
    for method, mine in sorted(chosen.items(), key=lambda item: np.mean([r["text_after"] for r in item[1]])):
        play, story = (np.array([r[k] for r in mine]) for k in ("text_after", "story_after"))
        spread = [f"{x.mean():.3f} ± {x.std(ddof=1) if len(x) > 1 else 0:.3f}" for x in (play, story)]
        r, c = mine[0], costs.get(method)
        paid = f"{c['of_full']:.2f} | {c['mib']:.1f}" if c else "| "
        lines.append(
            f"| {method} | {r['lr']:.2g} | {spread[0]} | {spread[1]} | {r['trained']:,.0f} "
            f"| {100 * r['trained'] / r['all']:.2f} | {paid} |"
        )
        points.append((method, float(play.mean()), float(story.mean())))
    first = rows[0]
    lines.append(f"\nBefore: play loss {first['text_before']:.3f}, story loss {first['story_before']:.3f}.")
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (HERE / "learnt_forgotten.svg").write_text(scatter(points, "play loss", "story loss"), encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "time", "table"))
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    {"train": train, "time": cost, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
