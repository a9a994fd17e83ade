"""Every decoder family against transformers: logits, gradients, files both ways, generation, at odd configurations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax import api  # noqa: E402
from ftjax.errors import DataError  # noqa: E402
from ftjax.generate.decode import decode  # noqa: E402
from ftjax.generate.sampling import Sampling  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.base import Numerics  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from tests.oracle import apart, our_logits, rows, torch_logits  # noqa: E402

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96, rms_norm_eps=1e-5, pad_token_id=None, bos_token_id=1,
    eos_token_id=None, tie_word_embeddings=False, attn_implementation="eager",
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "Mistral": ("MistralConfig", [
        {"sliding_window": 5}, {"sliding_window": None, "num_key_value_heads": 4, "tie_word_embeddings": True},
        {"sliding_window": 3, "head_dim": 16, "num_key_value_heads": 1, "vocab_size": 101, "rope_parameters": LLAMA3},
    ]),
    "Qwen2": ("Qwen2Config", [
        {}, {**WINDOW, "num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "vocab_size": 101,
         "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ]),
    "Qwen3": ("Qwen3Config", [
        {"head_dim": 8}, {**WINDOW, "head_dim": 16, "attention_bias": True},
        {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 101},
    ]),
    "Olmo2": ("Olmo2Config", [
        {}, {"num_key_value_heads": 4, "attention_bias": True},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 101},
    ]),
    "Phi3": ("Phi3Config", [
        {}, {"sliding_window": 5, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "vocab_size": 101,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ]),
    "Gemma2": ("Gemma2Config", [
        {"head_dim": 8, "sliding_window": 5, "tie_word_embeddings": True},
        {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": None, "query_pre_attn_scalar": 24},
        {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.5,
         "num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 101, "attention_bias": True},
    ]),
    "Gemma3": ("Gemma3TextConfig", [
        {"head_dim": 8, "sliding_window": 5, "tie_word_embeddings": True, "layer_types": MIXED},
        {"head_dim": 16, "sliding_window": 4, "layer_types": MIXED[::-1], "query_pre_attn_scalar": 24,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}},
        {"head_dim": 8, "sliding_window": 3, "num_key_value_heads": 1, "vocab_size": 101, "tie_word_embeddings": True},
    ]),
}  # fmt: skip
FAMILIES |= {
    "GPT2": ("GPT2Config", [
        {}, {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False, "vocab_size": 101},
        {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu", "n_head": 2},
    ]),
    "GPTNeoX": ("GPTNeoXConfig", [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        {"use_parallel_residual": False, "hidden_act": "gelu_new", "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 1.0}},
        {"attention_bias": False, "vocab_size": 101, "intermediate_size": 40,
         "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ]),
}  # fmt: skip
OWN_SIZES = {
    "GPT2": dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=96, bos_token_id=1, eos_token_id=None,
                 attn_implementation="eager"),
    "GPTNeoX": {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "rms_norm_eps")},
}  # fmt: skip
LM_CLASS = {"GPT2": "GPT2LMHeadModel"}
CASES = [(f, i) for f in FAMILIES for i in range(3)]


def torch_decoder(folder, family, changes, seed=0):
    """A tiny random decoder with every parameter drawn, saved to `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config, _ = FAMILIES[family]
    cls = getattr(transformers, LM_CLASS.get(family, f"{family}ForCausalLM"))
    model = cls(getattr(transformers, config)(**(OWN_SIZES.get(family, SIZES) | changes))).eval()
    plus_one = family.startswith("Gemma")
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            centre = 1.0 if is_norm and not plus_one else 0.0
            p.copy_(torch.randn_like(p) * 0.2 + centre)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def talkative(model, folder):
    """Small embeddings, large layers, saved: otherwise a random model says the token that it has just read for ever."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "wpe" in name or ((".layers." in name or ".h." in name) and "norm" not in name and ".ln_" not in name):
                p.mul_(3.0)
        model.get_input_embeddings().weight.mul_(0.1)
    model.save_pretrained(folder)
    return model


def varied(answers):
    """Whether equal answers prove anything."""
    tokens = [len(set(a)) for a in answers]
    return min(tokens) > 2 and sum(tokens) >= 30


@pytest.mark.parametrize("family, case", CASES)
def test_logits_gradients_and_round_trip(tmp_path, family, case):
    theirs = torch_decoder(tmp_path / "a", family, FAMILIES[family][1][case])
    model, params = hf.load(str(tmp_path / "a"))
    for left in (False, True):
        ids, mask = rows(model.config.vocab_size, left=left)
        assert apart(our_logits(model, params, ids, mask), torch_logits(theirs, ids, mask), mask) < 1e-4

    ids, _ = rows(model.config.vocab_size)
    ids = ids[:1]
    loss = theirs(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss
    loss.backward()

    def ours(p):
        out = model.apply(p, {"input_ids": jnp.asarray(ids, jnp.int32)})
        return out.nll(jnp.asarray(np.roll(ids, -1, 1), jnp.int32)).nll[:, :-1].mean()

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5)
    named = dict(theirs.named_parameters())
    named["embed_out.weight"] = theirs.get_output_embeddings().weight  # GPT-NeoX calls its head so in the file only
    noise = 1e-6 * max(float(p.grad.abs().max()) for p in named.values())
    for name, g in to_file_tensors(model.table, grads):
        want = named[name].grad.numpy()
        assert np.abs(g - want).max() <= 1e-3 * np.abs(want).max() + noise, name

    hf.save(model, params, tmp_path / "b")
    back, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids, mask = rows(model.config.vocab_size)
    np.testing.assert_array_equal(torch_logits(back.eval(), ids, mask), torch_logits(theirs, ids, mask))
    assert hf.load(str(tmp_path / "b"))[0] == model


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(tmp_path, family):
    """Greedy, 64 tokens, four rows of unequal lengths: transformers' `generate`, and ours without a cache."""
    theirs = talkative(torch_decoder(tmp_path, family, FAMILIES[family][1][0]), tmp_path)
    model, params = hf.load(str(tmp_path))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 97, n).astype(np.int32) for n in (9, 4, 13, 6)]
    pieces = decode(model, params, prompts, Sampling(max_new_tokens=64), limits=[64] * 4, eos=[], pad=0)
    ours = [[] for _ in prompts]
    for new in pieces:
        for row, more in zip(ours, new, strict=True):
            row += more
    assert varied(ours)
    width = max(map(len, prompts))
    ids = np.stack([np.pad(p, (width - len(p), 0)) for p in prompts]).astype(np.int64)
    mask = np.stack([np.pad(np.ones(len(p), np.int64), (width - len(p), 0)) for p in prompts])
    out = theirs.generate(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=64, min_new_tokens=64,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert ours == out[:, width:].tolist()
    # without a cache: the whole row again for the answers at once
    for prompt, answer in zip(prompts, ours, strict=True):
        whole = np.concatenate([prompt, answer])[None]
        logits = our_logits(model, params, whole)[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_and_unrolled(tmp_path, family):
    """bfloat16 is no further from torch's float32 than twice torch's own; scan and unrolled layers agree."""
    theirs = torch_decoder(tmp_path, family, FAMILIES[family][1][0])
    ids, mask = rows(97)
    want = torch_logits(theirs, ids, mask)
    half = torch_logits(theirs.to(torch.bfloat16), ids, mask)
    model, params = api.load_pretrained(tmp_path, dtype="bfloat16")
    assert apart(our_logits(model, params, ids, mask), want, mask) <= 2 * apart(half, want, mask)
    model, params = api.load_pretrained(tmp_path)
    unrolled = type(model)(model.config, Numerics(layers="unroll"), model.head)
    assert apart(our_logits(unrolled, params, ids, mask), our_logits(model, params, ids, mask), mask) < 2e-5


@pytest.mark.parametrize(
    "family, setting, text",
    [
        ("Qwen2", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types"),
        ("Mistral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            "Phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
            "longrope",
        ),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, family, setting, text):
    import json

    torch_decoder(tmp_path, family, FAMILIES[family][1][0])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | setting
    if "rope_scaling" in setting:
        config.pop("rope_parameters", None)
        config["rope_theta"] = 1e4
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=text):
        hf.load(str(tmp_path))


def test_an_old_gpt2_checkpoint(tmp_path):
    """Without the prefix, with the mask buffers of old files."""
    from safetensors.numpy import load_file, save_file

    torch_decoder(tmp_path, "GPT2", {})
    want = hf.load(str(tmp_path))[1]
    path = tmp_path / "model.safetensors"
    old = {k.removeprefix("transformer."): v for k, v in load_file(path).items() if k != "lm_head.weight"}
    old |= {f"h.{i}.attn.bias": np.ones((1, 1, 96, 96), np.uint8) for i in range(3)}
    old |= {f"h.{i}.attn.masked_bias": np.float32([-1e4]) for i in range(3)}
    save_file(old, path)
    jax.tree.map(np.testing.assert_array_equal, hf.load(str(tmp_path))[1], want)


def test_an_old_pythia_config(tmp_path):
    """`rotary_pct` and `rotary_emb_base` instead of rope_parameters; neither may be missing."""
    import json

    theirs = torch_decoder(tmp_path, "GPTNeoX", FAMILIES["GPTNeoX"][1][0])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    old = config | {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    path.write_text(json.dumps(old))
    model, params = hf.load(str(tmp_path))
    ids, mask = rows(97)
    assert apart(our_logits(model, params, ids, mask), torch_logits(theirs, ids, mask), mask) < 1e-4
    path.write_text(json.dumps({k: v for k, v in old.items() if k != "rotary_pct"}))
    with pytest.raises(DataError, match="rotary_pct"):
        hf.load(str(tmp_path))


@pytest.mark.parametrize(
    "family, name",
    [
        ("Mistral", "sliding_window"), ("Mistral", "num_key_value_heads"), ("Gemma2", "attn_logit_softcapping"),
        ("Gemma2", "head_dim"), ("Qwen3", "head_dim"), ("Qwen2", "num_key_value_heads"),
    ],
)  # fmt: skip
def test_a_number_that_transformers_would_put_itself_must_be_there(tmp_path, family, name):
    import json

    torch_decoder(tmp_path, family, FAMILIES[family][1][0])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop(name)
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=f"'{name}' is missing"):
        hf.load(str(tmp_path))


def test_an_old_gemma3_config(tmp_path):
    """`rope_theta`, `rope_local_base_freq`, `rope_scaling` and `sliding_window_pattern` as the first checkpoints have them."""
    import json

    theirs = torch_decoder(tmp_path, "Gemma3", FAMILIES["Gemma3"][1][1] | {"layer_types": None, "num_hidden_layers": 7})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    del config["layer_types"]
    config |= {
        "rope_theta": rope["full_attention"]["rope_theta"], "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": 6,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    model, params = hf.load(str(tmp_path))
    ids, mask = rows(97)
    assert apart(our_logits(model, params, ids, mask), torch_logits(theirs, ids, mask), mask) < 1e-4
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert apart(our_logits(model, params, ids, mask), torch_logits(again, ids, mask), mask) < 1e-4
