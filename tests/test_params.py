"""Keys with layer ranges, the table, initial values, rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import params, tree
from ftjax.errors import ConfigError
from ftjax.params import cut, init_params, join, nest, ranged, spec_of
from tests import tiny


def test_cut_and_join_are_inverse():
    base = tiny.weights(tiny.llama())
    parts = cut(base, {"layers": {1, 3}})
    assert {(r.start, r.stop) for k in parts if (r := ranged(k))} == {(0, 1), (1, 3), (3, 4)}
    whole = join(parts)
    assert set(whole) == set(base)
    for key, value in base.items():
        np.testing.assert_array_equal(whole[key], value)


def test_join_keeps_a_gap():
    store = {"layers[0:1]/q/w": jnp.ones((1, 2)), "layers[2:4]/q/w": jnp.ones((2, 2))}
    assert set(join(store)) == set(store)


def test_nest_orders_segments_by_layer():
    store = {"layers[2:12]/q/w": 2, "layers[0:2]/q/w": 1, "embed/w": 0}
    assert nest(store) == {"embed": {"w": 0}, "layers": ({"q": {"w": 1}}, {"q": {"w": 2}})}


def test_a_cut_key_has_the_spec_of_its_layers():
    table = tiny.llama().table
    assert spec_of(table, "layers[1:3]/q/w").shape == (2, 32, 32)
    with pytest.raises(KeyError):
        spec_of(table, "layers[3:5]/q/w")


def test_adding_a_layer_changes_no_other_initial_value():
    four, five = tiny.llama(), tiny.llama(num_hidden_layers=5)
    a = init_params(four.table, jax.random.key(0), dtype=jnp.float32)
    b = init_params(five.table, jax.random.key(0), dtype=jnp.float32)
    np.testing.assert_array_equal(a["layers[0:4]/q/w"], b["layers[0:5]/q/w"][:4])
    np.testing.assert_array_equal(a["embed/w"], b["embed/w"])


def test_distinct_parameters_and_layers_have_distinct_values():
    base = tiny.weights(tiny.llama())
    q = base["layers[0:4]/q/w"]
    assert len({float(q[i, 0, 0]) for i in range(4)} | {float(base["layers[0:4]/o/w"][0, 0, 0])}) == 5


def test_every_leaf_needs_a_rule_and_every_rule_a_leaf():
    store = {"base": {"layers[0:2]/q/w": 1, "head/w": 2}}
    assert tree.label(store, [("base/layers[0:2]/*", "a"), ("*", "b")])["base"]["head/w"] == "b"
    with pytest.raises(ConfigError, match="no rule covers the parameter base/head/w"):
        tree.label(store, [("base/layers*", "a")])
    with pytest.raises(ConfigError) as error:
        tree.label(store, [("base/layers[0:2]/k/*", "a"), ("*", "b")])
    assert "'base/layers[0:2]/k/*' matches nothing. Nearest: base/layers[0:2]/q/w" in str(error.value)


def test_split_and_combine_are_inverse():
    store = {"a": {"x": jnp.ones(2), "y": jnp.zeros(3)}, "b": jnp.ones(1)}
    labels = {"a": {"x": "t", "y": "f"}, "b": "t"}
    one, other = tree.split(store, labels, lambda name: name == "t")
    assert one["a"]["y"] is None and other["b"] is None
    assert tiny.largest(tree.combine(one, other), store) == 0


def test_the_table_names_every_tensor_of_a_checkpoint_once():
    from ftjax.models.tensors import file_names

    names = file_names(tiny.llama().table)
    assert len(names) == 4 * 9 + 3
    assert names["model.layers.3.mlp.down_proj.weight"] == ("layers[0:4]/down/w", 3)


def test_params_module_has_no_numeric_defaults_for_config_numbers():
    from ftjax.models.llama import LlamaConfig

    with pytest.raises(TypeError, match="rope"):
        LlamaConfig(vocab_size=8)  # type: ignore[call-arg]
    assert params.ranged("embed/w") is None
