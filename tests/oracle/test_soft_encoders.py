"""Networks behind virtual tokens and prefixes against PEFT's: what they make, every gradient, the file; prefixes on T5."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ftjax.errors import DataError  # noqa: E402
from ftjax.generate.decode import decode  # noqa: E402
from ftjax.generate.sampling import Sampling  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.peft.base import bind  # noqa: E402
from ftjax.peft.interop import load_adapter, save_adapter  # noqa: E402
from ftjax.peft.p_tuning import PTuning  # noqa: E402
from ftjax.peft.prefix import Prefix  # noqa: E402
from tests.oracle import apart, our_logits, relative, rows, torch_llama  # noqa: E402
from tests.oracle.test_soft import logits_of, raw  # noqa: E402
from tests.oracle.test_t5 import batch, both, given, torch_t5  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_llama(folder, num_hidden_layers=3)
    return folder, *hf.load(str(folder))


def lstm_names(tap):
    """Our arrays (of a tap, or of its gradients) under the names of PEFT's encoder."""
    found = {"embedding.weight": tap.e}
    for layer in range(tap.u.shape[0]):
        w = tap.rest[layer - 1] if layer else tap.first
        for way, end in enumerate(("", "_reverse")):
            at = f"_l{layer}{end}"
            found |= {
                f"lstm_head.weight_ih{at}": w[way].T, f"lstm_head.weight_hh{at}": tap.u[layer, way].T,
                f"lstm_head.bias_ih{at}": tap.b[layer, way], f"lstm_head.bias_hh{at}": tap.c[layer, way],
            }  # fmt: skip
    head = {"mlp_head.0.weight": tap.w1.T, "mlp_head.0.bias": tap.b1, "mlp_head.2.weight": tap.w2.T}
    return {k: np.asarray(x) for k, x in (found | head | {"mlp_head.2.bias": tap.b2}).items()}


def moved(overlay):
    """Nothing zero."""
    leaves, tree = jax.tree.flatten(overlay)
    return jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    )


def filled(encoder, arrays):
    """PEFT's encoder with our numbers."""
    state = dict(encoder.named_parameters())
    assert set(state) == set(arrays)
    with torch.no_grad():
        for name, p in state.items():
            assert p.shape == arrays[name].shape, name
            p.copy_(torch.tensor(arrays[name]))
    return state


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_lstm_and_every_gradient(base, tmp_path, depth, record_property):
    folder, model, params = base
    method = PTuning(tokens=6, hidden=10, encoder="lstm", depth=depth)
    overlay = moved(method.init(jax.random.key(0), model.table, params))
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_reparameterization_type="LSTM", encoder_hidden_size=10,
        encoder_num_layers=depth, encoder_dropout=0.0,
    )  # fmt: skip
    theirs = peft.get_peft_model(raw(folder), config)
    state = filled(theirs.prompt_encoder["default"], lstm_names(overlay["input/tap"]))
    ids, mask = rows(97)
    out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, -ids.shape[1] :]
    ours = our_logits(model, bind(params, overlay), ids, mask)
    assert apart(ours, out.detach().numpy(), mask) <= 1e-5 * np.abs(ours).max()

    direction = np.random.default_rng(0).normal(size=out.shape).astype(np.float32) * mask[..., None]
    (out * torch.tensor(direction)).sum().backward()
    inputs = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask, jnp.int32)}
    loss = jax.jit(jax.grad(lambda o: (model.apply(bind(params, o), inputs).logits * direction).sum()))
    mine = lstm_names(loss(overlay)["input/tap"])
    gaps = {k: relative(mine[k], p.grad.numpy()) for k, p in state.items()}
    record_property("largest_relative", max(gaps.values()))
    assert max(gaps.values()) < 1e-3, {k: v for k, v in gaps.items() if v >= 1e-3}

    # the file, both ways: what the network made
    save_adapter(tmp_path / "a", overlay, model.table, method, base_path=str(folder))
    opened = peft.PeftModel.from_pretrained(raw(folder), tmp_path / "a").eval()
    assert apart(logits_of(opened, ids, mask), ours, mask) <= 1e-5 * np.abs(ours).max()
    theirs.save_pretrained(tmp_path / "b")
    file = load_adapter(tmp_path / "b", model.table, params)
    assert apart(our_logits(model, bind(params, file.overlay), ids, mask), ours, mask) <= 1e-5 * np.abs(ours).max()
    assert file.method == method
    kept, said = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "ab")
    names = ("encoder_reparameterization_type", "encoder_num_layers", "encoder_hidden_size", "token_dim", "num_layers")
    assert [kept[k] for k in names] == [said[k] for k in names]


