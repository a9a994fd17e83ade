"""Adapter folders against PEFT: ours open there, theirs open here, and merged models open in transformers."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from ftjax.models import hf  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.params import cut  # noqa: E402
from ftjax.peft.base import bind, merge  # noqa: E402
from ftjax.peft.interop import load_adapter, save_adapter  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from tests.oracle import apart, our_logits, rows, torch_llama, torch_logits  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

BIASED = dict(attention_bias=True, mlp_bias=True, num_hidden_layers=5)
OURS = {
    "all-linear": LoRA(rank=4, alpha=8.0),
    "rslora, q and v": LoRA(rank=8, alpha=3.5, targets=("q_proj", "v_proj"), rslora=True),
    "some layers": LoRA(rank=3, alpha=16.0, layers=(0, 1, 4)),
    "a layer pattern": LoRA(rank=2, targets=("layers[0:5]/down/w", "o"), layers=(3,)),
    "head too": LoRA(rank=2, alpha=1.0, targets=("lm_head", "*.mlp.*")),
    "dropout": LoRA(rank=4, dropout=0.3, targets=("gate_proj",)),
}
THEIRS = {
    "default": dict(r=8, lora_alpha=8),
    "rslora": dict(r=4, lora_alpha=7, use_rslora=True, target_modules=["k_proj", "up_proj"]),
    "all-linear": dict(r=2, lora_alpha=16, target_modules="all-linear"),
    "pattern": dict(r=2, target_modules=r"model\.layers\.(0|3)\.self_attn\.(q|o)_proj"),
    "layers": dict(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 2, 4]),
    "named layers": dict(r=2, target_modules=["q_proj"], layers_to_transform=[4], layers_pattern="layers"),
    "left out": dict(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=["model.layers.2.self_attn.q_proj"]),
    "ranks and alphas": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 32},
    ),
    "head too": dict(r=2, target_modules=["lm_head", "q_proj"]),
    "gaussian": dict(r=2, target_modules=["q_proj"], init_lora_weights="gaussian", lora_dropout=0.1),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(torch model's folder, model, params)"""
    folder = tmp_path_factory.mktemp("base")
    torch_llama(folder, **BIASED)
    return folder, *hf.load(str(folder))


@pytest.fixture(scope="module")
def plain(base):
    """Logits without an adapter."""
    _, model, params = base
    return our_logits(model, params, *rows(model.config.vocab_size))


def drawn(method, model, params):
    """An overlay with nothing zero."""
    overlay = method.init(jax.random.key(0), model.table, params)
    keys = {k: jax.random.key(i) for i, k in enumerate(overlay)}
    return {k: d.replace(b=0.3 * jax.random.normal(keys[k], d.b.shape)) for k, d in overlay.items()}


