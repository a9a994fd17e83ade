"""Two classifications and a language model at once over one backbone, each with its own head, their gradients projected.

python run.py --config configs/multi_task.py model.path=DIR objective.tasks.0.data.path=a.csv objective.tasks.1.data.path=b.csv
python run.py --config configs/multi_task.py ... objective.weighting=gradnorm data.mixing=proportional
python run.py eval --run runs/multi_task

The CSV files have the columns text and label (or rename them with data.columns); the third task is the docstrings that come
with the package. `model.path=embedded` is the small model of the package. A folder runs/multi_task/adapter/<task> opens
alone. Without files of your own, the package's two corpora together:

python run.py --config configs/quickstart.py name=docs_and_text objective=multi_task data=tasks
"""

from ftjax.config import Checkpoint, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.data.tasks.stdlib_docs import StdlibDocs
from ftjax.data.tasks.tasks import Tasks
from ftjax.models.sources import Pretrained
from ftjax.objectives.causal_lm import CausalLM
from ftjax.objectives.classification import Classification
from ftjax.objectives.multi_task import MultiTask, SubTask
from ftjax.objectives.weighting import PCGrad
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="multi_task",
        model=Pretrained(path="embedded"),
        peft=LoRA(rank=16, alpha=32.0),
        objective=MultiTask(
            tasks=(
                SubTask(name="intent", data=Local(path="path/to/intent.csv"), objective=Classification()),
                SubTask(name="tone", data=Local(path="path/to/tone.csv"), objective=Classification()),
                SubTask(name="docs", data=StdlibDocs(), objective=CausalLM()),
            ),
            weighting=PCGrad(),
        ),
        data=Tasks(mixing="temperature", temperature=2.0),
        loader=Loader(max_length=256),
        optim=Optim(lr=2e-3, schedule="linear", warmup=20),
        train=Train(steps=300, batch=32, log_every=20),
        evaluate=Evaluate(every=100, generate=2),
        checkpoint=Checkpoint(every=100),
    )
