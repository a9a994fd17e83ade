"""Teaches a model to follow instructions: Alpaca rows (instruction, input, output), ShareGPT rows or messages, with LoRA.

python run.py --config configs/sft_instructions.py data.path=instructions.json
python run.py --config configs/sft_instructions.py data.path=chats.jsonl model.path=DIR data.chat_template=

The model in the package has no chat template, so Alpaca's is used; an empty one takes the tokenizer's own.

Measured on 1,100 Alpaca rows with that model (2 M parameters, which has read little but Python's documentation): in 60 steps
the held-out loss falls from 6.19 to 3.77, the share of tokens that are the most likely one rises from 7.9 % to 35.9 %. It
learns the form of an answer, not answers: "Name the device used to measure humidity." gives "The deligre for the deligre
is 22."
"""

from ftjax.config import Checkpoint, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.causal_lm import CausalLM
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="sft_instructions",
        model=Pretrained(path="embedded"),
        peft=LoRA(rank=16, alpha=32.0),
        objective=CausalLM(),
        data=Local(path="path/to/instructions.json", chat_template="alpaca"),
        loader=Loader(max_length=256),
        optim=Optim(lr=5e-3, schedule="cosine", warmup=10),
        train=Train(steps=60, batch=8, log_every=10),
        evaluate=Evaluate(every=30, generate=2, max_new_tokens=40, metric_examples=0),
        checkpoint=Checkpoint(every=30),
    )
