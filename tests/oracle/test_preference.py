"""Preference losses, their metrics and gradients against TRL's trainers on the same pairs: policy and reference differ.

The base is the small Llama in the package, once as it is (the reference) and once with every weight moved (the policy).
"""

from __future__ import annotations

import warnings

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
from ftjax.models.sources import embedded_folder  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.objectives.dpo import DPO, LOSSES  # noqa: E402
from ftjax.objectives.kto import KTO  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FOLDER = str(embedded_folder())
ROWS = [
    {"prompt": "def add(a, b):", "chosen": " return the sum of a and b", "rejected": " nothing"},
    {"prompt": "class Queue", "chosen": " first in", "rejected": " a thing that holds other things for some time"},
    {"prompt": "import os", "chosen": " files and folders", "rejected": " processes"},
    {"prompt": "a longer prompt about dates", "chosen": " parse it", "rejected": " parse the date and give it back"},
]


def moved(model):
    """The same model with every weight moved a little."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02 * p.std())
    return model


def fresh():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """(torch policy, our model, our policy parameters, our reference parameters)."""
    torch.set_num_threads(1)
    policy = moved(fresh())
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    model, params = hf.load(str(folder))
    return policy, model, params, hf.load(FOLDER)[1]


def trainer_of(kind, policy, folder, rows, **options):
    """A TRL trainer over the rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, max_length=32,
        gradient_checkpointing=False, bf16=False, **options,
    )  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        model=policy, ref_model=fresh(), args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip


def our_rows(ids, attention, completion):
    """TRL's padded rows as ours: tokens, positions, segments, weights."""
    ids, attention, completion = (np.asarray(x) for x in (ids, attention, completion))
    positions = np.maximum(attention.cumsum(1) - 1, 0)
    return (
        np.where(attention > 0, ids, 0).astype(np.int32),
        positions.astype(np.int32),
        np.where(attention > 0, 0, PAD_SEGMENT).astype(np.int32),
        completion.astype(np.float32),
    )


def ours(objective, sides, batch):
    """(loss, metrics, gradients) of our objective."""
    _, model, params, past = sides
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}
    weights = objective.weights(batch)

    def loss(p):
        out = objective(
            lambda x, m: (model.apply(p, x), m),
            batch,
            reference=lambda x: model.apply(past, x),
            mutable={},
            hyper=hyper,
        )
        coef = objective.coefficients()
        return sum(coef[k] * v / weights[k] for k, v in out.sums.items()), out.metrics

    (value, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), {k: float(a / b) for k, (a, b) in found.items()}, grads


def same_gradients(model, grads, policy):
    """Every parameter's gradient, over the largest entry of the tensor."""
    theirs = {n: p.grad for n, p in policy.named_parameters()}
    for name, g in to_file_tensors(model.table, grads):
        want = theirs[name].numpy()
        assert np.abs(g - want).max() <= 1e-3 * np.abs(want).max() + 1e-7, name


@pytest.fixture(scope="module")
def dpo(sides, tmp_path_factory):
    """A trainer, whose settings the tests change, and one of its batches in both forms."""
    t = trainer_of("DPO", sides[0], tmp_path_factory.mktemp("dpo"), ROWS)
    inputs = t.data_collator([t.train_dataset[i] for i in range(len(ROWS))])
    parts = our_rows(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
    n = len(ROWS)
    pairs = (np.stack([x[:n], x[n:]], axis=1) for x in parts)
    batch = PairBatch(*pairs, labels=np.zeros(n, np.float32), rows=np.ones(n, np.float32))
    return t, inputs, jax.tree.map(jnp.asarray, batch)


def check_dpo(dpo, sides, objective, **settings):
    t, inputs, batch = dpo
    chosen = dict(
        loss_types=list(objective.loss), loss_weights=list(objective.coefficients().values()), beta=objective.beta,
        label_smoothing=objective.label_smoothing, f_divergence_type=objective.f_divergence,
        f_alpha_divergence_coef=objective.alpha, ld_alpha=objective.ld_alpha, **settings,
    )  # fmt: skip
    before = {k: getattr(t, k) for k in chosen}
    for k, v in chosen.items():
        setattr(t, k, v)
    policy = t.accelerator.unwrap_model(t.model)
    policy.zero_grad()
    t._metrics["train"].clear()
    policy.train()
    loss = t._compute_loss(t.model, inputs, False)
    loss.backward()
    logged = {k: v[-1] for k, v in t._metrics["train"].items()}
    for k, v in before.items():
        setattr(t, k, v)
    value, metrics, grads = ours(objective, sides, batch)
    assert value == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
    for name, mine in metrics.items():
        if name != "num_tokens":
            assert mine == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    same_gradients(sides[1], grads, policy)


@pytest.mark.parametrize("loss", [*LOSSES, "sft"])
def test_dpo_loss_types(dpo, sides, loss):
    check_dpo(dpo, sides, DPO(loss=(loss,), label_smoothing=0.1 if loss in ("robust", "exo_pair", "aot") else 0.0))


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_dpo_divergences(dpo, sides, divergence):
    check_dpo(dpo, sides, DPO(f_divergence=divergence))


def test_dpo_mixture_and_long_answers(dpo, sides):
    check_dpo(dpo, sides, DPO(loss=("sigmoid", "sft"), loss_weights=(1.0, 0.3), beta=0.2))
    check_dpo(dpo, sides, DPO(ld_alpha=0.3))


def test_dpo_starts_at_ln_2(sides, dpo):
    _, model, _, past = sides
    value, metrics, _ = ours(DPO(), (None, model, past, past), dpo[2])
    # policy and reference are compiled apart, one of them with its derivative: their last bits may differ
    assert value == pytest.approx(float(np.log(2)), abs=3e-7)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto(sides, tmp_path, loss):
    rows = [
        {"prompt": r["prompt"], "completion": r["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, r in enumerate(ROWS)
    ]
    policy = sides[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = trainer_of("KTO", policy, tmp_path, rows, loss_type=loss, desirable_weight=1.5, undesirable_weight=0.5)
    inputs = t.data_collator([t.train_dataset[i] for i in range(len(rows))])
    policy = t.accelerator.unwrap_model(t.model)
    policy.zero_grad()
    t._metrics["train"].clear()
    policy.train()
    theirs = t._compute_loss(t.model, inputs, False)
    theirs.backward()
    logged = {k: v[-1] for k, v in t._metrics["train"].items()}
    one = our_rows(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
    two = one
    if loss == "kto":
        two = our_rows(inputs["KL_input_ids"], inputs["KL_attention_mask"], inputs["KL_completion_mask"])
    width = max(one[0].shape[1], two[0].shape[1])
    fill = (0, 0, PAD_SEGMENT, 0)

    def wide(x, value):
        return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=value)

    stacked = (np.stack([wide(a, f), wide(b, f)], axis=1) for a, b, f in zip(one, two, fill, strict=True))
    labels = np.asarray(inputs["label"], np.float32)
    batch = PairBatch(*stacked, labels=labels, rows=np.ones(len(rows), np.float32))
    objective = KTO(loss=loss, good=1.5, bad=0.5)
    value, metrics, grads = ours(objective, sides, jax.tree.map(jnp.asarray, batch))
    assert value == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name, mine in metrics.items():
        if name in logged and name != "num_tokens":
            assert mine == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    same_gradients(sides[1], grads, policy)
