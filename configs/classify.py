"""Classifies texts: a CSV with columns text and label (rename with data.columns), any encoder or decoder.

python run.py --config configs/classify.py model.path=DIR data.path=train.csv data.eval_path=test.csv
python run.py --config configs/classify.py ... data.columns=label=category peft=lora optim.lr=3e-3
"""

from ftjax.config import Checkpoint, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.classification import Classification
from ftjax.peft.full import Full


def get_config() -> Run:
    return Run(
        name="classify",
        model=Pretrained(path="path/to/bert"),
        peft=Full(),
        objective=Classification(),
        data=Local(path="path/to/train.csv"),
        loader=Loader(max_length=64, truncation="right"),
        optim=Optim(lr=5e-4, schedule="linear", warmup=100, weight_decay=0.01),
        train=Train(steps=1500, batch=32, log_every=100),
        evaluate=Evaluate(every=500, generate=0),
        checkpoint=Checkpoint(every=500),
    )
