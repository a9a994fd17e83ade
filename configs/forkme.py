"""Start here: copy this file, change what you need, run it. Every field: `python run.py explain`.

python run.py cp forkme my.py
python run.py check --config my.py          # shows the tokens that are trained, parameters, memory; trains nothing
python run.py --config my.py
"""

from ftjax.config import Checkpoint, Compute, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.causal_lm import CausalLM
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="my-run",
        model=Pretrained(path="path/to/llama", dtype="bfloat16"),  # a Hugging Face folder or hub id
        peft=LoRA(rank=16, alpha=32.0, targets=("q_proj", "v_proj")),  # or Full()
        objective=CausalLM(),
        data=Local(path="path/to/train.jsonl"),  # JSONL, JSON, CSV, Parquet or text; TRL's columns
        loader=Loader(max_length=1024),
        optim=Optim(lr=2e-4, schedule="cosine", warmup=20),
        train=Train(steps=500, batch=16, accumulate=4),
        evaluate=Evaluate(every=100, patience=3),
        checkpoint=Checkpoint(every=100, keep=2),
        compute=Compute(dtype="bfloat16", remat="dots"),
    )
