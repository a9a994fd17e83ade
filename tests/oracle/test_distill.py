"""Distillation against torch: loss and every gradient, for each kind of head and each divergence; TRL's GKD for its own.

Student and teacher differ in width, depth and, for encoders, in family; both are saved as folders and opened by transformers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch.nn.functional as F  # noqa: E402, N812

from ftjax.headspec import HeadSpec, label_names  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.base import Numerics  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.models.thinned import thin  # noqa: E402
from ftjax.objectives.causal_lm import shift  # noqa: E402
from ftjax.objectives.distill import DistillCausalLM, DistillClassification, DistillMaskedLM  # noqa: E402
from tests import tiny, tinymodels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES = label_names(3)
CHUNK = 12  # tokens: several chunks and a rest
SETTINGS = [
    {"divergence": "forward_kl", "alpha": 0.5, "temperature": 2.0},
    {"divergence": "reverse_kl", "alpha": 0.3, "temperature": 1.5},
    {"divergence": "jsd", "alpha": 0.7, "temperature": 3.0, "beta": 0.2},
    {"divergence": "jsd", "alpha": 1.0, "temperature": 1.0, "beta": 0.5},
]
IDS = ["forward", "reverse", "jsd", "jsd-alone"]


class Side:
    """One model of both kinds with the same weights."""

    def __init__(self, model, folder, kind, seed):
        self.model, self.params = model, tiny.weights(model, seed=seed)
        hf.save(model, self.params, folder)
        self.torch = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    torch.set_num_threads(1)
    root, kind = tmp_path_factory.mktemp("llamas"), transformers.AutoModelForCausalLM
    small = tiny.llama(Numerics(loss_chunk=CHUNK), num_hidden_layers=2)
    large = tiny.llama(hidden_size=48, num_hidden_layers=3)
    return Side(small, root / "student", kind, 0), Side(large, root / "teacher", kind, 1)


def encoders(root, head, kind):
    torch.set_num_threads(1)
    build = tinymodels.known()
    small, large = build["distilbert"](Numerics(loss_chunk=CHUNK), head), build["bert"](None, head)
    return Side(small, root / "student", kind, 0), Side(large, root / "teacher", kind, 1)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    kind = transformers.AutoModelForMaskedLM
    return encoders(tmp_path_factory.mktemp("masked"), HeadSpec("masked_lm"), kind)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    kind = transformers.AutoModelForSequenceClassification
    return encoders(tmp_path_factory.mktemp("classes"), HeadSpec("sequence_classification", CLASSES), kind)


def ours(objective, student, teacher, batch):
    """(loss, gradients) as the step divides and weighs the terms."""
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}
    weights, coef = objective.weights(batch), objective.coefficients()
    reference = functools.partial(teacher.model.apply, teacher.params)

    def loss(p):
        policy = lambda x, m: (student.model.apply(p, x), m)  # noqa: E731
        out = objective(policy, batch, reference=reference, mutable={}, hyper=hyper)
        assert set(out.sums) == set(weights) == set(coef)
        return sum(coef[k] * v / weights[k] for k, v in out.sums.items())

    return jax.jit(jax.value_and_grad(loss))(student.params)


def divergence(objective, known, z):
    """T^2 D by the definitions in the papers, on probabilities, in float64."""
    p, q = (F.softmax(x.double() / objective.temperature, -1) for x in (known, z))
    if objective.divergence == "reverse_kl":
        d = (q * (q / p).log()).sum(-1)
    elif objective.divergence == "forward_kl":
        d = (p * (p / q).log()).sum(-1)
    else:
        b = objective.beta
        m = b * p + (1 - b) * q
        d = b * (p * (p / m).log()).sum(-1) + (1 - b) * (q * (q / m).log()).sum(-1)
    return objective.temperature**2 * d


def check(objective, sides, batch, expected):
    """`expected`: torch's (student logits, teacher logits) -> loss."""
    student, teacher = sides
    value, grads = ours(objective, student, teacher, jax.tree.map(jnp.asarray, batch))
    student.torch.zero_grad()
    inputs = {
        "input_ids": torch.tensor(np.asarray(batch.tokens)).long(),
        "attention_mask": torch.tensor(np.asarray(batch.segments) >= 0).long(),
    }
    with torch.no_grad():
        known = teacher.torch(**inputs).logits
    loss = expected(student.torch(**inputs).logits, known)
    loss.backward()
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5)
    theirs = {n: p.grad for n, p in student.torch.named_parameters()}
    compared = 0
    for name, g in to_file_tensors(student.model.table, grads):
        want = theirs[name].numpy()
        assert np.abs(g - want).max() <= 1e-3 * np.abs(want).max() + 1e-7, name
        compared += 1
    assert compared > 15


