"""A teacher of whom k tokens are known, against torch: loss and every gradient from the two models' logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch.nn.functional as F  # noqa: E402, N812

from ftjax.data.recorded import RecordedBatch  # noqa: E402
from ftjax.models.base import Numerics  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.objectives.causal_lm import shift  # noqa: E402
from ftjax.objectives.distill import DistillCausalLM  # noqa: E402
from tests import tiny  # noqa: E402
from tests.oracle.test_distill import Side, mean, unpacked  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    torch.set_num_threads(1)
    root, kind = tmp_path_factory.mktemp("recorded"), transformers.AutoModelForCausalLM
    small = tiny.llama(Numerics(loss_chunk=12), num_hidden_layers=2)
    large = tiny.llama(Numerics(loss_chunk=20), hidden_size=48, num_hidden_layers=1)
    return Side(small, root / "student", kind, 0), Side(large, root / "teacher", kind, 1)


def by_hand(known, z, k, T):  # noqa: N803
    """The definition on probabilities in float64: cut the teacher's distribution at T to its k likeliest, renormalise."""
    p, q = (F.softmax(x.double() / T, -1) for x in (known, z))
    cut = torch.zeros_like(p).scatter(-1, p.topk(k, -1).indices, 1.0)
    t = p * cut / (p * cut).sum(-1, keepdim=True)
    return T**2 * torch.where(cut > 0, t * (t.clamp_min(1e-300).log() - q.log()), 0.0).sum(-1)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.6, 2.5), (1.0, 1.0)])
def test_loss_and_gradients(sides, alpha, temperature):
    student, teacher = sides
    objective = DistillCausalLM(top_k=8, alpha=alpha, temperature=temperature)
    batch = unpacked()
    ask = jax.jit(lambda w, b: objective.record(teacher.model.apply(w, objective.inputs(b))))
    found = ask(teacher.params, batch)
    given = RecordedBatch(batch.tokens, batch.positions, batch.segments, batch.weights, **found)
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}
    coef, weigh = objective.coefficients(), objective.weights(given)

    def loss(p):
        policy = lambda x, m, **o: (student.model.apply(p, x, **o), m)  # noqa: E731
        out = objective(policy, given, reference=None, mutable={}, hyper=hyper)
        return sum(coef[k] * v / weigh[k] for k, v in out.sums.items())

    value, grads = jax.jit(jax.value_and_grad(loss))(student.params)
    targets, weights = (torch.tensor(np.asarray(x)) for x in shift(batch))
    inputs = {"input_ids": torch.tensor(np.asarray(batch.tokens)).long()}
    with torch.no_grad():
        known = teacher.torch(**inputs).logits
    best = known.log_softmax(-1).topk(8, -1)
    np.testing.assert_allclose(found["top_log_p"], best.values, rtol=1e-4, atol=1e-5)
    assert (np.asarray(found["top_ids"]) == best.indices.numpy()).mean() > 0.99  # but for ties within rounding
    student.torch.zero_grad()
    z = student.torch(**inputs).logits
    hard = F.cross_entropy(z.transpose(1, 2), targets.long(), reduction="none")
    soft = by_hand(known, z, 8, temperature)
    want = (1 - alpha) * mean(hard, weights) + alpha * mean(soft, weights)
    want.backward()
    assert float(value) == pytest.approx(float(want.detach()), rel=1e-5)
    theirs = {n: p.grad for n, p in student.torch.named_parameters()}
    for name, g in to_file_tensors(student.model.table, grads):
        expected = theirs.pop(name).numpy()
        assert np.abs(g - expected).max() <= 1e-3 * np.abs(expected).max() + 1e-7, name
    assert not theirs
