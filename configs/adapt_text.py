"""Adapts a language model to a plain text by continued pre-training with LoRA.

python run.py --config configs/adapt_text.py model.path=DIR data.path=FILE.txt
python run.py --config configs/adapt_text.py model.path=DIR data.path=FILE.txt peft=full optim.lr=1e-3
"""

from ftjax.config import Checkpoint, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="adapt_text",
        model=Pretrained(path="path/to/llama"),
        peft=LoRA(rank=16, alpha=32.0),
        data=Local(path="path/to/text.txt", eval_share=0.05),
        loader=Loader(max_length=256),
        optim=Optim(lr=1e-2, schedule="cosine", warmup=20),
        train=Train(steps=300, batch=16, log_every=50),
        evaluate=Evaluate(every=100, examples=64, generate=2, max_new_tokens=48),
        checkpoint=Checkpoint(every=150),
    )
