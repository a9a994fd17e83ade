"""GPT-2 and GPT-NeoX beyond what every decoder is asked: hub configs, cut stacks, decoding, PEFT on the fused matrices."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax import api  # noqa: E402
from ftjax.generate.decode import decode  # noqa: E402
from ftjax.generate.sampling import Sampling  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.base import Numerics  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.params import cut  # noqa: E402
from ftjax.peft.base import bind, merge  # noqa: E402
from ftjax.peft.interop import load_adapter, save_adapter  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from tests.oracle import apart, our_logits, rows, torch_logits  # noqa: E402
from tests.oracle.test_decoders import FAMILIES, talkative, torch_decoder, varied  # noqa: E402

ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# test_decoders has three of each: these are the settings that it leaves
CASES = {
    "GPT2 unscaled": ("GPT2", {"scale_attn_weights": False, "n_inner": 50, "activation_function": "gelu_pytorch_tanh"}),
    "GPT2 by layer": ("GPT2", {"scale_attn_by_inverse_layer_idx": True, "n_head": 2, "activation_function": "gelu"}),
    "GPT2 untied": ("GPT2", {"tie_word_embeddings": False, "vocab_size": 101, "activation_function": "gelu_fast"}),
    "NeoX one after the other": (
        "GPTNeoX", {"use_parallel_residual": False, "hidden_act": "gelu_fast", "rope_parameters": ROPE},
    ),
    "NeoX whole heads": (
        "GPTNeoX", {"tie_word_embeddings": True, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
    ),
    "NeoX a quarter": (
        "GPTNeoX", {"vocab_size": 101, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_form_of_the_same_model(tmp_path, case):
    """Scan, unrolled, stacks cut in two, bfloat16; loss and gradients of rows that are padded."""
    family, changes = CASES[case]
    theirs = torch_decoder(tmp_path / "a", family, changes)
    model, params = hf.load(str(tmp_path / "a"))
    unrolled = type(model)(model.config, Numerics(layers="unroll"), model.head)
    for left in (False, True):
        ids, mask = rows(model.config.vocab_size, left=left)
        want = torch_logits(theirs, ids, mask)
        assert apart(our_logits(model, params, ids, mask), want, mask) < 1e-4
        assert apart(our_logits(unrolled, params, ids, mask), want, mask) < 1e-4
        assert apart(our_logits(model, cut(params, {"layers": [1]}), ids, mask), want, mask) < 1e-4

    ids, mask = rows(model.config.vocab_size)
    labels = np.where(mask > 0, ids, -100)
    loss = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss
    loss.backward()
    inputs = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask, jnp.int32)}
    weights = jnp.asarray(mask[:, 1:], jnp.float32)

    def ours(p):
        nll = model.apply(p, inputs).nll(jnp.asarray(np.roll(ids, -1, 1), jnp.int32)).nll[:, :-1]
        return (nll * weights).sum() / weights.sum()

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5)
    named = dict(theirs.named_parameters())
    named["embed_out.weight"] = theirs.get_output_embeddings().weight
    noise = 1e-6 * max(float(p.grad.abs().max()) for p in named.values())
    seen = 0
    for name, g in to_file_tensors(model.table, grads):
        want = named[name].grad.numpy()
        assert np.abs(g - want).max() <= 1e-3 * np.abs(want).max() + noise, name
        seen += 1
    assert seen == len(dict(theirs.named_parameters()))

    single = torch_logits(theirs, ids, mask)
    half = torch_logits(theirs.to(torch.bfloat16), ids, mask)
    small, small_params = api.load_pretrained(tmp_path / "a", dtype="bfloat16")
    assert apart(our_logits(small, small_params, ids, mask), single, mask) <= 2 * apart(half, single, mask)


@pytest.mark.parametrize("case", ["GPT2 by layer", "GPT2 untied", "NeoX one after the other", "NeoX a quarter"])
def test_greedy(tmp_path, case):
    """64 tokens, four rows of unequal lengths; with the cache and without, as transformers' `generate`."""
    theirs = talkative(torch_decoder(tmp_path, *CASES[case]), tmp_path)
    model, params = hf.load(str(tmp_path))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 97, n).astype(np.int32) for n in (3, 14, 8, 1)]
    ours = [[] for _ in prompts]
    for new in decode(model, params, prompts, Sampling(max_new_tokens=64), limits=[64] * 4, eos=[], pad=0):
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
    for prompt, answer in zip(prompts, ours, strict=True):
        logits = our_logits(model, params, np.concatenate([prompt, answer])[None])[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.parametrize("family, base", [("GPT2", "GPT2Model"), ("GPTNeoX", "GPTNeoXModel")])
def test_a_base_alone(tmp_path, family, base):
    """Saved by the class without a head, whose names have no prefix; a vocabulary head is then the embedding or missing."""
    theirs = torch_decoder(tmp_path / "a", family, {"tie_word_embeddings": True, **FAMILIES[family][1][0]})
    getattr(theirs, theirs.base_model_prefix).save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["architectures"] == [base]
    model, params = hf.load(str(tmp_path / "b"))
    ids, mask = rows(97)
    assert apart(our_logits(model, params, ids, mask), torch_logits(theirs, ids, mask), mask) < 1e-4


# As on the hub, from before transformers wrote everything: gpt2, distilgpt2, pythia-70m, gpt-neox-20b.
_GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.3, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
_PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
HUB = {
    "gpt2": _GPT2,
    "distilgpt2": _GPT2
    | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_layer": 6, "is_decoder": True},
    "pythia": _PYTHIA,
    "neox": {k: v for k, v in _PYTHIA.items() if k != "use_parallel_residual"}
    | {"hidden_act": "gelu_fast", "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1},
}


@pytest.mark.parametrize("name", HUB)
def test_hub_configs(name):
    """Read, and written so that transformers reads the same numbers from both."""
    given = HUB[name]
    model = hf.model_of(given, Numerics())
    assert model.head.kind == "causal_lm"
    written = model.config.to_hf()
    assert type(model.config).from_hf(written) == model.config
    read = getattr(transformers, "GPT2Config" if "gpt2" in name else "GPTNeoXConfig")
    before, after = read.from_dict(given).to_dict(), read.from_dict(written).to_dict()
    decides = set(written) & set(before) - {"n_inner"}
    assert {k: after[k] for k in decides} == {k: before[k] for k in decides}
    assert not {k for k in before if "pdrop" in k} - decides, "rates of dropout are kept"
    if "gpt2" in name:
        assert written["n_inner"] == 4 * given["n_embd"]


TARGETS = {
    "GPT2": ("c_attn", "c_proj", "c_fc"),
    "GPTNeoX": ("query_key_value", "dense_h_to_4h"),
}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_lora_is_pefts(tmp_path, family):
    """On the fused matrix as PEFT names it, in both directions; merged, and with equal gradients of A and B."""
    peft = pytest.importorskip("peft")
    torch_decoder(tmp_path / "base", family, FAMILIES[family][1][0])
    model, params = hf.load(str(tmp_path / "base"))
    method = LoRA(rank=4, alpha=8.0, targets=TARGETS[family])
    overlay = method.init(jax.random.key(0), model.table, params)
    keys = {k: jax.random.key(i) for i, k in enumerate(overlay)}
    overlay = {k: d.replace(b=0.3 * jax.random.normal(keys[k], d.b.shape)) for k, d in overlay.items()}
    save_adapter(tmp_path / "ours", overlay, model.table, method, base_path=str(tmp_path / "base"))
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (family == "GPT2")

    raw = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    ids, mask = rows(97)
    plain = torch_logits(raw, ids, mask)
    theirs = peft.PeftModel.from_pretrained(raw, tmp_path / "ours").eval()
    want = torch_logits(theirs, ids, mask)
    bound = bind(params, overlay)
    assert apart(our_logits(model, bound, ids, mask), want, mask) <= 1e-5 * np.abs(want).max()
    assert apart(our_logits(model, merge(bound, model.table), ids, mask), want, mask) <= 2e-5 * np.abs(want).max()
    assert apart(want, plain, mask) > 0.1
    assert apart(torch_logits(theirs.merge_and_unload(), ids, mask), want, mask) <= 2e-5 * np.abs(want).max()

    raw = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    made = peft.get_peft_model(raw, peft.LoraConfig(r=3, target_modules=list(TARGETS[family]), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    made.save_pretrained(tmp_path / "theirs")
    file = load_adapter(tmp_path / "theirs", model.table, params, base_path=str(tmp_path / "base"))
    want = torch_logits(made.eval(), ids, mask)
    assert apart(our_logits(model, bind(params, file.overlay), ids, mask), want, mask) <= 1e-5 * np.abs(want).max()
    made(input_ids=torch.tensor(ids[:1]), labels=torch.tensor(ids[:1])).loss.backward()

    def loss(overlay):
        out = model.apply(bind(params, overlay), {"input_ids": jnp.asarray(ids[:1], jnp.int32)})
        return out.nll(jnp.asarray(np.roll(ids[:1], -1, 1), jnp.int32)).nll[:, :-1].mean()

    save_adapter(tmp_path / "g", jax.jit(jax.grad(loss))(file.overlay), model.table, file.method, base_path="")
    from safetensors.numpy import load_file

    ours = load_file(tmp_path / "g" / "adapter_model.safetensors")
    wanted = {n.replace(".default", ""): p.grad.numpy() for n, p in made.named_parameters() if p.requires_grad}
    assert set(ours) == set(wanted)
    for name, g in wanted.items():
        assert np.abs(ours[name] - g).max() <= 1e-3 * np.abs(g).max() + 1e-7, name
