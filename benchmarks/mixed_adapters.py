"""A batch in which every row has its own LoRA against the same batch under one: forward time, side by side.

    python benchmarks/mixed_adapters.py                     # 8 adapters of rank 16 on all linear layers
    python benchmarks/mixed_adapters.py --adapters 2 --rank 8 --rows 4 --output benchmarks/results/mixed_adapters.md

The two programs take turns, and the ratio is that of neighbours, so that a busy machine slows both. The goal is below 1.3.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

GOAL = 1.3


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    from ftjax.headspec import HeadSpec
    from ftjax.models.base import Numerics
    from ftjax.models.llama import Llama, LlamaConfig, Rope
    from ftjax.params import init_params
    from ftjax.peft.adapters import load_adapters
    from ftjax.peft.interop import AdapterFile
    from ftjax.peft.lora import LoRA

    width = args.width
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64, num_hidden_layers=args.layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, head_dim=64, max_position_embeddings=4096,
        rms_norm_eps=1e-5, rope=Rope(1e4, "default", 1.0, 0.0, 0.0, 0), tie_word_embeddings=True, attention_bias=False,
        mlp_bias=False, initializer_range=0.02,
    )  # fmt: skip
    model = Llama(shape, Numerics(), HeadSpec())
    params = init_params(model.table, jax.random.key(0), dtype=jnp.dtype(args.dtype))
    method, files = LoRA(rank=args.rank), {}
    for i in range(args.adapters):
        overlay = method.init(jax.random.key(i), model.table, params)
        moved = {k: d.replace(b=0.02 * jax.random.normal(jax.random.key(i), d.b.shape)) for k, d in overlay.items()}
        files[f"adapter {i}"] = AdapterFile(method, moved, "")
    adapters, names = load_adapters(model, params, files), list(files)
    ids = jax.random.randint(jax.random.key(1), (args.rows, args.length), 3, 8192, dtype=jnp.int32)
    inputs = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    stores = {
        "the base alone": params,
        "one adapter": adapters.use(names[0]),
        "an adapter for every row": adapters.rows([names[i % len(names)] for i in range(args.rows)]),
    }
    programs = {name: jax.jit(lambda p, x: model.apply(p, x).logits) for name in stores}

    def seconds(name: str) -> float:
        start = time.perf_counter()
        jax.block_until_ready(programs[name](stores[name], inputs))
        return time.perf_counter() - start

    for name in stores:
        seconds(name)
    turns = [{name: seconds(name) for name in stores} for _ in range(args.repeats)]
    best = {name: min(turn[name] for turn in turns) for name in stores}
    ratios = {n: statistics.median(turn[n] / turn["one adapter"] for turn in turns) for n in stores}

    text = "# A batch of many adapters\n\n"
    text += f"{args.layers} layers of {width}, {args.rows} rows of {args.length} tokens, {args.dtype}; "
    text += f"{args.adapters} LoRAs of rank {args.rank} on all linear layers; {args.repeats} turns. "
    text += f"The goal is below {GOAL} times one adapter.\n\n"
    text += "| | best, ms | over one adapter (median of turns) | over one adapter (best) |\n|---|---|---|---|\n"
    text += "".join(
        f"| {name} | {1e3 * best[name]:,.1f} | {ratios[name]:.2f} | {best[name] / best['one adapter']:.2f} |\n"
        for name in stores
    )
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "numpy"))
    text += f"\n    python {' '.join(['benchmarks/mixed_adapters.py', *sys.argv[1:]])}\n\n"
    text += (
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}, Python {platform.python_version()}, "
    )
    text += f"{versions}.\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
