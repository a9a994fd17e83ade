"""Four tasks at once over one model: intents, instructions, preferences and maths, each with its own loss and metrics.

python run.py --config configs/multi_task.py objective.tasks.0.data.path=banking77 \
    objective.tasks.1.data.path=instructions.json objective.tasks.2.data.path=preferences.json objective.tasks.3.data.path=gsm8k
python run.py --config configs/multi_task.py ... objective.weighting=pcgrad data.mixing=temperature data.temperature=2.0
python run.py eval --run runs/multi_task

The paths: a folder with train.csv and test.csv (columns text, category), Alpaca rows, Alpaca rows with chosen and rejected, a
folder with train.jsonl and test.jsonl (question, answer). `model.path=embedded` is the small model of the package. A folder
runs/multi_task/adapter/<task> opens alone. Without files of your own, the package's two corpora together:

python run.py --config configs/quickstart.py name=docs_and_text objective=multi_task data=tasks

Measured with the model of the package on 10,003 intents, 1,044 instructions, 1,042 pairs and 7,463 problems (3 seeds, held
out; experiments/e006_multi_task): against a model for each task intents gain (accuracy 0.139, alone 0.057), instructions and
maths lose (loss 4.31 and 3.46, alone 3.27 and 2.75), preferences are level; objective.weighting=gradnorm takes back a third to
a half of what was lost.
"""

from ftjax.config import Checkpoint, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.data.tasks.tasks import Tasks
from ftjax.models.sources import Pretrained
from ftjax.objectives.causal_lm import CausalLM
from ftjax.objectives.classification import Classification
from ftjax.objectives.multi_task import MultiTask, SubTask
from ftjax.objectives.reward_model import RewardModel
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    intents = Local(path="path/to/banking77", columns=("label=category",))
    instructions = Local(path="path/to/instructions.json", chat_template="alpaca")
    preferences = Local(path="path/to/preferences.json", chat_template="alpaca")
    maths = Local(path="path/to/gsm8k", columns=("prompt=question", "completion=answer"))
    return Run(
        name="multi_task",
        model=Pretrained(path="embedded"),
        peft=LoRA(rank=16, alpha=32.0),
        objective=MultiTask(
            tasks=(
                SubTask(name="intents", data=intents, objective=Classification()),
                SubTask(name="instructions", data=instructions, objective=CausalLM()),
                SubTask(name="preferences", data=preferences, objective=RewardModel()),
                SubTask(name="maths", data=maths, objective=CausalLM()),
            )
        ),
        data=Tasks(mixing="fixed"),
        loader=Loader(max_length=256, skip_bad=10),
        optim=Optim(lr=5e-3, schedule="cosine", warmup=10),
        train=Train(steps=120, batch=32, log_every=10),
        evaluate=Evaluate(every=0, examples=256, generate=2),
        checkpoint=Checkpoint(every=120),
    )
