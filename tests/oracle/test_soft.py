"""Virtual tokens and prefixes against PEFT: files both ways, gradients, generation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ftjax import api, registry  # noqa: E402
from ftjax.errors import DataError  # noqa: E402
from ftjax.generate.decode import decode  # noqa: E402
from ftjax.generate.sampling import Sampling  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.peft.base import bind  # noqa: E402
from ftjax.peft.interop import load_adapter, save_adapter  # noqa: E402
from tests.oracle import apart, our_logits, rows, torch_llama  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = {
    "prompt": (dict(tokens=5), lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "p_tuning": (
        dict(tokens=5, hidden=16),
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    ),
    "prefix": (dict(tokens=5), lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_llama(folder, num_hidden_layers=3)
    return folder, *hf.load(str(folder))


def raw(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def logits_of(theirs, ids, mask):
    """Of the real columns: PEFT gives those of virtual tokens too. Padding on the right only: PEFT counts columns."""
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    return out[:, -ids.shape[1] :].numpy()


@pytest.mark.parametrize("name", KINDS)
def test_exported_here_opened_there(base, tmp_path, name):
    folder, model, params = base
    method = registry.get("peft", name)(**KINDS[name][0])
    overlay = method.init(jax.random.key(0), model.table, params)
    overlay = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), overlay)
    save_adapter(tmp_path, overlay, model.table, method, base_path=str(folder))
    ids, mask = rows(97)
    theirs = peft.PeftModel.from_pretrained(raw(folder), tmp_path).eval()
    ours, want = our_logits(model, bind(params, overlay), ids, mask), logits_of(theirs, ids, mask)
    assert apart(ours, want, mask) <= 1e-5 * np.abs(want).max()
    assert apart(want, logits_of(raw(folder), ids, mask), mask) > 1e-2
    file = load_adapter(tmp_path, model.table, params)
    again = our_logits(model, bind(params, file.overlay), ids, mask)
    np.testing.assert_allclose(again, ours, atol=1e-5)
    assert type(file.method) is type(method)


@pytest.mark.parametrize("name", KINDS)
def test_made_there_opened_here(base, tmp_path, name):
    folder, model, params = base
    torch.manual_seed(0)
    theirs = peft.get_peft_model(raw(folder), KINDS[name][1]())
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    theirs.save_pretrained(tmp_path)
    ids, mask = rows(97)
    opened, bound = api.load_pretrained(folder, adapter=tmp_path)
    want = logits_of(theirs.eval(), ids, mask)
    assert apart(our_logits(opened, bound, ids, mask), want, mask) <= 1e-5 * np.abs(want).max()

    # greedy, 12 tokens, with our cache
    prompt = ids[:1, :7]
    out = theirs.generate(
        input_ids=torch.tensor(prompt), attention_mask=torch.ones(1, 7, dtype=torch.long), max_new_tokens=12,
        min_new_tokens=12, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    pieces = decode(
        opened, bound, [prompt[0].astype(np.int32)], Sampling(max_new_tokens=12), limits=[12], eos=[], pad=0
    )
    assert [t for new in pieces for t in new[0]] == out[0, 7:].tolist()


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_gradients(base, tmp_path, name):
    folder, model, params = base
    theirs = peft.get_peft_model(raw(folder), KINDS[name][1]())
    theirs.save_pretrained(tmp_path)
    ids, mask = rows(97)
    direction = np.random.default_rng(0).normal(size=(*ids.shape, 97)).astype(np.float32) * mask[..., None]
    out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, -ids.shape[1] :]
    (out * torch.tensor(direction)).sum().backward()
    (want,) = (p.grad.numpy() for p in theirs.parameters() if p.requires_grad)
    file = load_adapter(tmp_path, model.table, params)
    inputs = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask, jnp.int32)}

    def loss(overlay):
        return (model.apply(bind(params, overlay), inputs).logits * direction).sum()

    grads = jax.jit(jax.grad(loss))(file.overlay)
    save_adapter(tmp_path / "g", grads, model.table, file.method, base_path="")
    from safetensors.numpy import load_file

    mine = load_file(tmp_path / "g" / "adapter_model.safetensors")["prompt_embeddings"]
    assert np.abs(mine - want).max() <= 1e-3 * np.abs(want).max()


def test_a_file_that_does_not_fit(base, tmp_path):
    folder, model, params = base
    method = registry.get("peft", "prompt")(tokens=5)
    save_adapter(tmp_path, method.init(jax.random.key(0), model.table, params), model.table, method, base_path="")
    import json

    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"num_virtual_tokens": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"prompt_embeddings \[5, 32\]: .*call for \[6, 32\]"):
        load_adapter(tmp_path, model.table, params)
