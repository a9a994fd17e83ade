"""A model learns the answers that another one gives to the prompts of a data set; their vocabularies may differ.

python run.py --config configs/distill_answers.py model.path=SMALL data.teacher.path=LARGE data.source.path=asked.jsonl
python run.py --config configs/distill_answers.py ... data.samples=4 data.temperature=0.8    # four drawn answers to each prompt
python run.py --config configs/distill_answers.py ... data.teacher_template=chatml    # of a teacher that has no template
python run.py --config configs/distill_answers.py ... data.file=answers.jsonl    # where to read what the student learns
"""

from ftjax.config import Checkpoint, Compute, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.distilled import Distilled
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.causal_lm import CausalLM
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="distill_answers",
        model=Pretrained(path="path/to/small"),
        peft=LoRA(rank=16),
        objective=CausalLM(),
        data=Distilled(
            source=Local(path="path/to/asked.jsonl"),
            teacher=Pretrained(path="path/to/large", dtype="bfloat16"),
            max_new_tokens=256,
        ),
        loader=Loader(max_length=512),
        optim=Optim(lr=2e-4, schedule="cosine", warmup=100),
        train=Train(steps=2000, batch=32, accumulate=4),
        evaluate=Evaluate(every=500),
        checkpoint=Checkpoint(every=500),
        compute=Compute(dtype="bfloat16"),
    )
