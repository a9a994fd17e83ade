"""Learning from single answers that are good or bad (KTO), with LoRA.

python run.py --config configs/kto.py data.path=judged.json
python run.py --config configs/kto.py data.path=judged.json objective.precompute=true        # the reference runs once
python run.py --config configs/kto.py data.path=judged.json model.adapter=runs/sft_instructions/adapter

Rows: prompt, completion, label (true or false); or messages with label or kto_tag, the last message being the judged one.
Weights of good and bad answers (objective.good, objective.bad) should make up for unequal numbers.

Measured on LLaMA-Factory's demo of 300 judged messages with the model in the package (2 M parameters), train.steps=40,
loader.max_length=192 (half of the prompts are longer and left out: 142 examples), precompute=true: the held-out loss
falls from 0.500 to 0.316, rewards go to 0.85 for good and -1.35 for bad answers. Six held-out answers are no measurement of
more than that it runs and learns what its data hold.
"""

from ftjax.config import Checkpoint, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.kto import KTO
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="kto",
        model=Pretrained(path="embedded"),
        peft=LoRA(rank=16, alpha=32.0),
        objective=KTO(beta=0.1),
        data=Local(path="path/to/judged.json", chat_template="alpaca"),
        loader=Loader(max_length=256),
        optim=Optim(lr=1e-3, schedule="linear", warmup=10),
        train=Train(steps=60, batch=8, log_every=10),
        evaluate=Evaluate(every=30, generate=2, max_new_tokens=40, metric_examples=0),
        checkpoint=Checkpoint(every=30),
    )
