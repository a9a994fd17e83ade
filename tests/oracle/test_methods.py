"""Weight-level methods against PEFT: random adapters exported here and opened there, made there and opened here, gradients."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ftjax import api, registry  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.params import bounds, cut  # noqa: E402
from ftjax.peft.base import bind, merge  # noqa: E402
from ftjax.peft.interop import load_adapter, save_adapter  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from ftjax.peft.modules import per_module  # noqa: E402
from ftjax.peft.norms import Norms, norm_keys  # noqa: E402
from tests.oracle import apart, our_logits, rows, torch_llama, torch_logits  # noqa: E402
from tests.oracle.test_decoders import torch_decoder  # noqa: E402
from tests.oracle.test_encoders import torch_model  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]
TARGETS = ["q_proj", "v_proj", "down_proj"]
# our method with its settings -> PEFT's configuration of the same
METHODS = {
    "dora": (
        dict(rank=4, alpha=8.0, targets=tuple(TARGETS)),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=TARGETS),
    ),
    "lora ranks": (
        dict(
            rank=4,
            alpha=8.0,
            targets=tuple(TARGETS),
            ranks=(("down_proj", 7), ("*.self_attn.*", 3)),
            alphas=(("v", 5.0),),
        ),
        lambda: peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=TARGETS,
            rank_pattern={"down_proj": 7, r".*\.self_attn\..*": 3},
            alpha_pattern={"v_proj": 5},
        ),
    ),
    "lora gaussian": (
        dict(rank=3, alpha=3.0, targets=tuple(TARGETS), start="gaussian", rslora=True),
        lambda: peft.LoraConfig(
            r=3, lora_alpha=3, target_modules=TARGETS, init_lora_weights="gaussian", use_rslora=True
        ),
    ),
    "ia3": (
        dict(targets=("k_proj", "v_proj"), inputs=("down_proj",)),
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "lokr": (
        dict(rank=2, alpha=6.0, targets=tuple(TARGETS)),
        lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS),
    ),
    "loha": (
        dict(rank=3, alpha=6.0, targets=tuple(TARGETS)),
        lambda: peft.LoHaConfig(r=3, alpha=6, target_modules=TARGETS),
    ),
    "vera": (
        dict(rank=6, targets=tuple(TARGETS)),
        lambda: peft.VeraConfig(r=6, target_modules=TARGETS),
    ),
    "adalora": (
        dict(rank=5, target=2, alpha=6.0, targets=tuple(TARGETS)),
        lambda: peft.AdaLoraConfig(init_r=5, target_r=2, lora_alpha=6, total_step=10, target_modules=TARGETS),
    ),
    "sparse": (
        dict(rank=3, targets=tuple(TARGETS)),
        lambda: peft.ShiraConfig(r=3, target_modules=TARGETS),
    ),
    "sparse drawn": (
        dict(rank=2, choose="random", draw=5, layers=(0, 2), targets=tuple(TARGETS)),
        lambda: peft.ShiraConfig(r=2, random_seed=5, target_modules=r".*\.[02]\..*\.(q|v|down)_proj"),
    ),
    "oft": (
        dict(block_size=4, targets=tuple(TARGETS)),
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    ),
    "oft exact": (
        dict(blocks=4, exact=True, targets=tuple(TARGETS)),
        lambda: peft.OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=TARGETS),
    ),
    "oft shared": (
        dict(block_size=8, share=True, terms=3, targets=tuple(TARGETS)),
        lambda: peft.OFTConfig(oft_block_size=8, block_share=True, num_cayley_neumann_terms=3, target_modules=TARGETS),
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_llama(folder, num_hidden_layers=3, attention_bias=True)
    return folder, *hf.load(str(folder))


def theirs_of(folder, adapter):
    raw = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(raw, adapter).eval()


def drawn(method, model, params, seed=0):
    """The method's overlay with every trained leaf moved at random."""
    overlay = method.init(jax.random.key(seed), model.table, params)
    trained = set(type(method).trained) if hasattr(type(method), "trained") else {"a", "b", "m"}
    keys = iter(jax.random.split(jax.random.key(9), 1000))

    def one(path, x):
        name = path[-1].name
        return x + 0.2 * jax.random.normal(next(keys), x.shape) if name in trained else x

    return jax.tree_util.tree_map_with_path(one, overlay)


