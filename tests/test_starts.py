"""What a run asks before the first step: a text for its prompt, the weights that matter to its data, data with prompts."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.config import Train
from ftjax.data.tasks.local import Local
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError
from ftjax.models import hf
from ftjax.models.sources import Pretrained
from ftjax.objectives.causal_lm import CausalLM
from ftjax.peft.combined import Combine
from ftjax.peft.lora import LoRA
from ftjax.peft.prompt import Prompt
from ftjax.peft.reft import LoReFT
from ftjax.peft.sparse import Sparse
from ftjax.quant.nf4 import NF4
from tests.preferences import project, run_of, setup_of

METHOD = Sparse(rank=2, choose="fisher", fisher_batches=3, targets=("q_proj", "down_proj"), layers=(1, 2))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = project(tmp_path_factory.mktemp("fisher"))
    pairs = [json.loads(x) for x in (root / "pairs.jsonl").read_text().splitlines()]
    texts = [{"text": p["prompt"] + p["chosen"]} for p in pairs]
    (root / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    return root


def made(root, method, **parts):
    data = Local(path=str(root / "texts.jsonl"), eval_share=0.2)
    return setup_of(root, objective=CausalLM(), data=data, peft=method, **parts)


def test_the_entries_with_the_largest_squared_gradients(root):
    setup = made(root, METHOD, train=Train(steps=4, batch=16, accumulate=2))
    model, base = hf.load(str(root / "base"))

    @jax.jit
    def gradient(weights, batch):
        def loss(weights):
            log_p = jax.nn.log_softmax(model.apply(base | weights, setup.run.objective.inputs(batch)).logits)[:, :-1]
            picked = jnp.take_along_axis(log_p, batch.tokens[:, 1:, None], -1)[..., 0]
            same = batch.segments[:, 1:] == batch.segments[:, :-1]
            counted = jnp.where(same, batch.weights[:, 1:], 0.0)
            return -(picked * counted).sum() / counted.sum()

        return jax.grad(loss)(weights)

    keys = [k for k in base if k.endswith(("/q/w", "/down/w"))]
    squares = {k: np.zeros(base[k].shape, np.float32) for k in keys}
    for b in range(3):
        step = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, x.shape[-1]), setup.batches.source[b])
        found = gradient({k: base[k] for k in keys}, step)
        squares = {k: squares[k] + np.square(np.asarray(found[k])) for k in keys}
    overlay = {k: v for k, v in setup.frozen.store["overlay"].items() if v.index is not None}
    assert len(overlay) == 2
    for key, delta in overlay.items():
        whole = squares[next(k for k in keys if k.split("]")[1] == key.split("]")[1])]
        for i, layer in enumerate((1, 2)):
            kept = np.zeros(whole.shape[1:], bool)
            kept[tuple(np.asarray(delta.index[i]))] = True
            assert kept.sum() == 2 * sum(kept.shape)
            assert whole[layer][kept].min() >= 0.999 * whole[layer][~kept].max()


def test_another_draw_of_batches_changes_the_choice_and_the_same_does_not(root):
    first, again, other = (
        jax.device_get([d.index for d in made(root, METHOD, seed=s).frozen.store["overlay"].values()])
        for s in (0, 0, 5)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_what_is_refused(root):
    with pytest.raises(ConfigError, match=r"is quantized and has no gradient; magnitude and random need none"):
        made(root, METHOD, model=Pretrained(path=str(root / "base"), quantize=NF4()))
    model, base = hf.load(str(root / "base"))
    with pytest.raises(ConfigError, match="needs gradients of a run's data"):
        METHOD.init(jax.random.key(0), model.table, base)
    with pytest.raises(ConfigError, match="peft=loreft edits hidden values of prompts, and the data have none"):
        made(root, LoReFT())
    with pytest.raises(ConfigError, match="peft=loreft edits hidden values"):
        made(root, Combine(methods=(LoReFT(), LoRA(rank=2))))


def test_a_prompt_begins_as_a_text(root):
    text = "red green blue"
    tokenizer = load_tokenizer(root / "base")
    ids = tokenizer(text)["input_ids"]
    _, base = hf.load(str(root / "base"))
    for tokens in (len(ids) - 1, 2 * len(ids) + 1):
        setup = made(root, Prompt(tokens=tokens, start="text", text=text))
        found = jax.tree.leaves(setup.state.trainable["overlay"])[0]
        np.testing.assert_array_equal(found, np.asarray(base["embed/w"])[np.resize(ids, tokens)])
    with pytest.raises(ConfigError, match="needs token ids of peft.text"):
        Prompt(start="text", text=text).init(jax.random.key(0), setup.model.table, base)


@pytest.mark.parametrize("settings", [{"start": "text"}, {"text": "red"}])
def test_text_and_start_belong_together(root, settings):
    run = run_of(root, peft=Prompt(**settings))
    assert any("a text belongs to start=text" in line for line in run.peft.check(run))