def unpacked():
    """Rows of one example each, of which some prompts are not trained."""
    batch = tiny.batch(4)
    rows = np.asarray(batch.segments)
    at = np.broadcast_to(np.arange(tiny.LENGTH, dtype=np.int32), rows.shape)
    return batch.replace(segments=jnp.zeros_like(batch.segments), positions=jnp.asarray(at))


def mean(each, weights):
    return (each * weights).sum() / weights.sum()


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_next_tokens(llamas, settings):
    objective, batch = DistillCausalLM(**settings), unpacked()
    targets, weights = (torch.tensor(np.asarray(x)) for x in shift(batch))

    def expected(z, known):
        hard = F.cross_entropy(z.transpose(1, 2), targets.long(), reduction="none")
        soft = divergence(objective, known, z)
        return (1 - objective.alpha) * mean(hard, weights) + objective.alpha * mean(soft, weights)

    check(objective, llamas, batch, expected)


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (0.3, "jsd"), (1.0, "reverse_kl")])
def test_next_tokens_as_trl_distills_them(llamas, beta, name):
    """TRL has no T^2, no labels' term, and the two divergences at the ends of beta."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    objective = DistillCausalLM(alpha=1.0, temperature=1.7, divergence=name, beta=beta if name == "jsd" else 0.5)
    batch = unpacked()
    labels = torch.where(torch.tensor(np.asarray(shift(batch)[1])) > 0, 1, -100)

    def expected(z, known):
        return 1.7**2 * gkd.GKDTrainer.generalized_jsd_loss(z, known, labels=labels, beta=beta, temperature=1.7)

    check(objective, llamas, batch, expected)


@pytest.mark.parametrize("settings", SETTINGS[1:3], ids=IDS[1:3])
def test_hidden_tokens(masked, settings):
    objective, batch = DistillMaskedLM(share=0.5, **settings), tiny.masked(4)
    at = np.broadcast_to(np.arange(tiny.LENGTH, dtype=np.int32), batch.tokens.shape)
    batch = batch.replace(segments=np.zeros_like(batch.tokens), positions=at)
    targets, weights = torch.tensor(batch.targets).long(), torch.tensor(batch.weights)

    def expected(z, known):
        hard = F.cross_entropy(z.transpose(1, 2), targets, reduction="none")
        soft = divergence(objective, known, z)
        return (1 - objective.alpha) * mean(hard, weights) + objective.alpha * mean(soft, weights)

    check(objective, masked, batch, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_classes(classifiers, settings):
    balance = (1.0, 2.0, 0.5)
    objective = DistillClassification(class_weights=balance, label_smoothing=0.1, **settings)
    batch = tiny.labelled(6)
    labels, rows = torch.tensor(batch.labels).long(), torch.tensor(batch.weights)

    def expected(z, known):
        by_class = torch.tensor(balance)[labels] * rows
        uniform = -(F.log_softmax(z, -1)).mean(-1)
        each = 0.9 * F.cross_entropy(z, labels, reduction="none") + 0.1 * uniform
        soft = divergence(objective, known, z)
        return (1 - objective.alpha) * mean(each, by_class) + objective.alpha * mean(soft, rows)

    check(objective, classifiers, batch, expected)


@pytest.mark.parametrize("settings", SETTINGS[1:3], ids=IDS[1:3])
def test_several_classes_of_a_text(classifiers, settings):
    objective, batch = DistillClassification(**settings), tiny.labelled(6)
    labels = np.random.default_rng(1).integers(0, 2, (6, 3)).astype(np.float32)
    batch = batch.replace(labels=labels)
    rows = torch.tensor(batch.weights)

    def expected(z, known):
        hard = F.binary_cross_entropy_with_logits(z, torch.tensor(labels), reduction="none").mean(-1)
        both = (torch.stack([x, torch.zeros_like(x)], -1) for x in (known, z))
        soft = divergence(objective, *both).mean(-1)
        return (1 - objective.alpha) * mean(hard, rows) + objective.alpha * mean(soft, rows)

    check(objective, classifiers, batch, expected)


@pytest.mark.parametrize("kept", [(), (1, 2, 3)], ids=["every-second", "chosen"])
def test_some_layers_of_a_model_are_torchs_without_the_others(tmp_path, kept):
    torch.set_num_threads(1)
    build = tinymodels.known()["bert"]
    side = Side(build(None, HeadSpec("masked_lm")), tmp_path, transformers.AutoModelForMaskedLM, 3)
    small, params = thin(side.model, side.params, kept)
    layers = side.torch.bert.encoder.layer
    side.torch.bert.encoder.layer = torch.nn.ModuleList(layers[i] for i in kept or (0, 2))
    ids = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 9))
    with torch.no_grad():
        want = side.torch(torch.tensor(ids)).logits.numpy()
    got = np.asarray(small.apply(params, {"input_ids": jnp.asarray(ids, jnp.int32)}).logits)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
