"""Gates of combined methods against plain torch: hooks and an attention function that compute UniPELT's formulas per token.

Nothing of ours computes on the torch side: LoRA, adapter and prefix are written out there, and their gates with them.
"""

from __future__ import annotations

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax.generate.decode import decode  # noqa: E402
from ftjax.generate.sampling import Sampling  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.transformer import prompt_inputs  # noqa: E402
from ftjax.params import bounds, cut  # noqa: E402
from ftjax.peft.adapter import Houlsby, Parallel, Pfeiffer  # noqa: E402
from ftjax.peft.base import bind  # noqa: E402
from ftjax.peft.combined import Combine  # noqa: E402
from ftjax.peft.interop import load_adapter, save_adapter  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from ftjax.peft.prefix import Prefix  # noqa: E402
from tests.oracle import apart, rows, torch_llama  # noqa: E402
from tests.oracle.test_taps import BLOCKS, TORCH_ACTS, around_part, mirrored, overlay_of, torch_bert  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
N = 3  # virtual tokens
UNIPELT = Combine(
    methods=(LoRA(rank=2, targets=("q", "v")), Prefix(tokens=N), Pfeiffer(reduction=4)), gates=True
)  # fmt: skip
CASES = {
    "llama": UNIPELT,
    "bert": UNIPELT,
    "llama, layers": Combine(
        methods=(LoRA(rank=2, targets=("o", "down"), layers=(1,)), Prefix(tokens=N), Houlsby(reduction=4)),
        gates=True,
    ),
    "bert, parallel": Combine(methods=(Parallel(reduction=4), Prefix(tokens=N)), gates=True),
}
MODULES = {
    "llama": {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "down": "mlp.down_proj"},
    "bert": {"q": "attention.self.query", "v": "attention.self.value"},
}
ATTENTION = {"llama": "self_attn", "bert": "attention.self"}


def gate_of(tap, x):
    return torch.sigmoid(x @ tap.gate.w + tap.gate.c)[..., None]


def lora_hook(module, args, output, *, tap):
    (x,) = args
    return output + gate_of(tap, x) * tap.inner.scale * (x @ tap.inner.a @ tap.inner.b)


def adapter_change(tap, y, residual, norm, *, name):
    x = {"houlsby": y, "parallel": residual}.get(name)
    if x is None:
        x = y + residual if norm is None else norm(y + residual)
    one = tap.inner
    made = TORCH_ACTS[one.activation](x @ one.down + one.down_bias) @ one.up + one.up_bias
    return y + gate_of(tap, x) * one.scale * made


def overhear(module, args, kwargs):
    module.heard = args[0] if args else kwargs["hidden_states"]


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Keys and values of the text as ever, those of the prefix times the query's gate."""
    groups, tap = query.shape[1] // key.shape[1], module.tap
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    k, v = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (tap.inner.k, tap.inner.v))  # [heads, n, H]
    gate = gate_of(tap, module.heard)[:, None]  # [B, 1, T, 1]
    k, v = (
        gate[..., None] * k[None, :, None],
        gate[..., None] * v[None, :, None],
    )  # each query's own [B, heads, T, n, H]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.cat([torch.einsum("bhtd,bhtnd->bhtn", query, k), query @ key.transpose(-1, -2)], -1) * scaling
    scores[..., N:] += attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(-1)
    out = torch.einsum("bhtn,bhtnd->bhtd", weights[..., :N], v) + weights[..., N:] @ value
    return out.transpose(1, 2).contiguous(), weights


transformers.AttentionInterface.register("gated", attention)
transformers.AttentionMaskInterface.register("gated", transformers.masking_utils.eager_mask)


