"""A tiny BERT and RoBERTa, trained from nothing as masked language models, learn to tell bank customers' questions apart.

    python experiments/e003_banking77/run.py --data banking77 --out /tmp/e003

`--data` is a folder with train.csv and test.csv (columns text, category: the Banking77 data set). The models are trained by
configs/pretrain_bert.py unless `--out` holds them already, and fine-tuned by configs/classify.py, all of them, on 10 classes
and on 77. Beside them: the same BERT without pretraining, and scikit-learn's TF-IDF with logistic regression.
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

from ftjax.verbs import main as ftjax

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
BERT = (
    "hidden_size=128", "intermediate_size=512", "num_hidden_layers=4", "num_attention_heads=4", "hidden_act=gelu",
    "max_position_embeddings=128", "type_vocab_size=2", "layer_norm_eps=1e-12", "pad_token_id=0",
)  # fmt: skip
ROBERTA = (*BERT[:5], "max_position_embeddings=130", "type_vocab_size=1", "layer_norm_eps=1e-5", "pad_token_id=0")
STEPS = {10: 250, 77: 900}


def pretrain(out: Path, steps: int) -> dict[str, Path]:
    """Both language models."""
    kinds = {"bert": ("bert", "wordpiece", BERT), "roberta": ("roberta", "bpe-mask", ROBERTA)}
    for name, (family, tokenizer, settings) in kinds.items():
        if not (out / name / "model").exists():
            command = ["--config", str(CONFIGS / "pretrain_bert.py"), f"out={out / name}", f"model.family={family}"]
            command += [
                f"model.tokenizer_kind={tokenizer}",
                f"model.settings={json.dumps(settings)}",
                f"train.steps={steps}",
            ]
            assert ftjax(command) == 0
    return {name: out / name / "model" for name in kinds}


def subset(data: Path, classes: int, out: Path) -> tuple[Path, Path]:
    """CSV files with the first `classes` classes in alphabetical order, as text and label."""
    rows = {split: list(csv.DictReader((data / f"{split}.csv").open(newline=""))) for split in ("train", "test")}
    kept = set(sorted({r["category"] for r in rows["train"]})[:classes])
    paths = []
    for split, all_rows in rows.items():
        path = out / f"{split}{classes}.csv"
        with path.open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["text", "label"])
            writer.writerows([r["text"], r["category"]] for r in all_rows if r["category"] in kept)
        paths.append(path)
    return paths[0], paths[1]


def bag_of_words(train: Path, test: Path) -> dict[str, float]:
    """TF-IDF over words and pairs of words, and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline

    (x, y), (xt, yt) = (
        zip(*((r["text"], r["label"]) for r in csv.DictReader(p.open(newline=""))), strict=True) for p in (train, test)
    )
    start = time.perf_counter()
    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000)).fit(x, y)
    said = classifier.predict(xt)
    return {
        "accuracy": float(accuracy_score(yt, said)), "macro_f1": float(f1_score(yt, said, average="macro")),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def fine_tune(model: list[str], files: tuple[Path, Path], classes: int, seed: int, out: Path) -> dict[str, float]:
    """One run of configs/classify.py; its last held-out measurement."""
    train, test = files
    start = time.perf_counter()
    command = ["--config", str(CONFIGS / "classify.py"), *model, f"data.path={train}", f"data.eval_path={test}"]
    command += [
        f"out={out}",
        f"train.steps={STEPS[classes]}",
        f"seed={seed}",
        "evaluate.every=100000",
        "evaluate.examples=0",
    ]
    if not (out / "model").exists():
        assert ftjax(command) == 0
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = [x for x in lines if x["event"] == "eval"][-1]
    return {"accuracy": last["accuracy"], "macro_f1": last["macro_f1"], "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pretrained = pretrain(args.out, args.steps)
    models = {name: [f"model.path={folder}"] for name, folder in pretrained.items()}
    scratch = ["model=scratch", "model.family=bert", f"model.settings={json.dumps(BERT)}"]
    models["bert, not pretrained"] = [*scratch, f"model.tokenizer_path={pretrained['bert']}"]
    rows: list[list[Any]] = []
    for classes in STEPS:
        files = subset(args.data, classes, args.out)
        found = bag_of_words(*files)
        rows.append(["TF-IDF, logistic regression", classes, "", found])
        for name, model in models.items():
            for seed in range(args.seeds):
                out = args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{classes}-{seed}"
                rows.append([name, classes, seed, fine_tune(model, files, classes, seed, out)])
    with (HERE / "results.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["model", "classes", "seed", "accuracy", "macro_f1"])
        writer.writerows([*r[:3], f"{r[3]['accuracy']:.4f}", f"{r[3]['macro_f1']:.4f}"] for r in rows)
    print("| model | classes | seed | accuracy | macro-F1 | seconds |\n|---|---|---|---|---|---|")
    for name, classes, seed, r in rows:
        print(f"| {name} | {classes} | {seed} | {r['accuracy']:.3f} | {r['macro_f1']:.3f} | {r['seconds']:.0f} |")


if __name__ == "__main__":
    main()
