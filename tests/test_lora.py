"""LoRA starts as nothing, merges to itself and is saved whole; test_export.py: what others say."""
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import GOLDEN, adapted, config, small_model
from mlx.utils import tree_flatten

from checkpoint import checkpoint_files
from files.adapters import adapter_arrays
from files.keys import BadInput
from files.model_folder import write_files
from lora import LoRALinear, apply_lora, load_adapters, merge
from model import load

TOKENS = mx.array(np.random.default_rng(0).integers(3, 300, (2, 12)))


def test_starts_as_the_base_and_trains_only_a_and_b(model):
    before = model(TOKENS)
    apply_lora(model, 4, 8.0, ("q", "k", "v", "o", "gate", "up", "down"))
    assert mx.array_equal(model(TOKENS), before)
    names = [k for k, _ in tree_flatten(model.trainable_parameters())]
    assert len(names) == 2 * 7 * 2 and all(k.endswith(("lora_a", "lora_b")) for k in names)


def test_formula_by_hand():
    linear, x = nn.Linear(6, 5), mx.random.normal((3, 6))
    lora = LoRALinear(linear, rank=2, scale=16 / 2)
    lora.lora_b = mx.random.normal((2, 5))
    arrays = (linear.weight, linear.bias, lora.lora_a, lora.lora_b, x)
    W, b, A, B, X = (np.array(a).astype(np.float64) for a in arrays)
    np.testing.assert_allclose(np.array(lora(x)), X @ W.T + b + 8.0 * (X @ A) @ B, atol=1e-4)
    assert np.abs(A).max() <= 6 ** -0.5


def test_merge_is_apply(model):
    adapted(model, ("q", "k", "v", "o", "gate", "up", "down"))
    before = model(TOKENS)
    merge(model)
    assert not adapter_arrays(model)
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(before), atol=2e-4)


def test_save_then_load_is_bit_equal(tokenizer, tmp_path):
    model = adapted(small_model())
    cfg = config(lora_rank=4, lora_alpha=8.0, lora_targets=("q", "v", "o"))
    write_files(tmp_path, checkpoint_files(model, cfg))
    again = small_model()
    load_adapters(again, tmp_path)
    assert mx.array_equal(again(TOKENS), model(TOKENS))


def test_quantised_base(tmp_path):
    model = load(GOLDEN / "llama3_2", "float32", bits=4)[0]
    before = model(TOKENS)
    apply_lora(model, 4, 8.0, ("q", "down"))
    assert mx.array_equal(model(TOKENS), before)
    loss = lambda m: (m(TOKENS) ** 2).mean()
    grads = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    assert set(grads) == set(adapter_arrays(model))
    assert all(np.abs(np.array(g)).max() > 0 for k, g in grads.items() if k.endswith("lora_b"))


# --- strict: nothing is dropped, nothing is missing, nothing of another model


@pytest.fixture
def saved(tokenizer, tmp_path):
    cfg = config(lora_rank=4, lora_alpha=8.0, lora_targets=("q", "v", "o"))
    write_files(tmp_path, checkpoint_files(adapted(small_model()), cfg))
    return tmp_path


def change_tensors(folder, change):
    arrays = mx.load(str(folder / "adapters.safetensors"))
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)


def test_every_mismatch_is_listed(saved, tokenizer):
    names = sorted(mx.load(str(saved / "adapters.safetensors")))

    def change(arrays):
        arrays["model.layers.9.extra.lora_a"] = arrays.pop(names[0])
        arrays[names[1]] = arrays[names[1]][:1]
    change_tensors(saved, change)
    with pytest.raises(BadInput) as error:
        load_adapters(small_model(), saved)
    words = (names[0], "model.layers.9.extra.lora_a", names[1],
             "1 missing", "1 not expected", "1 of another shape")
    assert all(word in str(error.value) for word in words)


def test_adapter_of_another_model(saved, tokenizer):
    with pytest.raises(BadInput, match="another shape"):
        load_adapters(load(GOLDEN / "tinyllama", "float32")[0], saved)
    with pytest.raises(BadInput, match="missing.*layers.2"):
        load_adapters(small_model(blocks=3), saved)
    other = small_model()
    other.model.norm.weight = other.model.norm.weight * 1.5
    with pytest.raises(BadInput, match="another model of the same shape"):
        load_adapters(other, saved)


def change_settings(folder, change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("change,words", [
    ({"fine_tune_type": "dora"}, 'fine_tune_type = "dora", expected "lora"'),
    ({"lora_parameters": {"rank": 4, "scale": 2.0}}, "missing: .*k_proj"),  # all layers are meant
    ({"lora_parameters": None}, "missing lora_parameters"),
    *(({"lora_parameters": {"rank": 4, "scale": 2.0, "keys": ["self_attn.q_proj"], **change}},
       words) for change, words in [
        ({"scale": None}, "missing scale"),
        ({"scale": float("nan")}, "scale = NaN, expected a finite number above 0"),
        ({"scale": float("inf")}, "scale = Infinity, expected a finite number above 0"),
        ({"scale": 0}, "scale = 0, expected a finite number above 0"),
        ({"scale": -2.0}, "scale = -2.0, expected a finite number above 0"),
        ({"rank": 0}, "rank = 0, expected a whole number of at least 1"),
        ({"keys": "q_proj"}, 'keys = "q_proj", expected a list of names'),
        ({"keys": ["lm_head"]}, r'keys \["lm_head"\] are no layers')]),
])
def test_unknown_settings(saved, tokenizer, change, words):
    change_settings(saved, change)
    with pytest.raises(BadInput, match=words):
        load_adapters(small_model(), saved)


@pytest.mark.parametrize("change,words", [
    (lambda x: x * float("nan"), "NaN or infinity in model.layers.1.self_attn.v_proj.lora_b"),
    (lambda x: x + float("inf"), "NaN or infinity in model.layers.1.self_attn.v_proj.lora_b"),
    (lambda x: x.astype(mx.int32), "wrong type: model.layers.1.self_attn.v_proj.lora_b int32"),
])
def test_ruined_numbers(saved, change, words):
    name = "model.layers.1.self_attn.v_proj.lora_b"
    change_tensors(saved, lambda arrays: arrays.update({name: change(arrays[name])}))
    with pytest.raises(BadInput, match=words):
        load_adapters(small_model(), saved)
