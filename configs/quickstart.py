"""Teaches the embedded 2 M parameter Llama to write the docstring of a Python function, with LoRA, on a CPU.

python run.py --config configs/quickstart.py
"""

from ftjax.config import Checkpoint, Compute, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.stdlib_docs import StdlibDocs
from ftjax.models.sources import Pretrained
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="quickstart",
        model=Pretrained(path="embedded"),
        peft=LoRA(rank=16, alpha=32.0, targets=("all-linear",)),
        data=StdlibDocs(),
        loader=Loader(max_length=256),
        optim=Optim(lr=3e-3, schedule="cosine", warmup=20),
        train=Train(steps=200, batch=8, log_every=20),
        evaluate=Evaluate(every=100, examples=256, generate=4, max_new_tokens=40, metric_examples=32),
        checkpoint=Checkpoint(every=50),
        compute=Compute(layers="unroll"),
    )