def opened(folder, adapter):
    """The torch model with the adapter laid over it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.filterwarnings("error:Found missing adapter keys", "error:Unexpected keyword arguments")
def test_ours_opens_there(base, plain, name, tmp_path, record_property):
    folder, model, params = base
    overlay = drawn(OURS[name], model, params)
    save_adapter(tmp_path, overlay, model.table, OURS[name], base_path=str(folder), card="# hello\n")
    theirs = opened(folder, tmp_path)
    ids, mask = rows(model.config.vocab_size)
    ours = our_logits(model, bind(params, overlay), ids, mask)
    gap = apart(ours, torch_logits(theirs, ids, mask), mask)
    record_property("max_abs", gap)
    assert gap < 1e-5 * max(1, np.abs(ours).max())
    assert apart(ours, plain, mask) > 0.1, "the adapter does nothing"

    state = [k for k in peft.get_peft_model_state_dict(theirs, save_embedding_layers=False) if "lora_" in k]
    back = load_adapter(tmp_path, model.table, params, base_path=str(folder))
    assert len(state) == 2 * sum(d.a.shape[0] if d.a.ndim == 3 else 1 for d in back.overlay.values())
    assert jax.tree.structure(back.overlay) == jax.tree.structure(overlay)
    jax.tree.map(np.testing.assert_array_equal, back.overlay, overlay)


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_opens_here(base, plain, name, tmp_path, record_property):
    folder, model, params = base
    torch.manual_seed(1)
    raw = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = peft.get_peft_model(raw, peft.LoraConfig(task_type="CAUSAL_LM", **THEIRS[name])).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_B" in key:
                p.copy_(torch.randn_like(p) * 0.3)
    theirs.save_pretrained(tmp_path)
    file = load_adapter(tmp_path, model.table, params, base_path=str(folder))
    ids, mask = rows(model.config.vocab_size)
    ours, want = our_logits(model, bind(params, file.overlay), ids, mask), torch_logits(theirs, ids, mask)
    record_property("max_abs", apart(ours, want, mask))
    assert apart(ours, want, mask) < 1e-5 * max(1, np.abs(want).max())
    assert apart(ours, plain, mask) > 0.01, "the adapter does nothing"

    save_adapter(tmp_path / "again", file.overlay, model.table, file.method, base_path=str(folder))
    assert apart(torch_logits(opened(folder, tmp_path / "again"), ids, mask), want, mask) < 1e-6 * np.abs(want).max()


def test_five_keys_are_enough(base, tmp_path):
    """What other writers leave out has PEFT's own default; what decides the function may not be left out."""
    folder, model, params = base
    overlay = drawn(LoRA(rank=4, alpha=8.0, targets=("q_proj",)), model, params)
    save_adapter(tmp_path, overlay, model.table, LoRA(rank=4, alpha=8.0, targets=("q_proj",)), base_path="")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, model.table, params).overlay, overlay)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_folder_opens_in_transformers(base, dtype, tmp_path):
    folder, _, _ = base
    model, params = hf.load(str(folder), dtype=dtype)
    method = LoRA(rank=4, layers=(1, 2))
    overlay = drawn(method, model, params)
    merged = merge(bind(params, overlay), model.table)
    assert merged.keys() == params.keys()
    hf.save(model, merged, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype="auto"
    ).eval()
    assert str(theirs.dtype) == f"torch.{dtype}"
    ids, mask = rows(model.config.vocab_size)
    if dtype == "float32":
        adapted = our_logits(model, bind(params, overlay), ids, mask)
        assert apart(torch_logits(theirs, ids, mask), adapted, mask) < 1e-5 * np.abs(adapted).max()
    again, back = hf.load(str(tmp_path), dtype=dtype)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, back, merged)

    # PEFT's own merge of the same adapter, rounded to the same dtype
    save_adapter(tmp_path / "adapter", overlay, model.table, method, base_path=str(folder))
    want = dict(opened(folder, tmp_path / "adapter").merge_and_unload().named_parameters())
    for name, value in to_file_tensors(model.table, merged):
        rounded = want[name].detach().to(theirs.dtype).float().numpy()
        limit = 1e-6 if dtype == "float32" else 2**-7 * np.abs(rounded).max()
        assert apart(value.astype(np.float32), rounded) <= limit, name


def test_stored_dtypes(base, tmp_path):
    """PEFT writes adapters of half-precision models in half precision; here they are float32."""
    folder, model, params = base
    for dtype in (torch.bfloat16, torch.float16):
        raw = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        theirs = peft.get_peft_model(raw, peft.LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False)
        theirs.save_pretrained(tmp_path / str(dtype))
        file = load_adapter(tmp_path / str(dtype), model.table, params)
        delta = file.overlay["layers[0:5]/q/w"]
        assert delta.a.dtype == jnp.float32
        a = theirs.get_parameter("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight")
        assert a.dtype == dtype
        np.testing.assert_array_equal(delta.a[3], a.detach().float().numpy().T)


def test_cut_base_gives_the_same(base):
    """`bind` cuts by itself; a base that was cut at load gives the same logits."""
    _, model, params = base
    overlay = drawn(LoRA(rank=2, layers=(2,)), model, params)
    ids, mask = rows(model.config.vocab_size)
    one = our_logits(model, bind(params, overlay), ids, mask)
    two = our_logits(model, bind(cut(params, {"layers": (1, 2, 3)}), overlay), ids, mask)
    np.testing.assert_allclose(one, two, atol=1e-5)
