"""Methods together: labels and groups apart, clear refusals, the same start as alone, export and what comes back, resume."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax import config, params
from ftjax.configfile import dump, load
from ftjax.errors import ConfigError, DataError
from ftjax.headspec import HeadSpec
from ftjax.models.base import Numerics
from ftjax.params import bounds, cut
from ftjax.peft.adapter import Parallel, Pfeiffer
from ftjax.peft.adapters import load_adapters
from ftjax.peft.base import CONST, bind, cut_for, merge
from ftjax.peft.combined import Combine
from ftjax.peft.compacter import Compacter
from ftjax.peft.full import Full
from ftjax.peft.gates import Gated
from ftjax.peft.ia3 import IA3
from ftjax.peft.interop import head_of, load_adapter, save_adapter
from ftjax.peft.lora import LoRA
from ftjax.peft.norms import Norms
from ftjax.peft.prefix import Prefix
from ftjax.peft.prompt import Prompt
from ftjax.peft.selective import BitFit, Partial
from ftjax.peft.vera import VeRA
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.state import whole
from tests import tiny

QV = ("q", "v")
TOGETHER = {
    "mam": (Prefix(tokens=3), Parallel(reduction=4)),
    "unipelt": (LoRA(rank=2, targets=QV, dropout=0.1), Prefix(tokens=3), Pfeiffer(reduction=4)),
    "bitfit and lora": (BitFit(), LoRA(rank=2, targets=QV)),
    "layers apart": (Partial(last=2), LoRA(rank=2, layers=(0,)), IA3(targets=("v",), inputs=(), layers=(1,))),
    "norms, bitfit's kin": (Norms(), VeRA(rank=4, targets=("q",)), Prompt(tokens=2), Compacter(reduction=4)),
    "full": (Prefix(tokens=2), Full()),
}


def model_of(head=None):
    return tiny.llama(attention_bias=True, mlp_bias=True, head=head)


@pytest.mark.parametrize("name", TOGETHER)
def test_each_part_is_what_it_is_alone(name):
    model, combined = model_of(), Combine(methods=TOGETHER[name])
    together = tiny.tiny(combined, model=model)
    groups = dict(_groups(together.parts))
    seen: set[str] = set()
    for method in TOGETHER[name]:
        alone = tiny.tiny(method, model=model)
        for key, entry in alone.overlay.items():
            jax.tree.map(np.testing.assert_array_equal, together.overlay[key], entry)
        for path, group in _groups(alone.parts):
            inside = [k for k in groups if _within(k, path)]
            assert inside and {groups[k] for k in inside} == {group}, path
            seen |= set(inside)
    assert seen == set(groups)
    assert combined.mergeable == all(m.mergeable for m in combined.methods)
    assert combined.identity_at_init == all(m.identity_at_init for m in combined.methods)


def _groups(parts):
    flat, _ = jax.tree_util.tree_flatten_with_path(parts.groups)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), g) for p, g in flat]


def _within(path, outer):
    """Whether a path names the same leaf, of some of the layers."""
    if path == outer:
        return True
    (side, a), (other, b) = path.split("/", 1), outer.split("/", 1)
    r, s = params.ranged(a), params.ranged(b)
    return bool(
        r and s and (side, r.stack, r.rest) == (other, s.stack, s.rest) and s.start <= r.start < r.stop <= s.stop
    )


@pytest.mark.parametrize(
    ("methods", "lines"),
    [
        ((LoRA(targets=QV), IA3(targets=("v",), inputs=())), ["lora and ia3 both claim layers/v/w"]),
        ((Prefix(), Prompt()), ["prefix and prompt both claim input/tap"]),
        ((Parallel(), Pfeiffer()), ["parallel and pfeiffer both claim layers/mlp_out"]),
        ((LoRA(targets=("q",)), Full()), ["lora and full both claim layers/q/w"]),
        ((Partial(last=1), LoRA(targets=("q",), layers=(3,))), ["partial and lora both claim layers/q/w"]),
    ],
)
def test_two_claims_are_refused(methods, lines):
    model = model_of()
    for ask in (lambda m: m.labels(model.table), lambda m: m.init(jax.random.key(0), model.table, {})):
        with pytest.raises(ConfigError) as error:
            ask(Combine(methods=methods))
        assert all(line in str(error.value) for line in lines), str(error.value)
    Combine(methods=(Partial(last=1), LoRA(targets=("q",), layers=(2,)))).labels(model.table)


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ((LoRA(), LoRA(rank=2)), "lora occurs twice"),
        ((LoRA(), Combine()), "combine cannot hold combine"),
        ((LoRA(),), "2"),
    ],
)
def test_what_cannot_be_combined(methods, text):
    with pytest.raises(ValueError, match=text):
        Combine(methods=methods)


@pytest.mark.parametrize("name", TOGETHER)
def test_export_and_back(name, tmp_path):
    model, combined = model_of(), Combine(methods=TOGETHER[name])
    t = tiny.tiny(combined, model=model, randomize=True)
    store = whole(t.state, t.frozen.store, t.state.mutable)
    mine = {k: store["base"][k] for k, v in t.parts.trainable["base"].items() if v is not None}
    overlay = params.join(store["overlay"])
    save_adapter(tmp_path, overlay, model.table, combined, base_path="base", saved=params.join(jax.device_get(mine)))
    base = tiny.weights(model)
    file = load_adapter(tmp_path, model.table, base)
    assert [m.name for m in file.method.methods] == [m.name for m in combined.methods]
    inputs = jax.tree.map(lambda x: x[0], tiny.batch(8, micro=2))
    inputs = {"input_ids": inputs.tokens, "attention_mask": jnp.ones_like(inputs.tokens)}
    apply = jax.jit(model.apply)
    want = apply(bind(store["base"], store["overlay"]), inputs).logits
    back = cut(base | {k: jnp.asarray(v) for k, v in file.saved.items()}, bounds(file.overlay))
    assert tiny.largest(apply(bind(back, file.overlay), inputs).logits, want) <= 1e-6 * jnp.abs(want).max()
    assert tiny.largest(apply(base, inputs).logits, want) > 1e-2
    if combined.mergeable:
        folded = merge(bind(store["base"], store["overlay"]), model.table)
        assert tiny.largest(apply(folded, inputs).logits, want) < 2e-5 * jnp.abs(want).max()
    for method in combined.methods:  # each folder opens alone
        inner = tmp_path / method.name
        assert inner.is_dir() == (method.name not in ("bitfit", "partial", "full"))
        if inner.is_dir():
            assert load_adapter(inner, model.table, base).method.name == method.name


def test_a_head_is_kept(tmp_path):
    model = model_of(HeadSpec("sequence_classification", ("a", "b")))
    combined = Combine(methods=TOGETHER["bitfit and lora"])
    base, overlay = tiny.weights(model), combined.init(jax.random.key(0), model.table, tiny.weights(model))
    saved = {k: np.asarray(base[k]) + 1 for k in ("head/w", "layers[0:4]/q/b")}
    save_adapter(tmp_path, overlay, model.table, combined, base_path="base", task_type="SEQ_CLS", saved=saved)
    assert head_of(tmp_path) == head_of(tmp_path / "lora") and head_of(tmp_path) is not None
    with pytest.raises(DataError, match="missing"):  # every bias is BitFit's, but only one was saved
        load_adapter(tmp_path, model.table, base)
    saved |= {k: np.asarray(base[k]) for k in base if k.endswith("/b") and k not in saved}
    save_adapter(tmp_path, overlay, model.table, combined, base_path="base", task_type="SEQ_CLS", saved=saved)
    file = load_adapter(tmp_path, model.table, base)
    assert set(file.saved) == set(saved)
    for key, value in saved.items():
        np.testing.assert_array_equal(file.saved[key], value)


GATED = Combine(methods=(LoRA(rank=2, targets=QV), Prefix(tokens=3), Compacter(reduction=4)), gates=True)


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ((BitFit(), Norms()), r"none of the methods \(bitfit, norms\) has a gate"),
        ((IA3(), BitFit()), "LoRA, prefix tuning and bottleneck adapters have"),
        ((LoRA(rank=2, targets=("embed", "q")), Prefix()), "peft.gates: embed/w is no matrix that hidden values enter"),
    ],
)
def test_gates_that_would_be_none(methods, text):
    model = model_of()
    for ask in (lambda m: m.labels(model.table), lambda m: m.init(jax.random.key(0), model.table, {})):
        with pytest.raises(ConfigError, match=text):
            ask(Combine(methods=methods, gates=True))
    Combine(methods=methods).labels(model.table)


def test_gates_at_the_start():
    """As in AdapterHub: w small, c that of a linear layer but for adapters; B and U at zero make the gate of no matter."""
    model = model_of()
    base, plain = tiny.weights(model), GATED.model_copy(update={"gates": False})
    overlay, without = (m.init(jax.random.key(0), model.table, base) for m in (GATED, plain))
    for key, entry in without.items():
        same = overlay[key] if key == "input/tap" else overlay[key].inner
        jax.tree.map(np.testing.assert_array_equal, same, entry)
    for key, entry in overlay.items():
        if key != "input/tap":
            assert entry.gate.w.shape == (4, 32) and 0.015 < float(entry.gate.w.std()) < 0.025
            assert float(jnp.abs(entry.gate.c).max()) < 32**-0.5 and bool(entry.gate.c.any()) == ("_out" not in key)
    assert GATED.identity_at_init is False and not GATED.mergeable
    assert Combine(methods=(LoRA(), Pfeiffer()), gates=True).identity_at_init
    assert [group for _, group in GATED.labels(model.table)].count("gate") == 2 * (len(overlay) - 1)


def test_a_gate_has_no_merged_weight():
    model, combined = model_of(), Combine(methods=(LoRA(rank=2, targets=QV), Norms()), gates=True)
    base = tiny.weights(model)
    with pytest.raises(ConfigError, match="a gate is another for every token"):
        merge(bind(base, combined.init(jax.random.key(0), model.table, base)), model.table)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_gates_of_a_token_are_its_own(layers):
    """Neither the examples beside it in its row, nor padding, nor adapters beside it under vmap change anything."""
    model = tiny.llama(Numerics(layers=layers), num_hidden_layers=2)
    base = tiny.weights(model)
    two = [
        jax.tree.map(lambda x, i=i: x + 0.3 * (i + 1), GATED.init(jax.random.key(i), model.table, base)) for i in (0, 1)
    ]
    ids, segments = jnp.asarray([[5, 9, 31, 7, 8, 44, 61, 12]]), jnp.asarray([[0, 0, 0, 1, 1, 1, 1, -2]])
    places = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0]])

    def logits(overlay, inputs):
        return model.apply(bind(base, overlay), inputs).logits

    both = jax.tree.map(lambda *x: jnp.stack(x), *two)
    rows = {"input_ids": ids, "positions": places, "segments": segments}
    together = jax.jit(jax.vmap(logits, (0, None)))(both, rows)
    for overlay, packed in zip(two, together, strict=True):
        for part in (slice(0, 3), slice(3, 7)):
            alone = logits(overlay, {"input_ids": ids[:, part]})
            assert tiny.largest(packed[:, part], alone) <= 1e-5 * float(jnp.abs(alone).max())
    assert tiny.largest(*together) > 1e-2


def test_gates_in_a_folder(tmp_path):
    model = model_of()
    base = tiny.weights(model)
    overlay = GATED.init(jax.random.key(0), model.table, base)
    save_adapter(tmp_path / "a", overlay, model.table, GATED, base_path="base")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers"
    for module in ("self_attn.q_proj", "self_attn.v_proj", "attn_kv", "attn_out", "mlp_out"):
        assert tensors[f"{stem}.3.{module}.gate.weight"].shape == (1, 32)
    np.testing.assert_array_equal(tensors[f"{stem}.3.attn_kv.gate.bias"], overlay["layers[0:4]/attn_kv"].gate.c[3:])
    assert len(tensors) == 5 * 4 * 2
    file = load_adapter(tmp_path / "a", model.table, base)
    assert file.method.gates and file.overlay.keys() == overlay.keys()
    assert tiny.largest(file.overlay, overlay) < 1e-6
    assert not isinstance(load_adapter(tmp_path / "a" / "lora", model.table, base).overlay["layers[0:4]/q/w"], Gated)

    several = load_adapters(model, base, {"one": tmp_path / "a"})
    inputs = {"input_ids": jnp.asarray([[5, 6, 7]])}
    want, got = (model.apply(p, inputs).logits for p in (bind(base, overlay), several.use("one")))
    assert tiny.largest(want, got) < 1e-6
    with pytest.raises(ConfigError, match="is no LoRA"):
        several.rows(["one"])

    def refused(change, settings, text):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(changed, tmp_path / "a" / "adapter_model.safetensors")
        path = tmp_path / "a" / "adapter_config.json"
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | settings))
        with pytest.raises(DataError, match=text):
            load_adapter(tmp_path / "a", model.table, base)
        path.write_text(kept)

    name = f"{stem}.0.attn_kv.gate.weight"
    refused({name: None}, {}, r"0.attn_kv.gate.weight  missing   expected \[1, 32\]")
    refused({name: np.zeros((1, 8), np.float32)}, {}, r"misshapen \[1, 8\], expected \[1, 32\]")
    refused({name + "s": tensors[name]}, {}, r"extra +\S*attn_kv.gate.weights")
    refused({}, {"gates": False}, "extra")  # as in a file without gates
    refused({}, {"gates": "yes"}, "gates='yes'  expected true or false")


def test_files_without_gates_do_not_speak_of_them(tmp_path):
    model, plain = model_of(), GATED.model_copy(update={"gates": False})
    overlay = plain.init(jax.random.key(0), model.table, tiny.weights(model))
    assert not any(isinstance(e, Gated) for e in overlay.values())
    save_adapter(tmp_path, overlay, model.table, plain, base_path="base")
    assert "gates" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert not load_file(tmp_path / "adapter_model.safetensors")


def test_resume(tmp_path):
    t = tiny.tiny(Combine(methods=TOGETHER["unipelt"]))
    data, step = tiny.batch(8, micro=2), jax.jit(t.program.train)
    states = [t.state]
    for _ in range(3):
        states.append(step(states[-1], t.frozen, data)[0])
    with Checkpoints(tmp_path, message=pytest.fail) as checkpoints:
        checkpoints.save(1, states[1], extra={})
        checkpoints.wait()
        restored = checkpoints.restore(t.state)
    assert restored is not None
    state = restored.state
    for _ in range(2):
        state = step(state, t.frozen, data)[0]
    jax.tree.map(np.testing.assert_array_equal, state.trainable, states[3].trainable)


def test_in_a_config_file(tmp_path):
    run = config.Run(peft=Combine(methods=TOGETHER["unipelt"]), model=config.Run().model)
    (tmp_path / "config.json").write_text(dump(run))
    assert load(tmp_path / "config.json") == run
    rows = json.loads(dump(run))["peft"]["methods"]
    assert [row["name"] for row in rows] == ["lora", "prefix", "pfeiffer"]
    assert run.peft.usual_lr == (1e-4, 1e-2) and run.peft.dropout == 0.1


def test_fixed_numbers_stay_fixed_and_cuts_agree():
    model, combined = model_of(), Combine(methods=TOGETHER["layers apart"])
    rules = dict(combined.labels(model.table))
    assert rules["overlay/layers[0:1]/q/w/scale"] == CONST and rules["base/*"] == "frozen"
    base = cut_for(tiny.weights(model), combined.init(jax.random.key(0), model.table, {}), combined, model.table)
    assert {f"base/{k}" for k in base} >= {k for k in rules if k.startswith("base/") and k != "base/*"}
