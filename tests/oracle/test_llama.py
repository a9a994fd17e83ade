"""Llama against transformers: logits, loss, every gradient, round trips, bfloat16, packing, shards, a real model."""

from __future__ import annotations

import dataclasses as dc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax.data.batches import Example, build_rows  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.base import Numerics  # noqa: E402
from ftjax.objectives.causal_lm import CausalLM  # noqa: E402
from tests.oracle import apart, named, our_logits, relative, rows, torch_llama, torch_logits  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "gqa": dict(),
    "mqa, tied, biased attention, wide heads": dict(
        hidden_size=36, num_attention_heads=6, num_key_value_heads=1, head_dim=10, attention_bias=True,
        tie_word_embeddings=True, vocab_size=131,
    ),
    "mha, biased mlp, llama3 rope": dict(num_key_value_heads=4, mlp_bias=True, rope_parameters=LLAMA3),
    "gqa 8:2, all biases, linear rope": dict(
        num_attention_heads=8, head_dim=6, attention_bias=True, mlp_bias=True, vocab_size=53, num_hidden_layers=2,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ),
    "one layer, tied, llama3 rope, wide heads": dict(
        num_hidden_layers=1, head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3, rms_norm_eps=1e-3,
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS, scope="module")
def pair(request, tmp_path_factory):
    """(torch model, its folder) for each odd configuration."""
    folder = tmp_path_factory.mktemp("llama")
    return torch_llama(folder, **CONFIGS[request.param]), folder


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_logits(pair, left, record_property):
    theirs, folder = pair
    model, params = hf.load(str(folder))
    ids, mask = rows(model.config.vocab_size, left=left)
    expected = torch_logits(theirs, ids, mask)
    gap = apart(our_logits(model, params, ids, mask), expected, mask)
    record_property("max_abs", gap)
    assert np.abs(expected).max() > 1, "the test would pass for any model whose logits are near 0"
    assert gap < 1e-4


def test_loss_and_every_gradient(pair, record_property):
    theirs, folder = pair
    model, params = hf.load(str(folder))
    ids, mask = rows(model.config.vocab_size)
    labels = np.where(mask > 0, ids, -100)
    labels[:, :4] = -100  # a prompt

    theirs.zero_grad()
    out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels))
    out.loss.backward()

    examples = [
        Example(i[m > 0], (w[m > 0] >= 0).astype(np.float32)) for i, m, w in zip(ids, mask, labels, strict=True)
    ]
    batch = build_rows([[e] for e in examples], ids.shape[1])
    objective = CausalLM()

    def loss(p):
        total = objective(lambda x, m: (model.apply(p, x), m), batch, reference=None, mutable={}, hyper={})
        return total.sums["nll"] / objective.weights(batch)["nll"]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) - out.loss.item()) < 1e-5 * abs(out.loss.item())
    ours = dict(named(model.table, grads))
    want = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert set(ours) == set(want)
    gaps = {name: relative(ours[name], want[name]) for name in want}
    record_property("largest_relative", max(gaps.values()))
    assert max(gaps.values()) < 1e-3, {k: v for k, v in gaps.items() if v >= 1e-3}