@contextlib.contextmanager
def hooked(theirs, family, method, at):
    """The method's formulas in place of what transformers computes."""
    adapters = [m.name for m in method.methods if m.name in ("houlsby", "pfeiffer", "parallel")]
    handles = []
    theirs.set_attn_implementation("gated")
    for i, block in enumerate(BLOCKS[family](theirs)):
        own = block.get_submodule(ATTENTION[family])
        own.tap = at("attn_kv", i)
        handles.append(own.register_forward_pre_hook(overhear, with_kwargs=True))
        for name, path in MODULES[family].items():
            if (tap := at(f"{name}/w", i)) is not None:
                handles.append(block.get_submodule(path).register_forward_hook(partial(lora_hook, tap=tap)))
        for site in ("attn_out", "mlp_out"):
            if (tap := at(site, i)) is not None:
                handles += around_part(family, block, site, partial(adapter_change, tap, name=adapters[0]))
    try:
        yield
    finally:
        theirs.set_attn_implementation("eager")
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By family: (torch model, our model, our parameters)."""
    made = {}
    for family, maker in {"llama": torch_llama, "bert": torch_bert}.items():
        folder = tmp_path_factory.mktemp(family)
        made[family] = (maker(folder).requires_grad_(False), *hf.load(str(folder)))
    return made


def begun(method, model, params):
    """An overlay whose gates differ much from token to token."""
    overlay = overlay_of(method, model, params)
    wide = {k: e.replace(gate=e.gate.replace(w=3 * e.gate.w)) if hasattr(e, "gate") else e for k, e in overlay.items()}
    assert sum(hasattr(e, "gate") for e in wide.values()) == len(wide) - 1  # all but the shift of positions
    return wide


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(bases, case):
    family, method = case.split(",")[0], CASES[case]
    theirs, model, params = bases[family]
    overlay = begun(method, model, params)
    mine, at = mirrored({k: e for k, e in overlay.items() if k != "input/tap"})
    left = case == "llama"
    ids, mask = rows(97, left=left)
    places = np.maximum(mask.cumsum(1) - 1, 0) if family == "llama" else np.arange(ids.shape[1])[None] + 0 * ids
    with hooked(theirs, family, method, at):
        want = theirs(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(places + N)
        ).logits
        real = torch.tensor(mask > 0)
        want_loss = torch.nn.functional.cross_entropy(want[real], torch.tensor(ids)[real])
        want_loss.backward()

    def loss(overlay):
        inputs = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask, jnp.int32)}
        logits = model.apply(bind(cut(params, bounds(overlay)), overlay), inputs).logits
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs["input_ids"][..., None], -1)[..., 0]
        return -picked[mask > 0].mean(), logits

    (got_loss, got), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(overlay)
    assert abs(float(got_loss) - float(want_loss)) <= 1e-5 * float(want_loss)
    assert apart(np.asarray(got), want.detach().numpy(), mask) <= 1e-5 * np.abs(want.detach().numpy()).max()
    grads.pop("input/tap")
    for key, entry in grads.items():
        for g, t in zip(jax.tree.leaves(entry), jax.tree.leaves(mine[key]), strict=True):
            assert t.grad is not None and np.abs(t.grad.numpy()).max() > 0, key
            assert np.abs(np.asarray(g) - t.grad.numpy()).max() <= 1e-3 * np.abs(t.grad.numpy()).max(), key


def test_cached_is_uncached_and_causal(bases):
    """Logits of a cached prefill and single steps equal those of the whole text, here and in torch, token for token."""
    theirs, model, params = bases["llama"]
    overlay = begun(UNIPELT, model, params)
    bound = bind(cut(params, bounds(overlay)), overlay)
    ids, _ = rows(97, seed=3)
    text = ids[:1]
    apply = jax.jit(model.apply)
    whole = np.asarray(apply(bound, {"input_ids": jnp.asarray(text, jnp.int32)}).logits)
    T, size = text.shape[1], np.abs(whole).max()
    prompt = jnp.asarray(text[:, :8], jnp.int32)
    out = model.begin(bound, prompt, jnp.asarray([8]), room=T - 8, soft=0)
    assert apart(np.asarray(out.logits), whole[:, :8]) <= 1e-5 * size  # causal: the rest of the text changes nothing
    step = jax.jit(partial(model.apply, first=False))
    for t in range(8, T):
        inputs = prompt_inputs(jnp.asarray(text[:, t : t + 1], jnp.int32), jnp.asarray([1]))
        inputs |= {"positions": jnp.full((1, 1), t, jnp.int32)}
        out = step(bound, inputs, cache=out.cache)
        assert apart(np.asarray(out.logits), whole[:, t : t + 1]) <= 1e-5 * size, t

    _, at = mirrored({k: e for k, e in overlay.items() if k != "input/tap"})
    prompts = [text[0, :8].astype(np.int32), text[0, 8:13].astype(np.int32)]
    pieces = list(decode(model, bound, prompts, Sampling(), limits=[10] * 2, eos=[], pad=0))
    made = [[t for piece in pieces for t in piece[i]] for i in range(2)]
    with hooked(theirs, "llama", UNIPELT, at), torch.no_grad():
        for prompt, answer in zip(prompts, made, strict=True):
            so_far = torch.tensor([[*prompt, *answer]]).long()
            logits = theirs(input_ids=so_far, position_ids=torch.arange(so_far.shape[1])[None] + N).logits
            assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert len({t for row in made for t in row}) > 9, "answers that repeat themselves prove nothing"


@pytest.mark.parametrize("case", CASES)
def test_files(bases, case, tmp_path):
    family, method = case.split(",")[0], CASES[case]
    _, model, params = bases[family]
    overlay, first = begun(method, model, params), method.init(jax.random.key(0), model.table, params)
    for key, entry in overlay.items():  # a file has the method's scale, which nobody trains
        if hasattr(scaled := getattr(entry, "inner", None), "scale"):
            overlay[key] = entry.replace(inner=scaled.replace(scale=first[key].inner.scale))
    save_adapter(tmp_path, overlay, model.table, method, base_path="base")
    file = load_adapter(tmp_path, model.table, params)
    assert file.method.gates and [m.name for m in file.method.methods] == [m.name for m in method.methods]
    inputs = {"input_ids": jnp.asarray(rows(97)[0], jnp.int32)}
    want, got = (model.apply(bind(cut(params, bounds(o)), o), inputs).logits for o in (overlay, file.overlay))
    assert apart(np.asarray(got), np.asarray(want)) <= 1e-6 * float(jnp.abs(want).max())
