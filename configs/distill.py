"""A small model learns from a large one's distributions: two folders with the same tokenizer.

python run.py --config configs/distill.py model.path=SMALL objective.teacher.path=LARGE data.path=train.jsonl
python run.py --config configs/distill.py ... objective.divergence=jsd objective.beta=0.9 objective.alpha=1.0
python run.py --config configs/distill.py ... objective=distill_classification    # a tuned classifier; columns text, label
python run.py --config configs/distill.py ... objective.hidden=0.1    # and from its hidden values, layers evenly spread
python run.py --config configs/distill.py ... 'objective.teachers=[{"name":"pretrained","path":"OTHER"}]'    # two teachers
python run.py --config configs/distill.py ... objective.attention=1.0    # and from its attention; equally many heads
python run.py --config configs/distill.py ... objective.top_k=64    # the teacher runs once, before training: 512 bytes a token
python run.py --config configs/distill.py ... model=thinned model.path=LARGE      # begins with every second layer
"""

from ftjax.config import Checkpoint, Compute, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.distill import DistillCausalLM
from ftjax.peft.full import Full


def get_config() -> Run:
    return Run(
        name="distill",
        model=Pretrained(path="path/to/small"),
        peft=Full(),
        objective=DistillCausalLM(
            teacher=Pretrained(path="path/to/large", dtype="bfloat16"), alpha=0.5, temperature=2.0
        ),
        data=Local(path="path/to/train.jsonl"),
        loader=Loader(max_length=512),
        optim=Optim(lr=1e-4, schedule="cosine", warmup=100),
        train=Train(steps=2000, batch=32, accumulate=4),
        evaluate=Evaluate(every=500),
        checkpoint=Checkpoint(every=500),
        compute=Compute(dtype="bfloat16"),
    )
