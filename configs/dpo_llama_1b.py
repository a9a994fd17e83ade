"""DPO of a Llama of 1B parameters on one accelerator: the settings that such a model needs. Not run here.

python run.py merge --run runs/sft_1b --to sft_1b_merged        # or model.adapter=runs/sft_1b/adapter, see configs/dpo.py
python run.py --config configs/dpo_llama_1b.py model.path=sft_1b_merged data.path=preferences.jsonl
python run.py --config configs/dpo_llama_1b.py ... peft=full optim.lr=1e-6    # all weights; still no second model
python run.py check --config configs/dpo_llama_1b.py ...                      # the memory that it will take

What is held: weights in bfloat16 (2.5 GB for 1.24B parameters), an adapter of rank 32 with its moments, and a micro-batch
of 4 pairs (8 rows of 1,024 tokens), of whose blocks only the inputs are kept (remat). The reference runs once, beforehand.
64 pairs per step; 1.5 epochs of 60,000 pairs are 1,400 steps.
"""

from ftjax.config import Checkpoint, Compute, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.dpo import DPO
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="dpo_llama_1b",
        model=Pretrained(path="path/to/llama-1b-sft", dtype="bfloat16"),
        peft=LoRA(rank=32, alpha=64.0),
        objective=DPO(beta=0.1, precompute=True),
        data=Local(path="path/to/preferences.jsonl", eval_share=0.01),
        loader=Loader(max_length=1024, workers=2),
        optim=Optim(lr=5e-5, schedule="linear", warmup=140),
        train=Train(steps=1400, batch=64, accumulate=16, log_every=10),
        evaluate=Evaluate(every=200, examples=512, generate=4, max_new_tokens=256),
        checkpoint=Checkpoint(every=200),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
