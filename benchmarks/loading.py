"""Loading a checkpoint in shards: wall time and peak host memory here and in transformers' `from_pretrained`, side by side.

    python benchmarks/loading.py                            # a 1.2 GB Llama in 4 shards, made in a temporary folder
    python benchmarks/loading.py --layers 2 --repeats 2     # small

Each load is a process of its own; they take turns. The peak is the process's own (VmHWM) less what it was after its imports.
Linux only; needs the `oracle` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent

LOADERS = {
    "transformers": """
import torch, transformers
torch.set_num_threads(2)
transformers.LlamaForCausalLM
before = memory()
start = time.perf_counter()
model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
total = float(sum(p.double().sum() for p in model.parameters()))
""",
    "ftjax": """
import jax, jax.numpy as jnp
import ftjax
from ftjax import registry
ftjax.load_pretrained, registry.known("family")
jax.block_until_ready(jnp.zeros(3))
before = memory()
start = time.perf_counter()
model, params = ftjax.load_pretrained(folder)
jax.block_until_ready(params)
total = 0.0
""",
}
PROGRAM = """
import json, sys, time
folder = sys.argv[1]
def memory(name="VmRSS"):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 1024
{body}
print(json.dumps({{"seconds": time.perf_counter() - start, "before": before, "peak": memory("VmHWM")}}))
"""


TOUCH = "import sys, numpy; numpy.ones(int(float(sys.argv[1]) * 1e9) // 8)"
MEMORY = """\
Memory *touched*: a process has just written three times as many bytes and ended. A virtual machine may take away pages
that were not used for a while, and giving them again is slow: transformers maps the files as they are, while here the
weights are transposed into memory of their own, so that only ftjax waits for such pages.
"""


def make(folder: Path, layers: int) -> float:
    """A Llama of random float32 weights in four shards; its size in GB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 4 + 70_000_000)
    return size / 1e9


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent), "TOKENIZERS_PARALLELISM": "false"}
    results: dict[tuple[str, bool], list[dict[str, float]]] = {
        (n, ready): [] for ready in (True, False) for n in LOADERS
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        size = make(folder, args.layers)
        shards = len(list(folder.glob("*.safetensors")))
        for turn in range(args.repeats):
            for name, ready in list(results) if turn % 2 == 0 else list(results)[::-1]:
                if ready:
                    subprocess.run([sys.executable, "-c", TOUCH, str(3 * size)], check=True)
                command = [sys.executable, "-c", PROGRAM.format(body=LOADERS[name]), str(folder)]
                out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
                results[name, ready].append(json.loads(out.strip().splitlines()[-1]))
                print(name, ready, f"{results[name, ready][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    text = f"# Loading a checkpoint\n\nA Llama of {size:.2f} GB, float32, {shards} shards; the file cache is warm.\n\n"
    text += "| | memory | seconds best | median | ratio (medians) | peak MiB beyond the imports | ratio |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for (name, ready), runs in results.items():
        base = results["transformers", ready]
        seconds, others = [r["seconds"] for r in runs], [r["seconds"] for r in base]
        peak, other = (statistics.median(r["peak"] - r["before"] for r in x) for x in (runs, base))
        median, against = statistics.median(seconds), statistics.median(others)
        text += f"| {name} | {'touched' if ready else 'as found'} | {min(seconds):.2f} | {median:.2f} "
        text += f"| {median / against:.2f} | {peak:.0f} | {peak / other:.2f} |\n"
    text += "\n" + MEMORY
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "torch", "transformers", "safetensors"))
    text += f"\n    python {' '.join(['benchmarks/loading.py', *sys.argv[1:]])}\n\n"
    text += f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}.\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
