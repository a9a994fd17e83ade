"""ReFT and adapters against plain torch: hooks on transformers' layers that compute the method's formula from the same numbers.

Nothing of ours computes on the torch side: prompts' ends are counted row by row, R is torch's own QR factor.
"""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax import registry  # noqa: E402
from ftjax.generate.decode import decode  # noqa: E402
from ftjax.generate.sampling import Sampling  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.params import bounds, cut  # noqa: E402
from ftjax.peft.base import bind  # noqa: E402
from ftjax.peft.interop import load_adapter  # noqa: E402
from tests.oracle import apart, rows, torch_llama  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = (11, 7, 3)  # of rows of 19, 7 and 13 tokens
BERT = dict(
    vocab_size=97, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=40, attn_implementation="eager", tie_word_embeddings=True,
)  # fmt: skip


def torch_bert(folder):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if name.endswith("orm.weight") else 0.0))
    model.save_pretrained(folder)
    return model


MAKERS = {"llama": torch_llama, "bert": torch_bert}
BLOCKS = {"llama": lambda m: m.model.layers, "bert": lambda m: m.bert.encoder.layer}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By family: (torch model, our model, our parameters)."""
    made = {}
    for family, maker in MAKERS.items():
        folder = tmp_path_factory.mktemp(family)
        made[family] = (maker(folder).requires_grad_(False), *hf.load(str(folder)))
    return made


def overlay_of(method, model, params):
    """A method's overlay with all of its numbers moved, so that nothing is zero or orthonormal by chance."""
    overlay = method.init(jax.random.key(0), model.table, params)
    leaves, tree = jax.tree.flatten(overlay)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def mirrored(overlay):
    """The overlay's numbers as torch leaves, and a look-up of one layer's by site."""
    mine = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), overlay)
    rules = [tap.rule for tap in mine.values() if getattr(tap, "rule", None) is not None]  # one for all layers

    def at(site, layer):
        for key, tap in mine.items():
            found = re.fullmatch(r"layers\[(\d+):(\d+)\]/(.*)", key)
            i = layer - int(found[1])
            if found[3] == site and 0 <= i < int(found[2]) - int(found[1]):
                one = jax.tree.map(lambda x, i=i: x[i], tap.replace(rule=None) if rules else tap)
                return one.replace(rule=rules[0]) if rules else one
        return None

    return mine, at


def ours(model, params, overlay, ids, mask, prompts):
    inputs = {
        "input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask, jnp.int32),
        "prompt_len": jnp.asarray(np.broadcast_to(np.asarray(prompts)[:, None], ids.shape), jnp.int32),
    }  # fmt: skip
    return model.apply(bind(params, overlay), inputs).logits


def compared(theirs, model, params, overlay, mine, *, left=False):
    """Logits and every gradient of the overlay on both sides; the hooks are in place."""
    ids, mask = rows(97, left=left)
    direction = np.random.default_rng(0).normal(size=(*ids.shape, 97)).astype(np.float32) * mask[..., None]
    places = {"position_ids": torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))} if left else {}
    want = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **places).logits
    (want * torch.tensor(direction)).sum().backward()
    base = cut(params, bounds(overlay))

    def loss(overlay):
        logits = ours(model, base, overlay, ids, mask, PROMPTS)
        return (logits * direction).sum(), logits

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(overlay)
    size = np.abs(want.detach().numpy()).max()
    assert apart(np.asarray(got), want.detach().numpy(), mask) <= 1e-5 * size
    for g, t in zip(jax.tree.leaves(grads), jax.tree.leaves(mine), strict=True):
        assert t.grad is not None and np.abs(t.grad.numpy()).max() > 0
        assert np.abs(np.asarray(g) - t.grad.numpy()).max() <= 1e-3 * np.abs(t.grad.numpy()).max()


def greedy(theirs, model, params, overlay):
    """The same 12 tokens after left-padded prompts, the hooks in place."""
    ids, mask = rows(97, left=True, seed=3)
    theirs.generation_config.eos_token_id = None
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        out = theirs.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **settings)
    prompts = [i[m > 0].astype(np.int32) for i, m in zip(ids, mask, strict=True)]
    bound = bind(cut(params, bounds(overlay)), overlay)
    pieces = list(decode(model, bound, prompts, Sampling(), limits=[12] * 3, eos=[], pad=0))
    made = [[t for piece in pieces for t in piece[i]] for i in range(3)]
    assert made == out[:, ids.shape[1] :].tolist()
    assert len({t for row in made for t in row}) > 9, "answers that repeat themselves prove nothing"