def projected_names(tap):
    """Our arrays under the names of PEFT's PrefixEncoder, whose last layer has [2 L K H] outputs."""
    hidden = tap.w1.shape[1]
    found = {
        "embedding.weight": tap.e, "transform.0.weight": tap.w1.T, "transform.0.bias": tap.b1,
        "transform.2.weight": tap.w2.reshape(hidden, -1).T, "transform.2.bias": tap.b2.reshape(-1),
    }  # fmt: skip
    return {k: np.asarray(x) for k, x in found.items()}


@pytest.mark.parametrize("hidden", [10, 0])
def test_projection_and_every_gradient(base, tmp_path, hidden, record_property):
    folder, model, params = base
    method = Prefix(tokens=5, projection=True, hidden=hidden)
    overlay = moved(method.init(jax.random.key(0), model.table, params))
    (key,) = (k for k in overlay if k.endswith("attn_kv"))
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=hidden or None
    )
    theirs = peft.get_peft_model(raw(folder), config)
    state = filled(theirs.prompt_encoder["default"], projected_names(overlay[key]))
    ids, mask = rows(97)
    out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    ours = our_logits(model, bind(params, overlay), ids, mask)
    assert apart(ours, out.detach().numpy(), mask) <= 1e-5 * np.abs(ours).max()
    assert apart(ours, our_logits(model, params, ids, mask), mask) > 1e-2

    direction = np.random.default_rng(0).normal(size=out.shape).astype(np.float32) * mask[..., None]
    (out * torch.tensor(direction)).sum().backward()
    inputs = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask, jnp.int32)}
    loss = jax.jit(jax.grad(lambda o: (model.apply(bind(params, o), inputs).logits * direction).sum()))
    mine = projected_names(loss(overlay)[key])
    gaps = {k: relative(mine[k], p.grad.numpy()) for k, p in state.items()}
    record_property("largest_relative", max(gaps.values()))
    assert max(gaps.values()) < 1e-3, {k: v for k, v in gaps.items() if v >= 1e-3}

    # ours opens there and theirs here; the network is not in either file
    save_adapter(tmp_path / "a", overlay, model.table, method, base_path=str(folder))
    opened = peft.PeftModel.from_pretrained(raw(folder), tmp_path / "a").eval()
    assert apart(logits_of(opened, ids, mask), ours, mask) <= 1e-5 * np.abs(ours).max()
    theirs.save_pretrained(tmp_path / "b")
    file = load_adapter(tmp_path / "b", model.table, params)
    assert apart(our_logits(model, bind(params, file.overlay), ids, mask), ours, mask) <= 1e-5 * np.abs(ours).max()

    # 12 tokens with our cache, without a cache there
    prompt = ids[:1, :7]
    answer = prompt
    for _ in range(12):
        with torch.no_grad():
            best = theirs(input_ids=torch.tensor(answer)).logits[:, -1].argmax(-1)
        answer = np.concatenate([answer, best.numpy()[:, None]], axis=1)
    pieces = decode(
        model, bind(params, overlay), [prompt[0].astype(np.int32)], Sampling(max_new_tokens=12), limits=[12], eos=[],
        pad=0,
    )  # fmt: skip
    assert [t for new in pieces for t in new[0]] == answer[0, 7:].tolist()


# T5 ------------------------------------------------------------------------------------------------------------------

T5S = {
    "three layers": {},
    "four, two of them deeper": {"num_layers": 2, "num_decoder_layers": 4, "feed_forward_proj": "gated-gelu"},
}
MADE = {"three layers": {}, "four layers": {"num_layers": 4}, "fewer": {"num_layers": 5, "num_decoder_layers": 2}}


def t5_raw(folder):
    return transformers.T5ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


