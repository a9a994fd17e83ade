"""Hidden values as a target, against torch: loss, every gradient of the student and that of the projection.

torch's hidden values are what its layers return, taken by hooks, so that no norm after the last layer is in them.
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
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.objectives.distill import DistillCausalLM, DistillClassification  # noqa: E402
from ftjax.objectives.hints import PROJECTION  # noqa: E402
from ftjax.ops import PAD_SEGMENT  # noqa: E402
from tests import tiny, tinymodels  # noqa: E402
from tests.oracle.test_distill import Side  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def rows_of_one(batch):
    """Each row one example from column 0, as the torch models see it."""
    at = np.broadcast_to(np.arange(batch.tokens.shape[1], dtype=np.int32), batch.tokens.shape)
    segments = np.zeros_like(batch.tokens)
    segments[0, -5:] = PAD_SEGMENT
    return jax.tree.map(jnp.asarray, batch.replace(segments=segments, positions=at))


def layers_of(model):
    return {"llama": "model.layers", "bert": "bert.encoder.layer", "distilbert": "distilbert.transformer.layer"}[
        model.config.model_type
    ]


def seen(model, inputs):
    """What every layer returns, [L, B, T, D]."""
    out = []
    take = lambda _m, _x, y: out.append(y[0] if isinstance(y, tuple) else y)  # noqa: E731
    hooks = [layer.register_forward_hook(take) for layer in model.get_submodule(layers_of(model))]
    model(**inputs)
    [hook.remove() for hook in hooks]
    return torch.stack(out)


def check(objective, student, teacher, batch, pairs, distance):
    """The hidden term alone."""
    own = objective.learned(student.model, teacher.model, jax.random.key(3))
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}
    reference = functools.partial(teacher.model.apply, teacher.params)

    def loss(p, own):
        policy = lambda x, m, **o: (student.model.apply(p, x, **o), m)  # noqa: E731
        out = objective(policy, batch, reference=reference, mutable={}, hyper=hyper | own)
        assert set(out.sums) == set(objective.coefficients()) == set(objective.weights(batch))
        return out.sums["hidden"] / objective.weights(batch)["hidden"]

    value, (grads, own_grads) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student.params, own)
    real = torch.tensor(np.asarray(batch.segments) >= 0)
    inputs = {"input_ids": torch.tensor(np.asarray(batch.tokens)).long(), "attention_mask": real.long()}
    with torch.no_grad():
        known = seen(teacher.torch, inputs)
    mine = seen(student.torch, inputs)
    W = torch.tensor(np.asarray(own[PROJECTION]), requires_grad=True) if own else None
    want = torch.stack([distance(mine[s] @ W if own else mine[s], known[t])[real].mean() for s, t in pairs]).mean()
    student.torch.zero_grad()
    want.backward()
    assert float(value) == pytest.approx(float(want.detach()), rel=1e-5)
    theirs = {n: p.grad for n, p in student.torch.named_parameters()}
    compared = 0
    for name, g in to_file_tensors(student.model.table, grads):
        if theirs[name] is None:  # behind the last layer that is compared
            assert np.abs(g).max() == 0
            continue
        expected = theirs[name].numpy()
        assert np.abs(g - expected).max() <= 1e-3 * np.abs(expected).max() + 1e-7, name
        compared += 1
    assert compared > 10
    if own:
        np.testing.assert_allclose(own_grads[PROJECTION], W.grad, rtol=1e-3, atol=1e-6)
    return own


def test_llama_through_a_projection(tmp_path):
    torch.set_num_threads(1)
    kind = transformers.AutoModelForCausalLM
    small = Side(tiny.llama(num_hidden_layers=2), tmp_path / "s", kind, 0)
    large = Side(tiny.llama(hidden_size=48, num_hidden_layers=3), tmp_path / "t", kind, 1)
    square = lambda a, b: ((a - b) ** 2).mean(-1)  # noqa: E731
    objective = DistillCausalLM(hidden=0.5)
    assert check(objective, small, large, rows_of_one(tiny.batch(4)), [(0, 1), (1, 2)], square)


def test_classifiers_by_cosine(tmp_path):
    torch.set_num_threads(1)
    kind = transformers.AutoModelForSequenceClassification
    head, build = HeadSpec("sequence_classification", label_names(3)), tinymodels.known()
    small = Side(build["distilbert"](None, head), tmp_path / "s", kind, 0)
    large = Side(build["bert"](None, head), tmp_path / "t", kind, 1)
    apart = lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1)  # noqa: E731
    pairs = ((0, 2), (1, 0))
    objective = DistillClassification(hidden=1.0, hidden_distance="cosine", hidden_layers=pairs)
    check(objective, small, large, jax.tree.map(jnp.asarray, tiny.labelled(6)), pairs, apart)
