"""Attention maps against transformers' eager attention: scores, probabilities, both terms, every gradient of the student.

torch's scores of BERT are made from what its query and key projections return, taken by hooks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax.headspec import HeadSpec, label_names  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.objectives.distill import DistillCausalLM, DistillClassification  # noqa: E402
from tests import tiny, tinymodels  # noqa: E402
from tests.oracle.test_distill import Side  # noqa: E402
from tests.oracle.test_hints import rows_of_one  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def torch_inputs(batch):
    real = torch.tensor(np.asarray(batch.segments) >= 0)
    return {"input_ids": torch.tensor(np.asarray(batch.tokens)).long(), "attention_mask": real.long()}, real


def scores_of(model, inputs):
    """q k^T / sqrt(H) of every layer of a BERT, [L, B, N, T, T], before any mask."""
    taken = []
    hooks = [
        getattr(layer.attention.self, name).register_forward_hook(lambda _m, _x, y: taken.append(y))
        for layer in model.bert.encoder.layer
        for name in ("query", "key")
    ]
    model(**inputs)
    [hook.remove() for hook in hooks]
    n = model.config.num_attention_heads
    heads = [x.unflatten(-1, (n, -1)).transpose(1, 2) for x in taken]
    return torch.stack(
        [q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 for q, k in zip(heads[::2], heads[1::2], strict=True)]
    )


def maps_of(model, inputs):
    return torch.stack(model(**inputs, output_attentions=True).attentions)


def tiny_bert(mine, known, real):
    """eq. 7 over the real keys of each real query."""
    both = real[:, None, :] & real[:, :, None]
    each = ((mine - known) ** 2 * both[:, None]).sum(-1) / real.sum(-1)[:, None, None]
    return each.mean(1)[real].mean()


def mini_lm(mine, known, real):
    """KL of the distributions; a key that nobody sees has no share."""
    each = torch.where(known > 0, known * (known.clamp_min(1e-30).log() - mine.clamp_min(1e-30).log()), 0.0).sum(-1)
    return each.mean(1)[real].mean()


def check(objective, sides, batch, pairs, distance, seen):
    """The term alone."""
    student, teacher = sides
    assert objective.learned(student.model, teacher.model, jax.random.key(3)) == {}
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}
    reference = functools.partial(teacher.model.apply, teacher.params)

    def loss(p):
        policy = lambda x, m, **o: (student.model.apply(p, x, **o), m)  # noqa: E731
        out = objective(policy, batch, reference=reference, mutable={}, hyper=hyper)
        assert set(out.sums) == set(objective.coefficients()) == set(objective.weights(batch))
        return out.sums["attention"] / objective.weights(batch)["attention"]

    value, grads = jax.jit(jax.value_and_grad(loss))(student.params)
    inputs, real = torch_inputs(batch)
    with torch.no_grad():
        known = seen(teacher.torch, inputs)
    student.torch.zero_grad()
    mine = seen(student.torch, inputs)
    want = torch.stack([distance(mine[s], known[t], real) for s, t in pairs]).mean()
    want.backward()
    assert float(value) == pytest.approx(float(want.detach()), rel=1e-5)
    theirs = {n: p.grad for n, p in student.torch.named_parameters()}
    compared = 0
    for name, g in to_file_tensors(student.model.table, grads):
        expected = np.zeros_like(g) if theirs[name] is None else theirs[name].numpy()
        assert np.abs(g - expected).max() <= 1e-3 * np.abs(expected).max() + 1e-7, name
        compared += np.abs(expected).max() > 1e-6
    assert compared > 10


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    torch.set_num_threads(1)
    root, kind = tmp_path_factory.mktemp("berts"), transformers.AutoModelForSequenceClassification
    build, head = tinymodels.known()["bert"], HeadSpec("sequence_classification", label_names(3))
    large = build(None, head)
    shape = type(large.config).from_hf(large.config.to_hf() | {"num_hidden_layers": 2})
    small = type(large)(shape, large.numerics, head)
    return Side(small, root / "s", kind, 0), Side(large, root / "t", kind, 1)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    torch.set_num_threads(1)
    root, kind = tmp_path_factory.mktemp("llamas"), transformers.AutoModelForCausalLM
    large = tiny.llama(hidden_size=48, num_hidden_layers=3)
    return Side(tiny.llama(num_hidden_layers=2), root / "s", kind, 0), Side(large, root / "t", kind, 1)


def test_maps_are_those_of_transformers(berts, llamas):
    labelled = jax.tree.map(jnp.asarray, tiny.labelled(4))
    objectives = DistillClassification(), DistillCausalLM()
    for sides, objective, batch in zip(
        (berts, llamas), objectives, (labelled, rows_of_one(tiny.batch(3))), strict=True
    ):
        given, real = torch_inputs(batch)
        for side in sides:
            ours = jax.jit(functools.partial(side.model.apply, attentions=True))(side.params, objective.inputs(batch))
            with torch.no_grad():
                want = maps_of(side.torch, given)
            got = np.moveaxis(np.asarray(jax.nn.softmax(ours.attentions, -1)), 3, 2)[:, real.numpy()]
            np.testing.assert_allclose(got, want.transpose(2, 3)[:, real], atol=2e-6)
            assert len(want) == side.model.config.num_hidden_layers


def test_scores_of_bert(berts):
    layers = berts[1].model.config.num_hidden_layers
    pairs = [(0, -(-layers // 2) - 1), (1, layers - 1)]
    batch = jax.tree.map(jnp.asarray, tiny.labelled(6))
    check(DistillClassification(attention=0.5), berts, batch, pairs, tiny_bert, scores_of)


def test_distributions_of_berts_last_layers(berts):
    pairs = ((1, berts[1].model.config.num_hidden_layers - 1),)
    objective = DistillClassification(attention=1.0, attention_distance="kl", attention_layers=pairs)
    check(objective, berts, jax.tree.map(jnp.asarray, tiny.labelled(6)), pairs, mini_lm, maps_of)


def test_distributions_of_llama(llamas):
    pairs = ((1, 0), (0, 2), (1, 2))  # in any order, a layer more than once
    objective = DistillCausalLM(attention=1.0, attention_distance="kl", attention_layers=pairs)
    check(objective, llamas, rows_of_one(tiny.batch(4)), pairs, mini_lm, maps_of)
