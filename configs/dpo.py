"""Preference training on top of an SFT adapter, which goes on and is the reference too: first configs/sft_instructions.py.

python run.py --config configs/sft_instructions.py data.path=instructions.json
python run.py --config configs/dpo.py data.path=preferences.json
python run.py --config configs/dpo.py data.path=preferences.json objective.precompute=True    # the reference runs once
python run.py --config configs/dpo.py data.path=preferences.json model.adapter=               # straight from the base

Rows: prompt, chosen, rejected; Alpaca's with chosen and rejected; or ShareGPT's conversations with both answers beside. The
method must be that of the SFT run.
"""

from ftjax.config import Checkpoint, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.dpo import DPO
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="dpo",
        model=Pretrained(path="embedded", adapter="runs/sft_instructions/adapter"),
        peft=LoRA(rank=16, alpha=32.0),
        objective=DPO(beta=0.1),
        data=Local(path="path/to/preferences.json", chat_template="alpaca"),
        loader=Loader(max_length=256),
        optim=Optim(lr=5e-4, schedule="linear", warmup=10),
        train=Train(steps=60, batch=8, log_every=10),
        evaluate=Evaluate(every=30, generate=2, max_new_tokens=40, metric_examples=0),
        checkpoint=Checkpoint(every=30),
    )