# ReFT ----------------------------------------------------------------------------------------------------------------


def ends(first, last, prompts, starts):
    """Columns of the first and last tokens of each row's prompt, which begins at `starts`."""
    for n, start in zip(prompts, starts, strict=True):
        f, g = min(first, n // 2), min(last, n // 2)
        yield list(range(start, start + f)), list(range(start + n - g, start + n))


def edited(h, r, w, b, *, name):
    """The formula on rows h [n, D]."""
    if name == "loreft":
        q, upper = torch.linalg.qr(r.T)
        r = (q * upper.diagonal().sign()).T
    source = h @ w.T + b
    return h + (source if name == "direft" else source - h @ r.T) @ r


def reft_hook(module, args, output, *, tap, name, where, everywhere=False):
    h = output[0] if isinstance(output, tuple) else output
    if h.shape[1] == 1:  # a decoding step
        if not everywhere:
            return None
        where = [([0], [])] * len(h)
    out = h.clone()
    for i, columns in enumerate(where):
        for u, at in enumerate(columns if tap.b.shape[0] == 2 else [columns[0] + columns[1]]):
            out[i, at] = edited(h[i, at], tap.r[u], tap.w[u], tap.b[u], name=name)
    return (out, *output[1:]) if isinstance(output, tuple) else out


REFT = [
    ("loreft", "llama", {}, False), ("loreft", "llama", dict(tied=True, layers=(0, 2), positions="f2+l3"), True),
    ("loreft", "bert", {}, False), ("noreft", "llama", dict(layers=(1,)), True),
    ("noreft", "bert", dict(tied=True), False), ("direft", "llama", dict(positions="l4"), True),
    ("direft", "bert", dict(positions="f1", layers=(0, 1)), False), ("loreft", "llama", dict(positions="all"), True),
    ("noreft", "bert", dict(positions="all"), False), ("direft", "llama", dict(positions="all", layers=(0, 2)), True),
]  # fmt: skip


@pytest.mark.parametrize("name, family, options, left", REFT, ids=str)
def test_reft(bases, name, family, options, left):
    theirs, model, params = bases[family]
    method = registry.get("peft", name)(rank=3, **options)
    overlay = overlay_of(method, model, params)
    mine, at = mirrored(overlay)
    first, last = {"f7+l7": (7, 7), "f2+l3": (2, 3), "l4": (0, 4), "f1": (1, 0), "all": (0, 0)}[method.positions]
    everywhere, handles = method.positions == "all", []

    def hook(prompts, starts):
        where = list(ends(first, last, prompts, starts))
        if everywhere:  # the rows' tokens, whatever their prompts
            where = [(list(range(start, start + n)), []) for n, start in zip((19, 7, 13), starts, strict=True)]
        for i, block in enumerate(BLOCKS[family](theirs)):
            if (tap := at("residual", i)) is not None:
                how = partial(reft_hook, tap=tap, name=name, where=where, everywhere=everywhere)
                handles.append(block.register_forward_hook(how))

    try:
        hook(PROMPTS, (0, 12, 6) if left else (0, 0, 0))
        compared(theirs, model, params, overlay, mine, left=left)
        if left:
            while handles:
                handles.pop().remove()
            hook((19, 7, 13), (0, 12, 6))
            greedy(theirs, model, params, overlay)
    finally:
        for handle in handles:
            handle.remove()


# Bottleneck adapters -------------------------------------------------------------------------------------------------

NAMES = {"houlsby": ("attn_out", "mlp_out"), "pfeiffer": ("mlp_out",), "parallel": ("mlp_out",)}
TORCH_ACTS = {
    "relu": torch.nn.functional.relu,
    "swish": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
}


def bottleneck(x, tap, act):
    if hasattr(tap, "rule"):
        down, up = (
            sum(torch.kron(a, w if t is None else w @ t) for a, w, t in zip(tap.rule, left, right, strict=True))
            for left, right in ((tap.down_left, tap.down_right), (tap.up_left, tap.up_right))
            for right in [[None] * len(left) if right is None else right]
        )
    else:
        down, up = tap.down, tap.up
    return act(x @ down + tap.down_bias) @ up + tap.up_bias


def around_part(family, block, site, change):
    """Hooks that put ``change(output, residual, norm)`` in the place of a part's output; the residual is overheard."""
    seen = {}

    def overhear(module, args):
        seen["residual"] = args[-1]

    def replace(module, args, output):
        y = output[0] if isinstance(output, tuple) else output
        y = change(y, seen["residual"], norm)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    if family == "llama":
        part, before = {
            "attn_out": (block.self_attn, block.input_layernorm),
            "mlp_out": (block.mlp, block.post_attention_layernorm),
        }[site]
        norm = None
    else:
        before = {"attn_out": block.attention.output, "mlp_out": block.output}[site]
        part, norm = before.dense, before.LayerNorm
    return [before.register_forward_pre_hook(overhear), part.register_forward_hook(replace)]


def changed(name, tap, act, y, residual, norm):
    """The three formulas. `norm` is called past its hooks."""
    if name == "houlsby":
        x = y
    elif name == "pfeiffer":
        x = y + residual if norm is None else norm(y + residual)
    else:
        x = residual
    return y + tap.scale * bottleneck(x, tap, act)


def hooked(theirs, family, method, at, change):
    handles = []
    for i, block in enumerate(BLOCKS[family](theirs)):
        for site in ("attn_out", "mlp_out"):
            if (tap := at(site, i)) is not None:
                handles += around_part(family, block, site, partial(change, tap))
    return handles


ADAPTERS = [
    ("houlsby", "llama", {}), ("houlsby", "bert", dict(layers=(0, 2), activation="tanh")), ("pfeiffer", "llama", {}),
    ("pfeiffer", "bert", {}), ("parallel", "llama", dict(layers=(1,))), ("parallel", "bert", {}),
    ("compacter", "llama", dict(layers=(0, 2))), ("compacter", "bert", dict(rank=0)),
    ("compacter", "bert", dict(plus=True, rank=2, reduction=2, blocks=4)),
]  # fmt: skip


@pytest.mark.parametrize("name, family, options", ADAPTERS, ids=str)
def test_adapters(bases, name, family, options):
    theirs, model, params = bases[family]
    if name == "compacter":  # the tiny BERT is 24 wide
        options = {"blocks": 3 if family == "bert" else 4} | options
    method = registry.get("peft", name)(**{"reduction": 4} | options)
    overlay = overlay_of(method, model, params)
    acts_as = ("pfeiffer" if method.plus else "houlsby") if name == "compacter" else name
    assert {k.rsplit("/", 1)[-1] for k in overlay} == set(NAMES[acts_as])
    mine, at = mirrored(overlay)
    act = TORCH_ACTS[method.activation]
    handles = hooked(theirs, family, method, at, lambda tap, *a: changed(acts_as, tap, act, *a))
    try:
        compared(theirs, model, params, overlay, mine)
        if family == "llama":
            greedy(theirs, model, params, overlay)
    finally:
        for handle in handles:
            handle.remove()


def test_r_of_torchs_parametrisation(bases, tmp_path):
    """A LoReFT file of AdapterHub holds what torch keeps of an orthogonal R: a square base and reflections."""
    _, model, params = bases["llama"]
    tensors, want = {}, {}
    for layer in range(3):
        for unit in range(2):
            linear = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(32, 3, bias=False))
            with torch.no_grad():  # as after training
                held = linear.parametrizations.weight.original
                held.add_(torch.randn_like(held) * 0.3 * (1 - torch.eye(3, 32)))
            stem = f"model.layers.{layer}.reft_layer.refts.a.units.{unit}."
            state = {f"projection.{k}": v.contiguous() for k, v in linear.state_dict().items()}
            source = torch.nn.Linear(32, 3)
            state |= {f"learned_source.{k}": v for k, v in source.state_dict().items()}
            tensors |= {stem + k: v for k, v in state.items()}
            want[layer, unit] = linear.weight.detach().numpy()
    import json

    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "adapter.safetensors")
    settings = dict(
        architecture="reft", layers="all", prefix_positions=3, suffix_positions=2, r=3, orthogonality=True,
        tied_weights=False, dropout=0.05, non_linearity=None, output_reft=True, dtype=None,
    )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"config": settings, "name": "a"}))
    file = load_adapter(tmp_path, model.table, params)
    assert file.method.name == "loreft" and file.method.positions == "f3+l2"
    (tap,) = file.overlay.values()
    for (layer, unit), R in want.items():
        np.testing.assert_allclose(tap.rotation[layer, unit], R, atol=2e-6)
