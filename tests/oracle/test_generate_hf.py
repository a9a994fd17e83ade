"""Generation against transformers: the same tokens greedily, the same tokens left out, a real model's story."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.generation.logits_process import (  # noqa: E402
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ftjax.generate.api import generate, stream  # noqa: E402
from ftjax.generate.decode import decode  # noqa: E402
from ftjax.generate.sampling import Sampling, SamplingArrays, keep  # noqa: E402
from ftjax.models import hf  # noqa: E402
from tests.oracle import rows, torch_llama  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, "
    "red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park"
)


def generated(theirs, ids: np.ndarray, mask: np.ndarray, n: int, eos: list[int]) -> list[list[int]]:
    """Greedy tokens of transformers, cut before the first EOS."""
    out = theirs.generate(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=n, do_sample=False,
        eos_token_id=eos or None, pad_token_id=0,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    return [row[: next((i for i, t in enumerate(row) if t in eos), len(row))] for row in out]


def test_greedy_is_transformers(tmp_path):
    theirs = torch_llama(tmp_path, max_position_embeddings=128)
    theirs.generation_config.eos_token_id = None
    model, params = hf.load(str(tmp_path))
    ids, mask = rows(model.config.vocab_size, left=True)
    prompts = [i[m > 0].astype(np.int32) for i, m in zip(ids, mask, strict=True)]
    free = generated(theirs, ids, mask, 64, [])
    assert all(len(set(row)) > 10 for row in free), "answers that repeat themselves prove nothing"
    for eos in ([], [free[0][6], free[2][20]]):
        pieces = list(decode(model, params, prompts, Sampling(), limits=[64] * 3, eos=eos, pad=0))
        ours = [[t for piece in pieces for t in piece[i]] for i in range(3)]
        assert ours == generated(theirs, ids, mask, 64, eos)
    assert len(ours[0]) <= 6


@pytest.mark.parametrize("V", [7, 1000])
@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7), dict(top_k=1), dict(top_k=50), dict(top_k=5000), dict(top_p=0.9), dict(top_p=0.05),
        dict(top_p=0.999), dict(min_p=0.1), dict(temperature=1.7, top_k=40, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)  # fmt: skip
def test_the_same_tokens_are_left_out(V, options):
    logits = (3 * np.random.default_rng(V).normal(size=(64, V))).astype(np.float32)
    makers = dict(
        temperature=TemperatureLogitsWarper, top_k=TopKLogitsWarper, top_p=TopPLogitsWarper, min_p=MinPLogitsWarper
    )
    processors = LogitsProcessorList([make(options[name]) for name, make in makers.items() if name in options])
    theirs = processors(torch.zeros(64, 1, dtype=torch.long), torch.tensor(logits)).numpy()
    ours = np.asarray(keep(jnp.asarray(logits), SamplingArrays.of(Sampling(**({"temperature": 1.0} | options)))))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    "values, top_p", [([0.0] * 4, 0.5), ([0.0] * 4, 0.75), ([0.0] * 8, 0.125), ([1.0, 0, 0, 0], 0.6)]
)
def test_ties_leave_as_many(values, top_p):
    scores = torch.tensor([values], dtype=torch.float32)
    theirs = int(torch.isfinite(TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), scores)).sum())
    ours = keep(jnp.asarray([values], jnp.float32), SamplingArrays.of(Sampling(temperature=1.0, top_p=top_p)))
    assert int(jnp.isfinite(ours).sum()) == theirs


def test_stories260k(shared):
    folder = shared / "stories260k"
    model, params = hf.load(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = "Once upon a time"
    other = "The dog said that he was hungry and wanted to eat, but"
    assert generate(model, params, tokenizer, [prompt], max_new_tokens=80) == [STORY.removeprefix(prompt)]
    assert generate(model, params, tokenizer, [other, prompt], max_new_tokens=80)[1] == STORY.removeprefix(prompt)
    stop = ("Lily's mom",)
    cut = STORY.removeprefix(prompt).partition(stop[0])[0]
    assert generate(model, params, tokenizer, [prompt], max_new_tokens=80, stop=stop) == [cut]
    pieces = list(stream(model, params, tokenizer, prompt, Sampling(80, stop=stop)))
    assert "".join(pieces) == cut and len(pieces) > 10
