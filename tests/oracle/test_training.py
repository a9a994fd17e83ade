"""Training against PEFT + torch: the same weights, adapters, batches, AdamW, schedule and clipping give the same run.

20 steps of float32 on padded rows with masked prompts; losses, gradient norms, rates, and the weights at the end.
"""

from __future__ import annotations

import dataclasses as dc

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from ftjax import tree  # noqa: E402
from ftjax.config import Optim  # noqa: E402
from ftjax.data.batches import Example, build_rows  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.params import join  # noqa: E402
from ftjax.peft.full import Full  # noqa: E402
from ftjax.peft.interop import save_adapter  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from tests.oracle import relative, torch_llama  # noqa: E402
from tests.tiny import tiny  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

STEPS, ROWS, LENGTH, WARMUP = 20, 6, 16, 4
# A clip that is active and a decay that is felt: without either the run would look the same if they were wrong.
OPTIM = Optim(lr=5e-3, schedule="linear", warmup=WARMUP, weight_decay=0.1, clip=0.5, b2=0.99)
METHODS = {
    "lora": LoRA(rank=4, alpha=8.0),
    "lora, some layers, rslora": LoRA(rank=2, alpha=4.0, targets=("q_proj", "v_proj"), layers=(0, 2), rslora=True),
    "full": Full(),
}


@dc.dataclass
class Run:
    """What a training run leaves."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    weights: dict[str, np.ndarray]
    start: dict[str, np.ndarray] = dc.field(default_factory=dict)


def examples(vocab: int) -> list[list[Example]]:
    """Batches of texts of unequal length whose first tokens, the prompt, carry no loss."""
    rng = np.random.default_rng(5)

    def text() -> Example:
        n = int(rng.integers(5, LENGTH + 1))
        weights = np.ones(n, np.float32)
        weights[: rng.integers(1, 4)] = 0
        return Example(rng.integers(3, vocab, n).astype(np.int32), weights)

    return [[text() for _ in range(ROWS)] for _ in range(STEPS)]


def ours(method, folder, adapter, *, micro: int) -> Run:
    """The run here; the adapter's values at the start are left in the folder `adapter`."""
    model, base = hf.load(str(folder))
    t = tiny(method, model=model, base=base, optim=OPTIM, steps=STEPS)
    if t.overlay:
        save_adapter(adapter, t.overlay, model.table, method, base_path=str(folder))
    step, state, run = jax.jit(t.program.train, donate_argnums=0), t.state, Run([], [], [], {})
    for batch in examples(model.config.vocab_size):
        rows = build_rows([[e] for e in batch], LENGTH)
        rows = jax.tree.map(lambda x: x.reshape(micro, ROWS // micro, LENGTH), rows)
        state, metrics = step(state, t.frozen, rows)
        for mine, name in ((run.losses, "loss"), (run.norms, "grad_norm"), (run.rates, "lr")):
            mine.append(float(metrics[name]))
    store = tree.combine(state.trainable, state.const, t.frozen.store)
    if store["overlay"]:
        save_adapter(adapter / "trained", store["overlay"], model.table, method, base_path=str(folder))
        from safetensors.numpy import load_file

        run.weights = load_file(adapter / "trained" / "adapter_model.safetensors")
    else:
        run.weights = dict(to_file_tensors(model.table, join(store["base"])))
    return run


def theirs(folder, adapter) -> Run:
    """The run of torch, written as a researcher would write it."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if (adapter / "adapter_config.json").exists():
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    plain = [p for n, p in trained.items() if "norm" in n or n.endswith(".bias")]
    decayed = [p for n, p in trained.items() if not ("norm" in n or n.endswith(".bias"))]
    groups = [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=OPTIM.lr, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps)
    schedule = transformers.get_scheduler("linear", adam, num_warmup_steps=WARMUP, num_training_steps=STEPS)

    def weights() -> dict[str, np.ndarray]:
        return {n.replace(".default", ""): p.detach().numpy().copy() for n, p in trained.items()}

    run = Run([], [], [], {}, weights())
    for batch in examples(model.config.vocab_size):
        ids, mask, labels = (np.zeros((ROWS, LENGTH), np.int64) for _ in range(3))
        for i, e in enumerate(batch):
            ids[i, : len(e)], mask[i, : len(e)] = e.input_ids, 1
            labels[i, : len(e)] = np.where(e.weights > 0, e.input_ids, -100)
        labels = torch.tensor(np.where(mask > 0, labels, -100))
        loss = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=labels).loss
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), OPTIM.clip)
        run.losses.append(loss.item())
        run.norms.append(norm.item())
        run.rates.append(schedule.get_last_lr()[0])
        adam.step()
        schedule.step()
    run.weights = weights()
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with biases, so that all kinds of parameters are there."""
    path = tmp_path_factory.mktemp("base")
    torch_llama(path, attention_bias=True, mlp_bias=True)
    return path


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_run(name, micro, folder, tmp_path, record_property):
    a = ours(METHODS[name], folder, tmp_path, micro=micro)
    b = theirs(folder, tmp_path)
    gaps = {
        "losses": max(abs(x - y) / y for x, y in zip(a.losses, b.losses, strict=True)),
        "norms": max(abs(x - y) / y for x, y in zip(a.norms, b.norms, strict=True)),
        "weights": max(relative(a.weights[k], b.weights[k]) for k in b.weights),
    }
    for key, gap in gaps.items():
        record_property(key, gap)
    np.testing.assert_allclose(a.rates, b.rates, rtol=1e-6)
    assert a.weights.keys() == b.weights.keys()
    assert min(relative(b.start[k], b.weights[k]) for k in b.weights) > 0.01, "too little happens to compare"
    assert max(b.norms) > OPTIM.clip, "nothing is clipped"
    assert gaps["losses"] < 1e-4 and gaps["norms"] < 1e-3 and gaps["weights"] < 1e-3, gaps


def test_without_clipping_the_runs_differ(folder, tmp_path):
    """The comparison above would notice a clip that does nothing."""
    global OPTIM
    before = OPTIM
    a = ours(METHODS["lora"], folder, tmp_path, micro=1)
    try:
        OPTIM = before.model_copy(update={"clip": 1e9})
        b = theirs(folder, tmp_path)
    finally:
        OPTIM = before
    assert max(relative(a.weights[k], b.weights[k]) for k in b.weights) > 1e-3