@pytest.mark.parametrize("name", METHODS)
def test_exported_here_opened_there(base, tmp_path, name):
    folder, model, params = base
    method = registry.get("peft", name.split()[0])(**METHODS[name][0])
    overlay = drawn(method, model, params)
    save_adapter(tmp_path, overlay, model.table, method, base_path=str(folder))
    ids, mask = rows(97)
    bound = bind(cut(params, bounds(overlay)), overlay)
    ours, want = our_logits(model, bound, ids, mask), torch_logits(theirs_of(folder, tmp_path), ids, mask)
    assert apart(ours, want, mask) <= 1e-5 * np.abs(want).max()
    assert apart(want, torch_logits(transformers.AutoModelForCausalLM.from_pretrained(folder), ids, mask), mask) > 1e-3
    if type(method).mergeable:
        folded = our_logits(model, merge(bound, model.table), ids, mask)
        assert apart(folded, ours, mask) <= 2e-5 * np.abs(want).max()
    file = load_adapter(tmp_path, model.table, params)
    assert type(file.method) is type(method)
    jax.tree.map(np.testing.assert_array_equal, file.overlay, overlay)


@pytest.mark.parametrize("name", METHODS)
def test_made_there_opened_here_with_gradients(base, tmp_path, name):
    folder, model, params = base
    torch.manual_seed(0)
    raw = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.get_peft_model(raw, METHODS[name][1]())
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    ids, mask = rows(97)
    opened, bound = api.load_pretrained(folder, adapter=tmp_path)
    want = torch_logits(theirs.eval(), ids, mask)
    assert apart(our_logits(opened, bound, ids, mask), want, mask) <= 1e-5 * np.abs(want).max()

    direction = np.random.default_rng(0).normal(size=want.shape).astype(np.float32) * mask[..., None]
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions)
    (out.logits * torch.tensor(direction)).sum().backward()
    file = load_adapter(tmp_path, model.table, params)
    inputs = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask, jnp.int32)}

    def loss(overlay):
        return (model.apply(bind(cut(params, bounds(overlay)), overlay), inputs).logits * direction).sum()

    grads = jax.jit(jax.grad(loss, allow_int=True))(file.overlay)
    codec = type(file.method).hf_codec
    ours = {
        f"{module}.{array}": value
        for module, (_, entry) in per_module(grads, model.table).items()
        for array, value in codec.arrays(entry).items()
        if value.dtype != jax.dtypes.float0  # the places of sparse tuning are whole numbers
    }
    named = {n.replace("base_model.model.", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    seen = 0
    for full, grad in named.items():
        key = full.replace(".default", "").removesuffix(".weight")
        mine = next(v for k, v in ours.items() if k.removesuffix(".weight") == key)
        scale = float(grad.abs().max())
        assert np.abs(mine - grad.numpy()).max() <= 1e-3 * scale + 1e-6, full
        seen += 1
    assert seen == len(ours)


# Methods that read a module's width: on fused and transposed weights too
OTHERS = {
    "vera": (
        lambda names: dict(rank=6, targets=tuple(names)),
        lambda names, straight: peft.VeraConfig(r=6, target_modules=names, fan_in_fan_out=straight),
    ),
    "oft": (
        lambda names: dict(block_size=4, targets=tuple(names)),
        lambda names, straight: peft.OFTConfig(oft_block_size=4, target_modules=names, fan_in_fan_out=straight),
    ),
}
FAMILIES = {
    "gpt2": (lambda folder: torch_decoder(folder, "GPT2", {}), ["c_attn", "c_proj"], "AutoModelForCausalLM"),
    "bert": (lambda folder: torch_model(folder, "bert", "MaskedLM"), ["query", "output.dense"], "AutoModelForMaskedLM"),
}


def straightened(model):
    """The same model with torch's Linear in place of Conv1D, for which PEFT has no OFT."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, transformers.pytorch_utils.Conv1D):
                linear = torch.nn.Linear(*child.weight.shape)
                linear.load_state_dict({"weight": child.weight.T, "bias": child.bias})
                setattr(parent, name, linear)
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_both_ways(tmp_path, family, name):
    make, names, auto = FAMILIES[family]
    make(tmp_path / "base")
    model, params = hf.load(str(tmp_path / "base"))
    auto = getattr(transformers, auto)

    def fresh():
        raw = auto.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager").eval()
        return straightened(raw) if name == "oft" else raw

    raw = fresh()
    ids, mask = rows(97)
    ours_of, theirs_config = OTHERS[name]

    method = registry.get("peft", name.split()[0])(**ours_of(names))
    overlay = drawn(method, model, params)
    save_adapter(tmp_path / "ours", overlay, model.table, method, base_path=str(tmp_path), task_type=None)
    bound = bind(cut(params, bounds(overlay)), overlay)
    plain, ours = torch_logits(raw, ids, mask), our_logits(model, bound, ids, mask)
    want = torch_logits(peft.PeftModel.from_pretrained(raw, tmp_path / "ours").eval(), ids, mask)
    assert apart(ours, want, mask) <= 1e-5 * np.abs(want).max() and apart(want, plain, mask) > 1e-3
    assert apart(our_logits(model, merge(bound, model.table), ids, mask), want, mask) <= 2e-5 * np.abs(want).max()

    torch.manual_seed(0)
    theirs = peft.get_peft_model(fresh(), theirs_config(names, family == "gpt2"))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    file = load_adapter(tmp_path / "theirs", model.table, params)
    want = torch_logits(theirs.eval(), ids, mask)
    ours = our_logits(model, bind(cut(params, bounds(file.overlay)), file.overlay), ids, mask)
    assert apart(ours, want, mask) <= 1e-5 * np.abs(want).max()


NORMS = {
    "llama": (lambda folder: torch_llama(folder), None, "AutoModelForCausalLM"),
    "some of llama": (
        lambda folder: torch_llama(folder),
        r".*\.[02]\.input_layernorm|model\.norm",
        "AutoModelForCausalLM",
    ),
    "gpt2": (lambda folder: torch_decoder(folder, "GPT2", {}), None, "AutoModelForCausalLM"),
    "bert": (lambda folder: torch_model(folder, "bert", "MaskedLM"), ["LayerNorm"], "AutoModelForMaskedLM"),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT of every norm
@pytest.mark.parametrize("case", NORMS)
def test_norms_both_ways(tmp_path, case):
    make, targets, auto = NORMS[case]
    make(tmp_path / "base")
    auto = getattr(transformers, auto)
    model, params = hf.load(str(tmp_path / "base"))
    ids, mask = rows(97)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), peft.LNTuningConfig(target_modules=targets))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    file = load_adapter(tmp_path / "theirs", model.table, params)
    assert type(file.method) is Norms and not file.overlay
    want = torch_logits(theirs.eval(), ids, mask)
    assert apart(our_logits(model, params | file.saved, ids, mask), want, mask) <= 1e-5 * np.abs(want).max()

    moved = {k: np.asarray(params[k]) + 0.1 for k in norm_keys(model.table)}
    save_adapter(tmp_path / "ours", {}, model.table, Norms(), base_path=str(tmp_path), task_type=None, saved=moved)
    plain = auto.from_pretrained(tmp_path / "base")
    without = torch_logits(plain.eval(), ids, mask)
    want = torch_logits(peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval(), ids, mask)
    assert apart(our_logits(model, params | moved, ids, mask), want, mask) <= 1e-5 * np.abs(want).max()
    assert apart(without, want, mask) > 1e-3


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_from_the_weight(base, tmp_path, start, rslora):
    """The same part is taken off; trained there or here, the result is plain LoRA of twice the rank on the first base."""
    folder, model, params = base
    settings = dict(target_modules=TARGETS, r=4, lora_alpha=6, use_rslora=rslora)
    raw = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.get_peft_model(raw, peft.LoraConfig(init_lora_weights=start, **settings))
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's manual has it, before the conversion
    theirs.save_pretrained(tmp_path / "initial")
    method = LoRA(rank=4, alpha=6.0, targets=tuple(TARGETS), start=start, rslora=rslora)
    overlay = method.init(jax.random.key(0), model.table, params)

    def of_theirs(what):
        found = {}
        for key, entry in overlay.items():
            hf_name = model.table[key].hf.removesuffix(".weight")
            layers = [theirs.get_submodule(f"base_model.model.{hf_name.format(i)}") for i in range(len(entry.a))]
            found[key] = [np.stack([what(m, x).detach().numpy().T for m in layers]) for x in ("lora_A", "lora_B")]
        return found

    def weight(m, x):
        return getattr(m, x)["default"].weight

    for key, (a, b) in of_theirs(weight).items():
        want = a @ b
        assert np.abs(overlay[key].a @ overlay[key].b - want).max() <= 1e-5 * np.abs(want).max()
        np.testing.assert_array_equal(overlay[key].a, overlay[key].a0)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    trained = {k: overlay[k].replace(a=jnp.asarray(a), b=jnp.asarray(b)) for k, (a, b) in of_theirs(weight).items()}

    ids, mask = rows(97)
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions)
    want = out.logits.detach().numpy()
    direction = np.random.default_rng(0).normal(size=want.shape).astype(np.float32) * mask[..., None]
    (out.logits * torch.tensor(direction)).sum().backward()
    inputs = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask, jnp.int32)}

    def loss(o):
        logits = model.apply(bind(cut(params, bounds(o)), o), inputs).logits
        return (logits * direction).sum(), logits

    grads, ours = jax.jit(jax.grad(loss, has_aux=True))(trained)
    assert apart(np.asarray(ours), want, mask) <= 1e-5 * np.abs(want).max()
    for key, pair in of_theirs(lambda m, x: weight(m, x).grad).items():
        for mine, other in zip((grads[key].a, grads[key].b), pair, strict=True):
            assert np.abs(mine - other).max() <= 1e-3 * np.abs(other).max()

    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    file = load_adapter(tmp_path / "theirs", model.table, params)
    assert file.method.rank == 8
    opened = our_logits(model, bind(cut(params, bounds(file.overlay)), file.overlay), ids, mask)
    assert apart(opened, want, mask) <= 1e-5 * np.abs(want).max()
    save_adapter(tmp_path / "ours", trained, model.table, method, base_path=str(folder))
    assert apart(torch_logits(theirs_of(folder, tmp_path / "ours"), ids, mask), want, mask) <= 1e-5 * np.abs(want).max()


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT of weights that keep no rank
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT of its own AdaLoRA files too
def test_adalora_pruned_both_ways(base, tmp_path):
    """PEFT's own allocator prunes; the file comes back with zeros, and is pruned alike when written here, whole ranks too."""
    folder, model, params = base
    torch.manual_seed(0)
    raw = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, lora_alpha=6, total_step=8, tinit=1, tfinal=2, target_modules=TARGETS
    )
    theirs = peft.get_peft_model(raw, config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    ids, mask = rows(97)
    for step in range(8):
        theirs.zero_grad()
        theirs(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
        theirs.base_model.update_and_allocate(step)
    theirs.save_pretrained(tmp_path / "theirs")
    want = torch_logits(theirs.eval(), ids, mask)
    file = load_adapter(tmp_path / "theirs", model.table, params)
    assert {e.e.shape[-1] for e in file.overlay.values()} == {4}
    left = [int((np.asarray(e) != 0).sum()) for d in file.overlay.values() for e in d.e]
    assert sum(left) <= len(left) and max(left) > 1 and min(left) == 0  # a budget of 1 per weight, unevenly spent
    bound = bind(cut(params, bounds(file.overlay)), file.overlay)
    ours = our_logits(model, bound, ids, mask)
    assert apart(ours, want, mask) <= 1e-5 * np.abs(want).max()

    save_adapter(tmp_path / "ours", file.overlay, model.table, file.method, base_path=str(folder))
    assert apart(torch_logits(theirs_of(folder, tmp_path / "ours"), ids, mask), want, mask) <= 1e-5 * np.abs(want).max()
    patterns = [
        json.loads((tmp_path / x / "adapter_config.json").read_text())["rank_pattern"] for x in ("ours", "theirs")
    ]
    assert patterns[0] == patterns[1]
    again = load_adapter(tmp_path / "ours", model.table, params)
    jax.tree.map(np.testing.assert_array_equal, again.overlay, file.overlay)


@pytest.mark.parametrize("every", [1, 3])
def test_adalora_budget(base, tmp_path, every):
    """Nine steps of plain descent: the same triplets fall, and every number goes the same way."""
    folder, model, params = base
    torch.manual_seed(0)
    raw = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total, lr = 9, 0.1
    numbers = dict(tinit=2, tfinal=2, deltaT=every, beta1=0.8, beta2=0.7, orth_reg_weight=0.3)
    config = peft.AdaLoraConfig(  # without a task PEFT leaves the orthogonal term out
        init_r=4, target_r=2, lora_alpha=6, total_step=total, target_modules=TARGETS, task_type="CAUSAL_LM", **numbers
    )
    theirs = peft.get_peft_model(raw, config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    file = load_adapter(tmp_path, model.table, params)
    method = file.method
    assert (method.target, method.hold, method.settle, method.every) == (2, 2, 2, every)
    ids = np.random.default_rng(0).integers(3, 90, (3, 11))

    fixed = {k: d.replace(a=None, e=None, b=None) for k, d in file.overlay.items()}
    state = {"overlay": {k: d.replace(scale=None, rate=None) for k, d in file.overlay.items()}}

    def loss(tree):
        overlay = {k: d.replace(scale=fixed[k].scale) for k, d in tree["overlay"].items()}
        logits = model.apply(bind(params, overlay), {"input_ids": jnp.asarray(ids, jnp.int32)}).logits
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(ids[:, 1:, None]), -1).mean()

    @jax.jit
    def descend(tree, opt, step):
        tx = method.around(optax.sgd(lr), {"total": jnp.float32(total)}, step)
        updates, opt = tx.update(jax.grad(loss)(tree), opt, tree)
        return optax.apply_updates(tree, updates), opt

    opt = method.around(optax.sgd(lr), {"total": jnp.float32(total)}, jnp.int32(0)).init(state)
    sgd = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=lr)
    left = []
    for step in range(total):
        state, opt = descend(state, opt, jnp.int32(step))
        sgd.zero_grad()
        theirs(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
        sgd.step()
        theirs.base_model.update_and_allocate(step)
        named = {n.replace("base_model.model.", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
        kept = 0
        for module, (_, entry) in per_module(state["overlay"], model.table).items():
            for array, value in type(method).hf_codec.arrays(entry).items():
                want = named[f"{module}.{array}.default"].detach().numpy()
                assert np.abs(value - want).max() <= 2e-5 * np.abs(want).max() + 1e-6, (step, module, array)
            np.testing.assert_array_equal(entry.e == 0, named[f"{module}.lora_E.default"].detach().numpy()[:, 0] == 0)
            kept += int((entry.e != 0).sum())
        left.append(kept)
    assert left[2] == 36 and left[-1] == 18, left
    assert every > 1 or left == sorted(left, reverse=True), left  # between two choices e may leave 0 again
