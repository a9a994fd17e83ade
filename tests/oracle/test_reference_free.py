"""ORPO, CPO, SimPO and the reward model against TRL's trainers on the same pairs: losses, metrics, every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from ftjax.data.batches import PAD_SEGMENT  # noqa: E402
from ftjax.data.pairs import PairBatch  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.objectives.reference_free import CPO, ORPO, SimPO  # noqa: E402
from ftjax.objectives.reward_model import RewardModel  # noqa: E402
from tests.oracle.test_preference import FOLDER, ROWS, fresh, moved, our_rows, ours, same_gradients  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PLAIN = dict(
    per_device_train_batch_size=4, report_to=[], use_cpu=True, max_length=32, gradient_checkpointing=False, bf16=False
)


def tokenizer():
    made = transformers.AutoTokenizer.from_pretrained(FOLDER)
    made.pad_token = made.pad_token or made.eos_token
    return made


def wide(x, width, value):
    x = np.asarray(x)
    return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=value)


def experimental(kind, folder, **options):
    """A trainer of TRL's experimental part over the rows, and one of its batches in both forms."""
    module = __import__(f"trl.experimental.{kind.lower()}", fromlist=[kind])
    config = getattr(module, f"{kind}Config")(output_dir=str(folder), **PLAIN, **options)
    t = getattr(module, f"{kind}Trainer")(
        model=moved(fresh()), args=config, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer()
    )
    inputs = t.data_collator([t.train_dataset[i] for i in range(len(ROWS))])
    width = max(inputs[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))
    sides = []
    for side in ("chosen", "rejected"):
        ids, mask, labels = (inputs[f"{side}_{k}"] for k in ("input_ids", "attention_mask", "labels"))
        sides.append(our_rows(wide(ids, width, 0), wide(mask, width, 0), wide(labels, width, -100) != -100))
    n = len(ROWS)
    pairs = (np.stack(both, axis=1) for both in zip(*sides, strict=True))
    batch = PairBatch(*pairs, labels=np.zeros(n, np.float32), rows=np.ones(n, np.float32))
    return t, inputs, jax.tree.map(jnp.asarray, batch)


def compare(kind, objective, tmp_path, **options):
    t, inputs, batch = experimental(kind, tmp_path, **options)
    policy = t.accelerator.unwrap_model(t.model)
    policy.save_pretrained(tmp_path / "policy")
    policy.zero_grad()
    loss, logged = t.get_batch_loss_metrics(t.model, inputs)
    loss.backward()
    model, params = hf.load(str(tmp_path / "policy"))
    value, metrics, grads = ours(objective, (None, model, params, params), batch)
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, mine in metrics.items():
        if name in logged:
            assert mine == pytest.approx(float(logged[name]), rel=1e-4, abs=1e-5), name
    same_gradients(model, grads, policy)


def test_orpo(tmp_path):
    compare("ORPO", ORPO(beta=0.2), tmp_path, beta=0.2)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_cpo(tmp_path, loss):
    smoothing = 0.1 if loss == "sigmoid" else 0.0
    objective = CPO(beta=0.2, alpha=0.7, loss=loss, label_smoothing=smoothing)
    compare("CPO", objective, tmp_path, beta=0.2, cpo_alpha=0.7, loss_type=loss, label_smoothing=smoothing)


def test_simpo(tmp_path):
    compare("CPO", SimPO(beta=2.0, gamma=0.6), tmp_path, beta=2.0, cpo_alpha=0.0, loss_type="simpo", simpo_gamma=0.6)


@pytest.mark.parametrize("centre", [0.0, 0.05])
def test_reward_model(tmp_path, centre):
    torch.manual_seed(0)
    made = transformers.AutoModelForSequenceClassification.from_pretrained(
        FOLDER, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    made.config.pad_token_id = tokenizer().pad_token_id
    with torch.no_grad():
        made.score.weight.mul_(20)
    config = trl.RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=centre or None, **PLAIN)
    rows = [row | {"margin": 0.1 * i} for i, row in enumerate(ROWS)]
    t = trl.RewardTrainer(
        model=made, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer()
    )
    inputs = t.data_collator([t.train_dataset[i] for i in range(len(rows))])
    policy = t.accelerator.unwrap_model(t.model)
    policy.save_pretrained(tmp_path / "policy")
    policy.zero_grad()
    t._metrics["train"].clear()
    margins = np.asarray(inputs["margin"], np.float32) if "margin" in inputs else np.zeros(len(rows), np.float32)
    ids, mask = np.asarray(inputs["input_ids"]), np.asarray(inputs["attention_mask"])
    policy.train()
    theirs = t.compute_loss(t.model, inputs)
    theirs.backward()
    logged = {k: v[-1] for k, v in t._metrics["train"].items()}
    n = len(rows)
    pairs = (np.stack([x[:n], x[n:]], axis=1) for x in our_rows(ids, mask, mask))
    batch = jax.tree.map(jnp.asarray, PairBatch(*pairs, labels=margins, rows=np.ones(n, np.float32)))
    assert (np.asarray(batch.segments) == PAD_SEGMENT).any()
    model, params = hf.load(str(tmp_path / "policy"))
    value, metrics, grads = ours(RewardModel(centre=centre), (None, model, params, params), batch)
    assert value == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name in ("accuracy", "margin", "mean_reward"):
        assert metrics[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    same_gradients(model, grads, policy)
