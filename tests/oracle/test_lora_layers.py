"""LoRA on convolutions and embeddings against PEFT: files both ways, gradients, merging; tied heads stay as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file  # noqa: E402

from ftjax.errors import ConfigError  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.vocab import untie  # noqa: E402
from ftjax.peft.base import bind, merge  # noqa: E402
from ftjax.peft.interop import load_adapter, save_adapter  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from ftjax.peft.modules import per_module  # noqa: E402
from tests import tinymodels  # noqa: E402
from tests.oracle import apart, relative, rows, torch_llama  # noqa: E402
from tests.oracle.test_decoders import torch_decoder  # noqa: E402
from tests.oracle.test_encoders import torch_model  # noqa: E402
from tests.oracle.test_vision import RESNETS, VITS, images_for, torch_resnet, torch_vit  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
GEMMA = {
    "tie_word_embeddings": True,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
}


def _saved(make):
    return lambda folder: make().save_pretrained(folder)


# name -> (torch model into a folder, our targets, PEFT's)
BASES = {
    **{
        f"resnet {name}": (_saved(lambda n=name: torch_resnet(**RESNETS[n])), ("all-linear",), ["convolution"])
        for name in RESNETS
    },
    "resnet some": (
        _saved(lambda: torch_resnet(**RESNETS["basic, two channels"])),
        ("resnet.embedder.*", "shortcut.convolution", "*/block0/conv2"),
        r"resnet.embedder.embedder.convolution|.*\.shortcut\.convolution|.*\.layers\.0\.layer\.1\.convolution",
    ),
    "vit": (_saved(lambda: torch_vit(**VITS["many heads"])), ("patches",), ["projection"]),
    "llama": (torch_llama, ("embed_tokens", "q_proj"), ["embed_tokens", "q_proj"]),
    "llama tied": (lambda f: torch_llama(f, tie_word_embeddings=True), ("embed",), ["embed_tokens"]),
    "gpt2 tied": (lambda f: torch_decoder(f, "GPT2", {}), ("wte", "positions", "c_attn"), ["wte", "wpe", "c_attn"]),
    "gpt2 positions": (lambda f: torch_decoder(f, "GPT2", {}), ("wpe",), ["wpe"]),
    "bert tied": (
        lambda f: torch_model(f, "bert", "MaskedLM"),
        ("embed", "types", "position_embeddings", "query"),
        ["word_embeddings", "token_type_embeddings", "position_embeddings", "query"],
    ),
    "bert classes": (
        lambda f: torch_model(f, "bert", "SequenceClassification"), ("word_embeddings",), ["word_embeddings"],
    ),
    "gemma tied scaled": (lambda f: torch_decoder(f, "Gemma2", GEMMA), ("embed", "o"), ["embed_tokens", "o_proj"]),
}  # fmt: skip
CLASSES = {
    "resnet": "AutoModelForImageClassification", "vit": "AutoModelForImageClassification",
    "bert": "AutoModelForMaskedLM", "bert classes": "AutoModelForSequenceClassification",
}  # fmt: skip


class Case:
    """A base of both sides and a batch for it."""

    def __init__(self, name, folder):
        make, self.targets, self.theirs = BASES[name]
        make(folder)
        self.folder, self.cls = folder, CLASSES.get(name) or CLASSES.get(name.split()[0], "AutoModelForCausalLM")
        self.model, self.params = hf.load(str(folder))
        self.tied = " tied" in name or name == "gpt2 positions"
        raw = self.raw()
        if hasattr(raw.config, "vocab_size"):
            ids, self.mask = rows(raw.config.vocab_size)
            self.inputs = {"input_ids": np.where(self.mask > 0, ids, 0), "attention_mask": self.mask}
            if name.startswith("bert"):
                self.inputs["token_type_ids"] = (np.arange(ids.shape[1])[None] > 5).astype(np.int64) * self.mask
        else:
            self.inputs, self.mask = {"pixel_values": images_for(raw)}, None

    def raw(self):
        return getattr(transformers, self.cls).from_pretrained(
            self.folder, dtype=torch.float32, **({} if self.cls.endswith("ImageClassification") else
            {"attn_implementation": "eager"}),
        ).eval()  # fmt: skip

    def ours(self, params, model=None):
        inputs = {k: jnp.asarray(v, jnp.float32 if v.dtype.kind == "f" else jnp.int32) for k, v in self.inputs.items()}
        apply = (model or self.model).apply
        return jax.jit(lambda p: apply(p, inputs).logits)(params)

    def logits(self, model):
        return model(**{k: torch.tensor(v) for k, v in self.inputs.items()}).logits

    def want(self, model):
        with torch.no_grad():
            return self.logits(model).float().numpy()

    def apart(self, a, b):
        return apart(np.asarray(a), np.asarray(b), self.mask if self.mask is not None and a.ndim == 3 else None)

    def method(self, **changes):
        small = {"ranks": (("types", 2),)} if "types" in self.targets else {}  # a table of two rows
        return LoRA(**({"rank": 3, "alpha": 6.0, "targets": self.targets} | small | changes))


@pytest.fixture(params=BASES, scope="module")
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("base"))


def drawn(overlay):
    """No A or B of zeros."""
    return {
        k: d.replace(**{
            x: 0.3 * jax.random.normal(jax.random.key(i + 7 * (x == "a")), getattr(d, x).shape) for x in "ab"
        })
        for i, (k, d) in enumerate(overlay.items())
    }  # fmt: skip


def test_files_both_ways(case, tmp_path, record_property):
    method = case.method(dropout=0.1, rslora=True)
    overlay = method.init(jax.random.key(0), case.model.table, case.params)
    plain = case.ours(case.params)
    assert (np.asarray(case.ours(bind(case.params, overlay))) == np.asarray(plain)).all()
    overlay = drawn(overlay)
    save_adapter(tmp_path, overlay, case.model.table, method, base_path=str(case.folder), task_type=None)
    theirs = peft.PeftModel.from_pretrained(case.raw(), tmp_path).eval()
    ours, want = case.ours(bind(case.params, overlay)), case.want(theirs)
    gap = case.apart(ours, want)
    record_property("max_abs", gap)
    assert gap <= 1e-5 * max(1, np.abs(want).max())
    assert case.apart(want, plain) > 1e-2, "the adapter does nothing"
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    kept = {k.replace(".default", "") for k, _ in theirs.named_parameters() if "lora_" in k}
    assert kept == names, "PEFT has made other modules of it"

    theirs.save_pretrained(tmp_path / "again")  # with a copy of the embedding, if its name is one that PEFT knows
    file = load_adapter(tmp_path / "again", case.model.table, case.params)
    jax.tree.map(np.testing.assert_array_equal, file.overlay, overlay)


def torch_adapted(case, **settings):
    """PEFT's own adapter with nothing zero."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=case.theirs, **settings)
    theirs = peft.get_peft_model(case.raw(), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    return theirs


def test_theirs_opens_here_with_equal_gradients(case, tmp_path, record_property):
    theirs = torch_adapted(case)
    theirs.save_pretrained(tmp_path)
    file = load_adapter(tmp_path, case.model.table, case.params)
    logits = case.logits(theirs)
    want = logits.detach().numpy()
    assert case.apart(case.ours(bind(case.params, file.overlay)), want) <= 1e-5 * max(1, np.abs(want).max())

    direction = np.random.default_rng(0).normal(size=want.shape).astype(np.float32)
    direction *= case.mask[..., None] if case.mask is not None and want.ndim == 3 else 1
    (logits * torch.tensor(direction)).sum().backward()
    wanted = {
        k.replace(".default", "").removeprefix("base_model.model."): p.grad.numpy()
        for k, p in theirs.named_parameters() if "lora_" in k
    }  # fmt: skip
    grads = jax.grad(lambda o: (case.ours(bind(case.params, o)) * direction).sum())(file.overlay)
    mine = {
        f"{name}.{part}": x for name, (_, entry) in per_module(grads, case.model.table).items()
        for part, x in LoRA.hf_codec.arrays(entry).items()
    }  # fmt: skip
    assert set(mine) == set(wanted)
    gaps = {k: relative(mine[k], wanted[k]) for k in wanted}
    record_property("largest_relative", max(gaps.values()))
    assert max(gaps.values()) < 1e-3, {k: v for k, v in gaps.items() if v >= 1e-3}


def test_merge(case, tmp_path):
    overlay = drawn(case.method().init(jax.random.key(0), case.model.table, case.params))
    bound, model = bind(case.params, overlay), case.model
    if case.tied and "embed/w" in overlay:
        with pytest.raises(ConfigError, match="embed/w is the output head too"):
            merge(bound, model.table)
        want = case.ours(bound)
        model, bound = untie(model, bound)
        assert case.apart(case.ours(bound, model), want) <= 1e-6 * np.abs(want).max()
    merged = merge(bound, model.table)
    want = case.ours(bound, model)
    assert case.apart(case.ours(merged, model), want) <= 2e-5 * max(1, np.abs(want).max())
    hf.save(model, merged, tmp_path / "merged")
    opened = getattr(transformers, case.cls).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert case.apart(case.want(opened), want) <= 2e-5 * max(1, np.abs(want).max())

    save_adapter(tmp_path, overlay, case.model.table, case.method(), base_path="", task_type=None)
    if not case.tied:  # where it is, PEFT's merge in memory changes the head with the table
        theirs = peft.PeftModel.from_pretrained(case.raw(), tmp_path).merge_and_unload()
        assert case.apart(case.want(theirs.eval()), want) <= 2e-5 * max(1, np.abs(want).max())


def test_first_values_are_spread_as_theirs(tmp_path):
    """Convolutions: A within 1 / sqrt(fan in). Embeddings: A zero and B standard normal."""
    case = Case("resnet basic, two channels", tmp_path / "r")
    overlay = case.method(rank=6).init(jax.random.key(0), case.model.table, case.params)
    theirs = peft.get_peft_model(case.raw(), peft.LoraConfig(r=6, target_modules=["convolution"]))
    for name, (_, delta) in per_module(overlay, case.model.table).items():
        a = theirs.get_parameter(f"base_model.model.{name}.lora_A.default.weight").detach().numpy()
        fan = a[0].size
        assert max(np.abs(delta.a).max(), np.abs(a).max()) <= fan**-0.5
        assert min(np.abs(delta.a).max(), np.abs(a).max()) > 0.9 * fan**-0.5
    case = Case("llama", tmp_path / "l")
    delta = case.method(rank=16, targets=("embed",)).init(jax.random.key(0), case.model.table, case.params)["embed/w"]
    assert (delta.a == 0).all() and delta.b.shape == (16, 32)
    assert abs(float(delta.b.std()) - 1) < 0.1 and abs(float(delta.b.mean())) < 0.1
    wide = case.method(rank=20, targets=("embed",)).init(jax.random.key(0), case.model.table, case.params)["embed/w"]
    np.testing.assert_array_equal(wide.b[:16], delta.b)


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(targets=("embed",), start="pissa"), "peft.start='pissa' is for matrices, which embed/w is not"),
        (dict(targets=("embed",), train_a=False), "A of embed/w begins at zero"),
        (dict(targets=("embed",), rank=33), "peft.rank=33 exceeds 32, the smaller side of embed/w"),
        (dict(targets=("embedding",)), "embed_tokens"),
    ],
)
def test_refused(tmp_path, settings, text):
    torch_llama(tmp_path)
    model, params = hf.load(str(tmp_path))
    with pytest.raises(ConfigError, match=text):
        LoRA(**settings).init(jax.random.key(0), model.table, params)


def test_t5_has_no_module_for_its_common_table():
    """PEFT adapts the lookups of its two sides one by one; the biases by position are modules of their own."""
    table = tinymodels.known()["t5"]().table
    with pytest.raises(ConfigError, match="peft.targets='embed' matches no weight"):
        LoRA(targets=("embed",)).keys(table)
    assert LoRA(rank=4, targets=("relative_attention_bias",)).keys(table) == ["encoder_bias/w", "decoder_bias/w"]
