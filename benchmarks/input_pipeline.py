"""Tokens per second of the input pipeline: reading and tokenizing once, then packed batches, prefetched to the device.

    python benchmarks/input_pipeline.py                     # the standard library's sources, the embedded tokenizer
    python benchmarks/input_pipeline.py --output benchmarks/results/input_pipeline.md

The goal is 20 times what the 15M step of `cpu_step.py` eats (about 2 400 tokens/s), so that the step never waits.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

STEP = 2400  # tokens/s of the 15M step, benchmarks/results/cpu_step.md
LENGTH, ROWS = 256, 16


def rate(batches: int, take) -> float:
    """Tokens per second over `batches` batches."""
    take()
    start = time.perf_counter()
    for _ in range(batches):
        take()
    return batches * ROWS * LENGTH / (time.perf_counter() - start)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["FTJAX_CACHE"] = ""
    import jax

    from ftjax.config import Loader
    from ftjax.data.pipeline import Batches
    from ftjax.data.prefetch import prefetch_to_device
    from ftjax.data.prepare import prepare
    from ftjax.data.tasks.stdlib_text import StdlibText
    from ftjax.data.tokenizer import load_tokenizer
    from ftjax.models.sources import embedded_folder

    loader = Loader(max_length=LENGTH)
    start = time.perf_counter()
    data = prepare(StdlibText(), loader, load_tokenizer(embedded_folder()), seed=0)
    seconds = time.perf_counter() - start
    tokens = len(data.train.input_ids) + len(data.eval.input_ids)
    lines = [("read, tokenize, check (once; then cached)", tokens / seconds)]
    plain = Batches(data.train, loader=loader, batch=ROWS)
    lines.append(("packed batches of numpy arrays", rate(args.batches, plain.next)))
    plain.close()
    batches = Batches(data.train, loader=loader, batch=ROWS)
    source = prefetch_to_device(batches, jax.device_put, 2, say=print)
    lines.append(
        ("packed batches, prefetched to the device", rate(args.batches, lambda: jax.block_until_ready(next(source))))
    )
    source.close()
    batches.close()

    text = "# The input pipeline\n\n"
    text += (
        f"{tokens:,} tokens of the standard library's sources, rows of {LENGTH}, {ROWS} a batch, best-fit packing.\n\n"
    )
    text += f"| | tokens/s | over the 15M step's {STEP} |\n|---|---|---|\n"
    text += "".join(f"| {name} | {value:,.0f} | {value / STEP:,.0f} |\n" for name, value in lines)
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "grain", "transformers", "tokenizers", "numpy"))
    text += f"\n    python {' '.join(['benchmarks/input_pipeline.py', *sys.argv[1:]])}\n\n"
    text += f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}.\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
