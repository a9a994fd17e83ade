"""T5 against transformers: logits, every gradient, both ways of the file, greedy answers, PEFT's files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file, save_file  # noqa: E402

from ftjax import api  # noqa: E402
from ftjax.errors import ConfigError, DataError  # noqa: E402
from ftjax.generate.decode import decode  # noqa: E402
from ftjax.generate.sampling import Sampling  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.base import Numerics  # noqa: E402
from ftjax.models.t5 import T5Config  # noqa: E402
from ftjax.models.t5_layers import buckets  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.params import bounds, cut  # noqa: E402
from ftjax.peft.base import bind  # noqa: E402
from ftjax.peft.interop import save_adapter  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from tests.oracle import apart, rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SIZES = dict(
    vocab_size=97, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=4, relative_attention_num_buckets=8,
    relative_attention_max_distance=14, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
# the first form; version 1.1 with a head of its own; uneven sides
ODD = [
    {},
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": 101},
    {"feed_forward_proj": "gated-silu", "num_decoder_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 10,
     "layer_norm_epsilon": 1e-5},
]  # fmt: skip


def torch_t5(folder, changes, seed=0):
    """A tiny random T5 with every parameter drawn, saved to `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    own_head = changes.get("tie_word_embeddings") is False
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**(SIZES | changes))).eval()
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "layer_norm" in name else 0.0))
    model.save_pretrained(folder)
    return model


def batch(vocab, *, left=False):
    """Sources with padding on one side, answers without."""
    ids, mask = rows(vocab, left=left)
    answer = np.random.default_rng(7).integers(2, vocab, (len(ids), 11))
    return {"input_ids": np.where(mask > 0, ids, 0), "attention_mask": mask, "labels": answer}


def given(inputs):
    return {k: jnp.asarray(v, jnp.int32) for k, v in inputs.items()}


def both(theirs, model, params, inputs):
    with torch.no_grad():
        want = theirs(**{k: torch.tensor(v) for k, v in inputs.items()}).logits.float().numpy()
    return np.asarray(jax.jit(lambda p, x: model.apply(p, x).logits)(params, given(inputs))), want


@pytest.mark.parametrize("count, farthest", [(32, 128), (8, 14), (10, 14), (32, 64), (48, 200)])
def test_buckets(count, farthest):
    """Every distance, ahead and behind, as transformers sorts it."""
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config.from_hf(
        transformers.T5Config(
            **(SIZES | {"relative_attention_num_buckets": count, "relative_attention_max_distance": farthest})
        ).to_dict()
    )
    distance = np.arange(300)
    near = np.minimum(distance, farthest)
    for side, sign in (("encoder", 1), ("encoder", -1), ("decoder", -1)):
        want = T5Attention._relative_position_bucket(
            torch.tensor(sign * distance), bidirectional=side == "encoder", num_buckets=count, max_distance=farthest
        ).numpy()
        ahead = np.where((distance > 0) & (sign > 0), count // 2, 0)
        np.testing.assert_array_equal(buckets(config, side)[near] + ahead, want)


@pytest.mark.parametrize("case", range(3))
def test_logits_gradients_and_round_trip(tmp_path, case):
    theirs = torch_t5(tmp_path / "a", ODD[case])
    model, params = hf.load(str(tmp_path / "a"))
    assert ("head/w" in params) == (case == 1)
    for left in (False, True):
        assert apart(*both(theirs, model, params, batch(model.config.vocab_size, left=left))) < 1e-4

    inputs = batch(model.config.vocab_size)
    loss = theirs(**{k: torch.tensor(v) for k, v in inputs.items()}).loss
    loss.backward()

    def ours(p):
        return model.apply(p, given(inputs)).nll(jnp.asarray(inputs["labels"], jnp.int32)).nll.mean()

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5)
    named = dict(theirs.named_parameters())
    seen = set()
    for name, g in to_file_tensors(model.table, grads):
        want = named[name].grad.numpy()
        assert np.abs(g - want).max() <= 1e-3 * np.abs(want).max() + 1e-9, name
        seen.add(name)
    assert seen == set(named)

    hf.save(model, params, tmp_path / "b")
    back, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert apart(*both(back.eval(), model, params, inputs)) < 1e-4
    assert hf.load(str(tmp_path / "b"))[0] == model


def test_a_published_version_1_1(tmp_path):
    """Its config says that the head is not tied and nothing of scaling; copies of the embedding lie beside it."""
    theirs = torch_t5(tmp_path, ODD[1])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scale_decoder_outputs"], config["relative_attention_max_distance"]
    config |= {"tie_word_embeddings": False, "n_positions": 512, "output_past": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    copies = {f"{side}.embed_tokens.weight": tensors["shared.weight"] for side in ("encoder", "decoder")}
    save_file(tensors | copies, path)
    model, params = hf.load(str(tmp_path))
    assert model.config.relative_attention_max_distance == 128 and not model.config.scale_decoder_outputs
    for block in (*theirs.encoder.block, *theirs.decoder.block):
        block.layer[0].SelfAttention.relative_attention_max_distance = 128
    assert apart(*both(theirs, model, params, batch(101))) < 1e-4


@pytest.mark.parametrize("case", range(2))
def test_generation(tmp_path, case):
    """Greedy, 64 tokens, four sources of unequal lengths: transformers' `generate`, and ours without a cache."""
    theirs = torch_t5(tmp_path, ODD[case])
    with torch.no_grad():  # small embeddings, large layers: otherwise a random model says one token for ever
        for name, p in theirs.named_parameters():
            p.mul_(3.0 if ".block." in name and "layer_norm" not in name else 1.0)
            p.mul_(20.0 if "relative" in name else 1.0)
        theirs.shared.weight.mul_(0.1)
    theirs.save_pretrained(tmp_path)
    theirs.generation_config.eos_token_id = None
    model, params = hf.load(str(tmp_path))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 97, n).astype(np.int32) for n in (9, 4, 13, 6)]
    ours = [[] for _ in prompts]
    for new in decode(model, params, prompts, Sampling(max_new_tokens=64), limits=[64] * 4, eos=[], pad=0):
        for row, more in zip(ours, new, strict=True):
            row += more
    assert min(len(set(a)) for a in ours) > 2 and len({tuple(a) for a in ours}) == 4
    width = max(map(len, prompts))
    ids = np.stack([np.pad(p, (0, width - len(p))) for p in prompts]).astype(np.int64)
    mask = np.stack([np.pad(np.ones(len(p), np.int64), (0, width - len(p))) for p in prompts])
    out = theirs.generate(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=64, min_new_tokens=64,
        do_sample=False,
    )  # fmt: skip
    assert ours == out[:, 1:].tolist()
    for prompt, answer in zip(prompts, ours, strict=True):
        whole = {"input_ids": prompt[None], "labels": np.asarray(answer)[None]}
        assert np.asarray(model.apply(params, given(whole)).logits)[0].argmax(-1).tolist() == answer


def test_bfloat16_and_unrolled(tmp_path):
    """bfloat16 is no further from torch's float32 than twice torch's own; scan and unrolled layers agree."""
    theirs = torch_t5(tmp_path, {})
    inputs = batch(97)
    model, params = api.load_pretrained(tmp_path, dtype="bfloat16")
    ours, want = both(theirs, model, params, inputs)
    half = both(theirs.to(torch.bfloat16), model, params, inputs)[1]
    assert apart(ours, want) <= 2 * apart(half, want)
    model, params = api.load_pretrained(tmp_path)
    unrolled = type(model)(model.config, Numerics(layers="unroll"), model.head)
    a, b = (np.asarray(m.apply(params, given(inputs)).logits) for m in (unrolled, model))
    assert apart(a, b) < 2e-5


def test_an_adapter_opens_there(tmp_path):
    theirs = torch_t5(tmp_path / "base", {})
    model, params = hf.load(str(tmp_path / "base"))
    method = LoRA(rank=4, alpha=8.0)
    overlay = method.init(jax.random.key(0), model.table, params)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    overlay = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), overlay)
    save_adapter(tmp_path / "adapter", overlay, model.table, method, base_path=str(tmp_path / "base"))
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ours, want = both(opened, model, bind(cut(params, bounds(overlay)), overlay), batch(97))
    assert apart(ours, want) <= 1e-5 * np.abs(want).max()
    again = both(opened, *api.load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter"), batch(97))[0]
    np.testing.assert_allclose(again, ours, atol=1e-6)


def test_what_cannot_be(tmp_path):
    torch_t5(tmp_path, {})
    model, params = hf.load(str(tmp_path))
    with pytest.raises(ConfigError, match="decoder_input_ids"):
        model.apply(params, {"input_ids": jnp.ones((1, 3), jnp.int32)})
    config = json.loads((tmp_path / "config.json").read_text()) | {"feed_forward_proj": "gated-mish"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="feed_forward_proj='gated-mish'"):
        hf.load(str(tmp_path))
