"""Full fine-tuning and LoRA adapt a story model to plays: what is learnt and what is forgotten, over seeds.

    python -m experiments.e001_adaptation.sweep --model DIR --text FILE.txt --out runs/e001

Every run is `configs/adapt_text.py` with overrides. "story loss" is the loss on stories that the base model itself wrote
(sampled at temperature 1 before training), so its rise measures what is forgotten.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import ftjax
from experiments.stories import stories, story_loss

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
METHODS = {
    "lora": ["peft=lora", "peft.rank=16", "peft.alpha=32", "optim.lr=1e-2"],
    "full": ["peft=full", "optim.lr=2e-3"],
}


def trained(model: str, folder: Path):
    """The model that a run ended with."""
    if (folder / "model").exists():
        return ftjax.load_pretrained(folder / "model")
    return ftjax.load_pretrained(model, adapter=folder / "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/e001"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = stories(args.model, 64)
    base = story_loss(*ftjax.load_pretrained(args.model), rows)
    results = []
    for method, overrides in METHODS.items():
        for seed in range(args.seeds):
            out = args.out / f"{method}-{seed}"
            settings = [f"model.path={args.model}", f"data.path={args.text}", *overrides, f"seed={seed}", f"out={out}"]
            subprocess.run(
                [sys.executable, str(ROOT / "run.py"), "--config", str(ROOT / "configs/adapt_text.py"), *settings],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
            evals = {r["step"]: r["loss"] for r in lines if r["event"] == "eval"}
            after = story_loss(*trained(args.model, out), rows)
            results.append((method, seed, evals[0], min(evals.values()), base, after))
            print(*results[-1], flush=True)
    with (HERE / "results.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["method", "seed", "text_before", "text_after", "story_before", "story_after"])
        writer.writerows([(m, s, *(f"{x:.4f}" for x in numbers)) for m, s, *numbers in results])
    for method in METHODS:
        numbers = np.array([r[2:] for r in results if r[0] == method])
        spread = numbers.std(0, ddof=1) if len(numbers) > 1 else np.zeros(4)
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(numbers.mean(0), spread, strict=True)]
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
