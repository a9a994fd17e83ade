"""DPO on top of an SFT adapter against TRL: a model with an adapter of PEFT's, whose copy is TRL's reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from ftjax import params as stores  # noqa: E402
from ftjax.data.pairs import PairBatch  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.sources import embedded_folder  # noqa: E402
from ftjax.objectives.dpo import DPO  # noqa: E402
from ftjax.peft.base import bind  # noqa: E402
from ftjax.peft.earlier import start_from  # noqa: E402
from ftjax.peft.interop import load_adapter, save_adapter  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from tests.oracle.test_preference import ROWS, fresh, our_rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FOLDER = str(embedded_folder())
METHOD = LoRA(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))


def moved(model, seed):
    """Every array of the adapter that is trained, moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".default." in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(PEFT's folder of an SFT adapter, of the policy that went on from it, TRL's loss and metrics, the batch)."""
    root = tmp_path_factory.mktemp("earlier")
    torch.set_num_threads(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    policy = moved(peft.get_peft_model(fresh(), config), 1)
    policy.save_pretrained(root / "sft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    args = trl.DPOConfig(
        output_dir=str(root), per_device_train_batch_size=4, report_to=[], use_cpu=True, max_length=32, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    t = trl.DPOTrainer(
        model=policy, args=args, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer
    )
    moved(t.model, 2)
    t.model.save_pretrained(root / "policy", selected_adapters=["default"])
    inputs = t.data_collator([t.train_dataset[i] for i in range(len(ROWS))])
    loss = float(t._compute_loss(t.model, inputs, False).detach())
    logged = {k: v[-1] for k, v in t._metrics["train"].items()}
    n, parts = len(ROWS), our_rows(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
    pairs = (np.stack([x[:n], x[n:]], axis=1) for x in parts)
    batch = PairBatch(*pairs, labels=np.zeros(n, np.float32), rows=np.ones(n, np.float32))
    return root, loss, logged, jax.tree.map(jnp.asarray, batch)


def test_the_loss_is_trls_with_the_sft_adapter_as_reference(trained):
    root, want, logged, batch = trained
    model, base = hf.load(FOLDER)
    empty = METHOD.init(jax.random.key(0), model.table, base)
    base, sft = start_from(root / "sft", METHOD, empty, model.table, base, base_path=FOLDER)
    overlay = load_adapter(root / "policy", model.table, base).overlay
    objective = DPO()
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}

    @jax.jit
    def loss(policy, past):
        def apply(overlay, x):
            return model.apply(bind(base, overlay), x)

        out = objective(
            lambda x, m: (apply(policy, x), m), batch, reference=lambda x: apply(past, x), mutable={}, hyper=hyper
        )
        return out.sums["sigmoid"] / len(ROWS), {k: a / b for k, (a, b) in out.metrics.items()}

    value, metrics = loss(overlay, sft)
    assert float(value) == pytest.approx(want, rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert float(metrics[name]) == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    assert float(loss(sft, sft)[0]) == pytest.approx(np.log(2), abs=3e-7)
    against_the_base = float(loss(overlay, empty)[0])
    assert abs(against_the_base - want) > 1e-3


def test_what_went_on_opens_in_peft(trained, tmp_path):
    root, _, _, batch = trained
    model, base = hf.load(FOLDER)
    empty = METHOD.init(jax.random.key(0), model.table, base)
    base, sft = start_from(root / "sft", METHOD, empty, model.table, base, base_path=FOLDER)
    on = jax.tree.map(lambda x: x + 0.01 if x.ndim > 1 else x, sft)
    save_adapter(tmp_path, stores.join(on), model.table, METHOD, base_path=FOLDER)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    ids = np.asarray(batch.tokens[:, 0, :6])
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(ids.astype(np.int64))).logits.numpy()
    got = jax.jit(lambda p, x: model.apply(p, {"input_ids": x}).logits)(bind(base, on), ids)
    np.testing.assert_allclose(got, want, atol=2e-4)
