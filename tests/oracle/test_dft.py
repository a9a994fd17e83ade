"""Dynamic fine-tuning against torch: TRL's loss, -p.detach() log p over the trained tokens, and every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax.models import hf  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.objectives.causal_lm import shift  # noqa: E402
from ftjax.objectives.dft import DFT  # noqa: E402
from tests import tiny  # noqa: E402
from tests.oracle import torch_llama  # noqa: E402


def test_loss_and_gradients(tmp_path):
    theirs = torch_llama(tmp_path)
    model, params = hf.load(str(tmp_path))
    batch = tiny.labelled(5)
    ids, real = np.asarray(batch.tokens), np.asarray(batch.segments) == 0
    weights = (real & (np.arange(ids.shape[1]) >= 3)).astype(np.float32)
    given = tiny.TokenBatch(*(jnp.asarray(x) for x in (ids, batch.positions, batch.segments, weights)))

    logits = theirs(
        input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(real.astype(np.int64))
    ).logits
    logs = logits[:, :-1].log_softmax(-1).gather(-1, torch.tensor(ids[:, 1:, None], dtype=torch.long))[..., 0]
    trained = torch.tensor(weights[:, 1:])
    loss = (-logs.exp().detach() * logs * trained).sum() / trained.sum()
    loss.backward()

    def ours(p):
        out = DFT()(lambda x, m: (model.apply(p, x), m), given, reference=None, mutable={}, hyper={})
        return out.sums["nll"] / shift(given)[1].sum()

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5)
    named = dict(theirs.named_parameters())
    noise = 1e-6 * max(float(p.grad.abs().max()) for p in named.values())
    for name, g in to_file_tensors(model.table, grads):
        want = named[name].grad.numpy()
        assert np.abs(g - want).max() <= 1e-3 * np.abs(want).max() + noise, name


def test_no_smoothing():
    assert not list(DFT().check(None))
    assert "dft weighs tokens" in next(DFT(label_smoothing=0.1).check(None))
