"""Grade school mathematics: worked answers, trained and scored by the number after ####.

python run.py --config configs/gsm8k.py model.path=DIR data.path=gsm8k            # a folder with train.jsonl and test.jsonl
python run.py --config configs/gsm8k.py ... evaluate.metric_examples=1319         # the whole test split
python run.py eval --run runs/gsm8k evaluate.metric_examples=1319

gsm8k_exact is lm-evaluation-harness' strict match, gsm8k_flexible takes the last number anywhere.

Measured with the model in the package (2 M parameters, which has read little but Python's documentation), 60 steps of 8 rows,
evaluate.metric_examples=64: the held-out loss falls from 5.028 to 3.296, the share of tokens that are the likeliest one rises
from 14.5 % to 32.4 %. Of 64 answers none is right and one ends in the right number by chance: it learns what an answer looks
like. A model of 1B on one GPU: model.path=DIR model.dtype=bfloat16 compute.dtype=bfloat16 compute.remat=full optim.lr=2e-4
train.batch=32 train.accumulate=4 train.steps=700 evaluate.max_new_tokens=256 (three epochs; not run here).
"""

from ftjax.config import Checkpoint, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.causal_lm import CausalLM
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="gsm8k",
        model=Pretrained(path="embedded"),
        peft=LoRA(rank=16, alpha=32.0),
        objective=CausalLM(),
        data=Local(
            path="path/to/gsm8k",
            columns=("prompt=question", "completion=answer"),
            metrics=("gsm8k_exact", "gsm8k_flexible"),
        ),  # fmt: skip
        loader=Loader(max_length=384),
        optim=Optim(lr=2e-3, schedule="cosine", warmup=20),
        train=Train(steps=60, batch=8, log_every=10),
        evaluate=Evaluate(every=0, examples=64, generate=2, max_new_tokens=96, metric_examples=16),
        checkpoint=Checkpoint(every=60),
    )