def test_saved_and_reopened_by_transformers(pair, tmp_path):
    theirs, folder = pair
    model, params = hf.load(str(folder))
    hf.save(model, params, tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    ids, mask = rows(model.config.vocab_size)
    np.testing.assert_array_equal(torch_logits(again.eval(), ids, mask), torch_logits(theirs, ids, mask))
    back, _ = hf.load(str(tmp_path))
    assert back == model


def test_bf16_is_as_near_to_fp32_as_torchs(pair, tmp_path):
    theirs, folder = pair
    ids, mask = rows(theirs.config.vocab_size)
    exact = torch_logits(theirs, ids, mask)
    theirs16 = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    model, params = hf.load(str(folder), dtype="bfloat16")
    rms = lambda x: float(np.sqrt(np.mean(((x - exact)[mask > 0]) ** 2)))  # noqa: E731
    ours, torchs = rms(our_logits(model, params, ids, mask)), rms(torch_logits(theirs16, ids, mask))
    assert 0 < ours < 1.25 * torchs, (ours, torchs)


def test_scan_equals_unroll(pair):
    _, folder = pair
    model, params = hf.load(str(folder))
    unrolled = dc.replace(model, numerics=Numerics(layers="unroll"))
    ids, mask = rows(model.config.vocab_size)
    assert apart(our_logits(model, params, ids, mask), our_logits(unrolled, params, ids, mask)) < 1e-5


def test_packed_rows_equal_separate_rows(pair):
    theirs, folder = pair
    model, params = hf.load(str(folder))
    ids, mask = rows(model.config.vocab_size)
    texts = [i[m > 0].astype(np.int32) for i, m in zip(ids, mask, strict=True)]
    packed = build_rows([[Example(t, np.ones(len(t), np.float32)) for t in texts]], sum(map(len, texts)) + 3)
    inputs = {"input_ids": packed.tokens, "positions": packed.positions, "segments": packed.segments}
    logits = np.asarray(model.apply(params, inputs).logits)[0]
    at = 0
    for text in texts:
        assert apart(logits[at : at + len(text)], torch_logits(theirs, text[None].astype(np.int64))[0]) < 1e-4
        at += len(text)


def test_shards(tmp_path):
    theirs = torch_llama(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    names = {p.name for p in (tmp_path / "shards").glob("*.safetensors")}
    assert len(names) > 3
    whole, shards = hf.load(str(tmp_path / "whole"))[1], hf.load(str(tmp_path / "shards"))[1]
    assert whole.keys() == shards.keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key], shards[key], err_msg=key)


def test_shards_of_ours_open_in_transformers(tmp_path, monkeypatch):
    theirs = torch_llama(tmp_path / "whole")
    model, params = hf.load(str(tmp_path / "whole"))
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    hf.save(model, params, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards", attn_implementation="eager").eval()
    ids, mask = rows(model.config.vocab_size)
    np.testing.assert_array_equal(torch_logits(again, ids, mask), torch_logits(theirs, ids, mask))


@pytest.mark.parametrize("rope", ["absent", "rope_parameters", "rope_scaling"])
def test_rope_settings_of_old_and_new_files(tmp_path, rope):
    """transformers 4 wrote rope_theta + rope_scaling, transformers 5 writes rope_parameters; both are one function."""
    new = {"rope_type": "default", "rope_theta": 7e3} if rope == "absent" else LLAMA3
    theirs = torch_llama(tmp_path, rope_parameters=new)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["rope_parameters"]["rope_theta"] == new["rope_theta"]
    if rope != "rope_parameters":
        parameters = config.pop("rope_parameters")
        config["rope_theta"] = parameters.pop("rope_theta")
        config["rope_scaling"] = None if rope == "absent" else parameters
        path.write_text(json.dumps(config))
    model, params = hf.load(str(tmp_path))
    ids, mask = rows(model.config.vocab_size)
    assert apart(our_logits(model, params, ids, mask), torch_logits(theirs, ids, mask), mask) < 1e-4


# A real model --------------------------------------------------------------------------------------------------------


def test_stories260k(shared):
    folder = shared / "stories260k"
    model, params = hf.load(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    play = (shared / "text" / "tinyshakespeare.txt").read_text()[:1200]
    for text, expected in ((story, 0.18036), (play, 3.90003)):
        ids = np.asarray(tokenizer(text).input_ids)[None, :512]
        out = model.apply(params, {"input_ids": jnp.asarray(ids, jnp.int32)})
        nll = out.nll(jnp.asarray(np.pad(ids[:, 1:], ((0, 0), (0, 1))), jnp.int32)).nll[:, :-1].mean()
        assert abs(float(nll) - expected) < 1e-4
        assert apart(np.asarray(out.logits), torch_logits(theirs, ids)) < 1e-4
