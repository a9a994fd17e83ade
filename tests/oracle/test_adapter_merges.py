"""Weighted merges of LoRAs against `add_weighted_adapter`, and several adapters of one folder each in use as in PEFT."""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ftjax.models import hf  # noqa: E402
from ftjax.peft.adapters import load_adapters  # noqa: E402
from ftjax.peft.interop import save_adapter  # noqa: E402
from ftjax.peft.merges import WAYS, merge_adapters  # noqa: E402
from ftjax.peft.modules import per_module  # noqa: E402
from tests.oracle import apart, our_logits, rows, torch_llama, torch_logits  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The density 1.0"),
]
CONFIGS = {
    "one": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "two": dict(r=4, lora_alpha=3, target_modules=["v_proj", "down_proj"], use_rslora=True),
    "three": dict(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
    "wide": dict(r=6, lora_alpha=6, target_modules=["q_proj", "up_proj"]),
}
PRUNING = {how: 1.0 if "dare" in how else 0.4 for how in WAYS if how not in ("linear", "cat", "svd")}
CASES = [(how, {"one": 0.7, "two": 0.5, "three": -0.4}, "total") for how in WAYS]
CASES += [(how, {"one": 1.0, "two": 2.0, "three": 0.3}, "frequency") for how in WAYS if "ties" in how]
CASES += [
    ("cat", {"one": 0.7, "wide": -0.5}, "total"),
    ("svd", {"one": 0.7, "wide": 0.5}, "total"),
    ("ties", {"three": -2.0}, "total"),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(our adapters, PEFT's model) with the same random LoRAs over the same base."""
    folder = tmp_path_factory.mktemp("base")
    torch_llama(folder)
    raw = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.get_peft_model(raw, peft.LoraConfig(**CONFIGS["one"]), adapter_name="one")
    for name in list(CONFIGS)[1:]:
        theirs.add_adapter(name, peft.LoraConfig(**CONFIGS[name]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    theirs.save_pretrained(folder / "all")
    model, params = hf.load(str(folder))
    return model, load_adapters(model, params, {name: folder / "all" / name for name in CONFIGS}), theirs.eval()


def test_in_use_as_there(opened):
    model, adapters, theirs = opened
    ids, mask = rows(97)
    names = ["wide", None, "two"]
    with theirs.disable_adapter():
        wants = {None: torch_logits(theirs, ids, mask)}
    for name in CONFIGS:
        theirs.set_adapter(name)
        wants[name] = torch_logits(theirs, ids, mask)
        assert (
            apart(our_logits(model, adapters.use(name), ids, mask), wants[name], mask)
            <= 1e-5 * np.abs(wants[name]).max()
        )
    mixed = our_logits(model, adapters.rows(names), ids, mask)
    want = np.stack([wants[name][i] for i, name in enumerate(names)])
    assert apart(mixed, want, mask) <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("how", "weights", "majority"), CASES, ids=lambda x: "+".join(x) if isinstance(x, dict) else x)
def test_merged_as_there(opened, tmp_path, how, weights, majority):
    model, adapters, theirs = opened
    density, rank = PRUNING.get(how), 5 if how.endswith("svd") else None
    file = merge_adapters(adapters, weights, how, rank=rank, density=density, majority=majority)
    theirs.add_weighted_adapter(
        list(weights),
        list(weights.values()),
        "merged",
        how,
        svd_rank=rank,
        density=density,
        majority_sign_method=majority,
    )
    ids, mask = rows(97)
    try:
        theirs.set_adapter("merged")
        for name, (_, entry) in per_module(file.overlay, model.table).items():
            module = theirs.get_submodule(f"base_model.model.{name}")
            a, b = (getattr(module, f"lora_{x}")["merged"].weight.detach().numpy().T for x in "AB")
            update = a @ b * module.scaling["merged"]
            assert np.abs(entry.scale * entry.a @ entry.b - update).max() <= 1e-5 * np.abs(update).max(), name
            if not how.endswith("svd") and how != "cat":
                np.testing.assert_allclose(entry.a, a, atol=1e-6)
        want = torch_logits(theirs, ids, mask)
    finally:
        theirs.set_adapter("one")
        theirs.delete_adapter("merged")
    merged = load_adapters(model, adapters.base, {"merged": file})
    assert apart(our_logits(model, merged.use("merged"), ids, mask), want, mask) <= 1e-5 * np.abs(want).max()
    save_adapter(tmp_path, file.overlay, model.table, file.method, base_path="base")
    again = load_adapters(model, adapters.base, {"merged": tmp_path}).files["merged"]
    ours, read = (per_module(f.overlay, model.table) for f in (file, again))
    jax.tree.map(
        np.testing.assert_array_equal, {n: e for n, (_, e) in ours.items()}, {n: e for n, (_, e) in read.items()}
    )


def test_rslora_first_is_too_large_there(opened):
    """PEFT gives the result alpha = r but keeps the first adapter's rule of scaling, alpha / sqrt(r)."""
    model, adapters, theirs = opened
    theirs.add_weighted_adapter(["two", "one"], [0.5, 0.5], "large", "cat")
    file = merge_adapters(adapters, {"two": 0.5, "one": 0.5}, "cat")
    for name, (_, entry) in per_module(file.overlay, model.table).items():
        module = theirs.get_submodule(f"base_model.model.{name}")
        a, b = (getattr(module, f"lora_{x}")["large"].weight.detach().numpy().T for x in "AB")
        want = sum(0.5 * module.get_delta_weight(n).detach().numpy().T for n in ("one", "two") if n in module.lora_A)
        update = entry.scale * entry.a @ entry.b
        assert np.abs(update - want).max() <= 1e-5 * np.abs(want).max()
        assert np.abs(np.sqrt(8) * update - a @ b * module.scaling["large"]).max() <= 1e-5 * 3 * np.abs(want).max()
