"""Four tasks in one model against four models of one task each: what is gained or lost by training them together.

    python -m experiments.e006_multi_task.run --data DIR
    python -m experiments.e006_multi_task.run --data DIR --ways together pcgrad --seeds 3
    python -m experiments.e006_multi_task.run --table

`--data` holds banking77/{train,test}.csv, instruct/{instructions,preferences}.json and gsm8k/{train,test}.jsonl, the data of
configs/multi_task.py. A model alone sees in every step the rows of its task that the model of all tasks sees in that step,
at the same rate: a pair of runs of one seed differs in nothing but the other tasks. A way compiles once.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ftjax import configfile
from ftjax.config import Run
from ftjax.train.session import Evaluator
from ftjax.train.setup import compile_train, prepare

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "multi_task.py"
RESULTS = HERE / "results.csv"
PATHS = ("banking77", "instruct/instructions.json", "instruct/preferences.json", "gsm8k")
MEASURES = {
    "intents": ("accuracy", "loss"),
    "instructions": ("loss",),
    "preferences": ("accuracy", "loss"),
    "maths": ("loss",),
}
"""What is reported of each task, held out."""
TOGETHER = ("together", "uncertainty", "pcgrad", "gradnorm")
COLUMNS = ("way", "lr", "steps", "seed", "task", "measure", "value")


def config_of(data: Path, way: str, *, lr: float, steps: int, seed: int) -> Run:
    """The run of a way: all tasks with a weighting, or ("alone:TASK") one of them over a batch of its rows."""
    paths = [f"objective.tasks.{i}.data.path={data / p}" for i, p in enumerate(PATHS)]
    run = configfile.load(CONFIG, [*paths, f"optim.lr={lr:g}", f"train.steps={steps}", f"seed={seed}"])
    kind, _, name = way.partition(":")
    if kind in TOGETHER[1:]:
        return configfile.override(run, [f"objective.weighting={kind}"])
    if kind == "alone":
        each = run.train.batch // len(PATHS)
        rows = json.loads(configfile.dump(run))["objective"]["tasks"]
        one = json.dumps([row for row in rows if row["name"] == name])
        return configfile.override(run, [f"objective.tasks={one}", f"train.batch={each}"])
    return run


def train(data: Path, way: str, *, lr: float, steps: int, seeds: range) -> list[dict[str, Any]]:
    """Every measure of a way, before training (step 0) and after it, for every seed."""
    rows: list[dict[str, Any]] = []
    step: Any = None
    known: dict[str, Any] = {}
    for seed in seeds:
        setup = prepare(config_of(data, way, lr=lr, steps=steps, seed=seed), say=lambda _: None)
        step = step or compile_train(setup)
        evaluator = Evaluator(setup, compiling=lambda _: contextlib.nullcontext(), _steps=known)
        state, found = setup.state, {0: evaluator.held_out(setup.state)}
        for batch in itertools.islice(setup.batches, steps):
            state, _ = step(state, setup.frozen, batch)
        setup.batches.close()
        found[steps] = evaluator.held_out(state)
        about = {"way": way, "lr": lr, "seed": seed}
        tasks = [t.name for t in setup.run.objective.tasks]
        rows += [
            {**about, "steps": n, "task": t, "measure": m, "value": values[f"{t}/{m}"]}
            for n, values in found.items()
            for t in tasks
            for m in MEASURES[t]
        ]
        print(way, f"lr {lr:g} seed {seed}", {k: round(v, 4) for k, v in found[steps].items() if k.count("loss")},
              f"{time.process_time():.0f} s", flush=True)  # fmt: skip
    return rows


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean and half of its 95 % confidence interval, by Student's t over the seeds; NaN for one seed."""
    n = len(differences)
    half = stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(differences.mean()), float(half)


def rates(rows: list[dict[str, str]]) -> dict[str, str]:
    """The rate of every way, by the sum of its held-out losses with seed 0."""
    sums: dict[str, dict[str, float]] = {}
    for r in rows:
        if r["seed"] == "0" and r["steps"] != "0" and r["measure"] == "loss":
            found = sums.setdefault(r["way"], {})
            found[r["lr"]] = found.get(r["lr"], 0.0) + float(r["value"])
    return {way: min(found, key=found.__getitem__) for way, found in sums.items()}


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds at each way's best rate; of the ways together also the difference from alone, by pairs."""
    chosen = rates(rows)
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in rows:
        if r["lr"] == chosen.get(r["way"]):
            way = "before" if r["steps"] == "0" else r["way"].partition(":")[0]
            values.setdefault((way, r["task"], r["measure"]), {})[r["seed"]] = float(r["value"])
    ways = [w for w in ("before", "alone", *TOGETHER) if any(k[0] == w for k in values)]
    lines = [f"| | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for task, measure in ((t, m) for t, measures in MEASURES.items() for m in measures):
        alone, cells = values.get(("alone", task, measure), {}), []
        for way in ways:
            each = values.get((way, task, measure), {})
            cell = f"{np.mean([*each.values()]):.3f}" if each else ""
            if way in TOGETHER and (both := sorted(set(each) & set(alone))):
                mean, half = interval(np.array([each[s] - alone[s] for s in both]))
                cell += f" ({mean:+.3f}" + ("" if np.isnan(half) else f" ± {half:.3f}") + ")"
            cells.append(cell)
        lines.append(f"| {task}, {measure} | {' | '.join(cells)} |")
    lines.append("\nRates: " + ", ".join(f"{way} {lr}" for way, lr in chosen.items()) + ".")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the four data sets")
    parser.add_argument("--ways", nargs="+", default=["together", *(f"alone:{t}" for t in MEASURES), *TOGETHER[1:]])
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--table", action="store_true", help="only show the table of results.csv")
    args = parser.parse_args()
    if not args.table:
        if args.data is None:
            parser.error("--data is needed")
        for way in args.ways:
            seeds = range(args.first, args.first + args.seeds)
            rows = train(args.data.resolve(), way, lr=args.lr, steps=args.steps, seeds=seeds)
            new = not RESULTS.exists()
            with RESULTS.open("a", newline="") as f:
                writer = csv.DictWriter(f, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    print(table(list(csv.DictReader(RESULTS.open(newline="")))))


if __name__ == "__main__":
    main()