def greedy(model, params, source, n):
    pieces = decode(
        model, params, [source.astype(np.int32)], Sampling(max_new_tokens=n), limits=[n], eos=[], pad=0
    )  # fmt: skip
    return [t for new in pieces for t in new[0]]


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", T5S)
def test_t5_ours_opens_there(tmp_path, name, projection, record_property):
    torch_t5(tmp_path, T5S[name])
    model, params = hf.load(str(tmp_path))
    method = Prefix(tokens=5, projection=projection, hidden=7)
    overlay = jax.tree.map(lambda x: 4 * x, moved(method.init(jax.random.key(0), model.table, params)))
    assert all(k.startswith("decoder[") for k in overlay)
    save_adapter(
        tmp_path / "a", overlay, model.table, method, base_path=str(tmp_path), task_type="SEQ_2_SEQ_LM"
    )  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(t5_raw(tmp_path), tmp_path / "a").eval()
    inputs = batch(97)
    ours, want = both(theirs, model, bind(params, overlay), inputs)
    gap = apart(ours, want)
    record_property("max_abs", gap)
    assert gap <= 1e-5 * np.abs(want).max()
    assert apart(ours, both(theirs, model, params, inputs)[0]) > 1e-2

    source = inputs["input_ids"][:1, :7]
    theirs.base_model.generation_config.eos_token_id = None
    out = theirs.generate(
        input_ids=torch.tensor(source), attention_mask=torch.ones(1, 7, dtype=torch.long), max_new_tokens=9,
        do_sample=False,
    )  # fmt: skip
    mine = greedy(model, bind(params, overlay), source[0], 9)
    assert mine == out[0, 1:].tolist()
    assert mine != greedy(model, params, source[0], 9)
    if not projection:
        file = load_adapter(tmp_path / "a", model.table, params)
        jax.tree.map(np.testing.assert_array_equal, file.overlay, overlay)


@pytest.mark.parametrize("name", MADE)
def test_t5_theirs_opens_here(tmp_path, name, record_property):
    """As PEFT sets it up by itself, where layers may share a pair."""
    torch_t5(tmp_path, MADE[name])
    model, params = hf.load(str(tmp_path))
    torch.manual_seed(3)
    theirs = peft.get_peft_model(
        t5_raw(tmp_path), peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    )
    theirs.save_pretrained(tmp_path / "a")
    file = load_adapter(tmp_path / "a", model.table, params)
    inputs = batch(97)
    ours, want = both(theirs, model, bind(params, file.overlay), inputs)
    assert apart(ours, want) <= 1e-5 * np.abs(want).max()

    direction = np.random.default_rng(0).normal(size=want.shape).astype(np.float32)
    (theirs(**{k: torch.tensor(v) for k, v in inputs.items()}).logits * torch.tensor(direction)).sum().backward()
    wanted = theirs.prompt_encoder["default"].embedding.weight.grad.numpy()
    batched = given(inputs)
    loss = jax.jit(jax.grad(lambda o: (model.apply(bind(params, o), batched).logits * direction).sum()))
    (grads,) = loss(file.overlay).values()
    pairs, L = theirs.peft_config["default"].num_layers, grads.k.shape[0]
    summed = np.zeros((pairs, 2, *grads.k.shape[1:]), np.float32)
    for i in range(L):  # layers that share a pair add up
        summed[2 * i % pairs] += np.stack([grads.k[i], grads.v[i]])
    flat = summed.transpose(2, 0, 1, 3, 4).reshape(wanted.shape)
    assert len(wanted) == 5 and np.abs(wanted).max() > 0.1
    record_property("largest_relative", relative(flat, wanted))
    assert relative(flat, wanted) < 1e-3


def test_t5_file_of_too_few_layers(tmp_path):
    torch_t5(tmp_path, {"num_layers": 3})
    model, params = hf.load(str(tmp_path))
    method = Prefix(tokens=5)
    save_adapter(tmp_path / "a", method.init(jax.random.key(0), model.table, params), model.table, method, base_path="")
    at = tmp_path / "a" / "adapter_config.json"
    config = json.loads(at.read_text())
    for changes, text in (
        ({"num_layers": 2}, "num_layers=2, and the decoder has 3"),
        ({"num_transformer_submodules": 1}, "num_transformer_submodules=1, and this model calls for 2"),
    ):
        at.write_text(json.dumps(config | changes))
        with pytest.raises(DataError, match=text):
            load_adapter(tmp_path / "a", model.table, params)
