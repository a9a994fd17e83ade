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

from ftjax.models import hf  # noqa: E402
from ftjax.peft.base import bind  # noqa: E402
from ftjax.peft.interop import load_adapter, save_adapter  # noqa: E402
from ftjax.peft.p_tuning import PTuning  # noqa: E402
from tests.oracle import apart, our_logits, relative, rows, torch_llama  # noqa: E402
from tests.oracle.test_soft import logits_of, raw  # noqa: E402

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
