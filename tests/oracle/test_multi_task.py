"""Every task's folder of a run with several tasks, opened by PEFT: the same logits as the model of the run."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ftjax import entry  # noqa: E402
from ftjax.peft.base import bind  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from tests.test_multi_task import a_run, project  # noqa: E402, F401

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = [[5, 6, 7, 8, 9]]
CLASSES = {"color": 3, "way": 2, "text": 0}


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory):  # noqa: F811
    """(base folder, run folder, its setup, its state)."""
    out = tmp_path_factory.mktemp("run") / "several"
    run = a_run(project, out, "train.steps=2", "evaluate.every=0", "evaluate.generate=0", peft=LoRA(rank=4))
    assert run.regime.train(run, allow=()) == 0
    setup, state, _ = entry._open(out, (), entry.Console())
    return project / "base", out, setup, state


@pytest.mark.parametrize("task", CLASSES)
def test_peft_opens_the_folder_of_a_task(finished, task):
    base, out, setup, state = finished
    store = setup.store(state)
    model, seen = setup.model.view(task, bind(store["base"], store["overlay"]))
    ours = model.apply(seen, {"input_ids": jnp.asarray(IDS, jnp.int32)}).logits
    n = CLASSES[task]
    kind = transformers.AutoModelForSequenceClassification if n else transformers.AutoModelForCausalLM
    plain = kind.from_pretrained(base, dtype=torch.float32, **({"num_labels": n} if n else {}))
    plain.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(plain, out / "adapter" / task).eval()
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(IDS)).logits
    np.testing.assert_allclose(ours, logits, atol=1e-5)
    with torch.no_grad(), theirs.disable_adapter():
        assert np.abs(np.asarray(ours) - theirs(input_ids=torch.tensor(IDS)).logits.numpy()).max() > 1e-3
