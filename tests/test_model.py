"""The forward pass against another implementation's numbers.

Loading is set against everything a folder can have wrong.
"""
import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, GOLDEN, config, lora_model, small_model
from mlx.utils import tree_flatten

from engine import memory
from files.keys import BadInput
from files.model_folder import BITS_OF, INDEX, is_finite, parse_args, read_safetensors
from losses import token_logprobs
from model import FORMULAS, gather_positions, load, rope, rope_periods


@pytest.fixture(params=FAMILIES)
def golden(request):
    model, tokenizer = load(GOLDEN / request.param, dtype="float32")
    assert tokenizer is None  # these folders have none
    return model, mx.load(str(GOLDEN / request.param / "expected.safetensors"))


def close(ours, expected):
    """Within 1e-4, or 1e-5 of a tap's largest entry where that is more.

    Residuals reach 42, where float32 itself is this coarse: the golden numbers of llama3_2 are
    up to 2.5e-4 away from the same computation in float64, and so are ours.
    """
    ours, expected = np.array(ours), np.array(expected)
    atol = max(1e-4, 1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


def test_residuals_and_logits_equal_golden(golden):
    model, expected = golden
    for ours, theirs in zip(model.residuals(expected["tokens"]), expected["residuals"]):
        close(ours, theirs)
    close(model(expected["tokens"]), expected["logits"])


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_tokens_equal_golden(golden, cached):
    model, expected = golden
    tokens, cache = expected["prompt"], model.make_cache(24 + 12) if cached else None
    for step in range(12):
        logits = model(tokens[:, -1:] if cached and step else tokens, cache)
        tokens = mx.concatenate([tokens, mx.argmax(logits[:, -1:], axis=-1)], axis=1)
    assert tokens[:, 24:].tolist() == expected["greedy"].tolist()


def test_cache_in_chunks_equals_one_pass(golden):
    """Prefill in unequal chunks.

    The causal mask must line up with the end of the keys, not their start.
    """
    model, expected = golden
    cache, parts = model.make_cache(96), []
    for start, end in ((0, 40), (40, 41), (41, 96)):
        parts.append(model(expected["tokens"][:, start:end], cache))
    close(mx.concatenate(parts, axis=1), expected["logits"])


def test_future_tokens_change_nothing(golden):
    model, expected = golden
    tokens = expected["tokens"][:, :20]
    changed = mx.concatenate([tokens[:, :12], (tokens[:, 12:] + 7) % 300], axis=1)
    assert mx.array_equal(model.residuals(tokens)[:, :, :12], model.residuals(changed)[:, :, :12])


def test_rope_spellings_give_the_same_model(tmp_path):
    """config.json as Transformers 5 writes it against the older spelling.

    That is, rope_parameters against rope_theta + rope_scaling.
    """
    folder = tmp_path / "new"
    shutil.copytree(GOLDEN / "llama3_2", folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"] = {**raw.pop("rope_scaling"), "rope_theta": raw.pop("rope_theta")}
    raw["dtype"] = raw.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps(raw))
    expected = mx.load(str(folder / "expected.safetensors"))
    close(load(folder, "float32")[0](expected["tokens"]), expected["logits"])


def test_llama3_periods_by_hand():
    """Factor 8, C = 64: a pair with 64 turns stays.

    One with half a turn is slowed 8 times, one with 2.5 turns is half-way.
    """
    raw = json.loads((GOLDEN / "llama3_1" / "config.json").read_text())
    args = parse_args(raw, "test")
    plain = rope_periods(parse_args(raw | {"rope_scaling": None}, "test"))
    ratio = np.array(rope_periods(args) / plain)
    turns = 64 / (2 * np.pi * np.array(plain))
    blend = np.clip((turns - 1) / 3, 0, 1)
    np.testing.assert_allclose(ratio, 1 / (blend + (1 - blend) / 8), rtol=1e-6)
    assert ratio[0] == 1 and ratio[-1] == 8 and ((1.001 < ratio) & (ratio < 7.999)).any()


@pytest.mark.parametrize("rotate", [rope, FORMULAS["rope"]], ids=["used", "formula"])
def test_rope_against_complex_numbers(rotate):
    """A rotation of pairs (x_i, x_{i+d/2}) is a product of complex numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, 5, 8)).astype(np.float32)
    periods = np.array([1, 7, 50, 333], np.float32)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * (np.arange(5)[:, None] + 3) / periods)
    expected = np.concatenate([turned.real, turned.imag], -1)
    ours = rotate(mx.array(x), 3, mx.array(periods))
    np.testing.assert_allclose(np.array(ours), expected, atol=1e-5)


def test_dtype_asked_and_default():
    for dtype in ("bfloat16", "float16", "float32"):
        assert str(load(GOLDEN / "tinyllama", dtype)[0].model.norm.weight.dtype).endswith(dtype)
    default = load(GOLDEN / "tinyllama")[0].model.norm.weight.dtype
    assert default == (mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16)


def test_bits_stays_near():
    """4-bit weights are rounded, not scrambled: the logits stay close in direction."""
    expected = mx.load(str(GOLDEN / "llama3_2" / "expected.safetensors"))
    for bits, least in ((8, 0.99), (4, 0.6)):
        model, _ = load(GOLDEN / "llama3_2", "float32", bits=bits)
        ours = np.array(model(expected["tokens"][:, :16])).ravel()
        theirs = np.array(expected["logits"][:, :16]).ravel()
        assert np.dot(ours, theirs) / np.linalg.norm(ours) / np.linalg.norm(theirs) > least


# --- bad folders: each names the file, what was expected, what to do


@pytest.fixture
def broken(tmp_path):
    shutil.copytree(GOLDEN / "llama3_1", tmp_path / "m")
    return tmp_path / "m"


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "gpt2"}, ("gpt2", "LlamaForCausalLM", "Qwen2ForCausalLM")),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, ("yarn", "llama3")),
    ({"hidden_act": "gelu"}, ("gelu", "silu")),
    ({"use_sliding_window": True}, ("use_sliding_window",)),
    ({"hidden_size": 128}, ("of another shape", "expected")),
    ({"num_hidden_layers": 5}, ("missing", "model.layers.4.")),
    ({"num_hidden_layers": 3}, ("not expected", "model.layers.3.")),
    ({"num_hidden_layers": "4"}, ('num_hidden_layers = "4"', "a whole number of at least 1")),
    ({"num_hidden_layers": True}, ("num_hidden_layers = true", "a whole number")),
    ({"num_attention_heads": 0}, ("num_attention_heads = 0", "a whole number of at least 1")),
    ({"vocab_size": None, "hidden_size": 64.0},
     ("missing vocab_size", "hidden_size = 64.0", "a whole number")),
    ({"num_key_value_heads": 3}, ("num_key_value_heads 3", "divide the heads")),
    ({"num_attention_heads": 6, "head_dim": None}, ("num_attention_heads 6", "divide hidden_size")),
    ({"head_dim": 31}, ("head_dim 31", "even width")),
    ({"tie_word_embeddings": "false"}, ('tie_word_embeddings = "false"', "true or false")),
    ({"attention_bias": 0}, ("attention_bias = 0", "true or false")),
    ({"rms_norm_eps": 0}, ("rms_norm_eps = 0", "a finite number above 0")),
    ({"rms_norm_eps": float("nan")}, ("rms_norm_eps = NaN", "a finite number above 0")),
    ({"rope_theta": float("inf")}, ("rope_theta = Infinity", "a finite number above 0")),
    ({"rope_theta": 0}, ("rope_theta = 0", "a finite number above 0")),
    ({"rope_theta": -1e4}, ("rope_theta = -10000.0", "a finite number above 0")),
    ({"rope_parameters": {"rope_theta": "1e5"}}, ('rope_theta = "1e5"', "a finite number above 0")),
    ({"rope_parameters": [1]}, ("rope_parameters = [1]", "an object")),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, ("factor = 0", "a finite number above 0")),
    ({"rope_scaling": {"rope_type": "linear"}}, ("RoPE", "missing factor")),
    ({"rope_scaling": LLAMA3 | {"factor": float("nan")}}, ("factor = NaN", "above 0")),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
     ("low_freq_factor = 4.0", "less than high_freq_factor = 4.0")),
    ({"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
     ("missing original_max_position_embeddings",)),
])
def test_unsupported_or_wrong_config(broken, changes, words):
    edit_config(broken, **changes)
    with pytest.raises(BadInput) as error:
        load(broken)
    assert all(word in str(error.value) for word in words), error.value


SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / SECOND).unlink(), ("missing", "model-00002")),
    (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-100]),
     ("truncated", "model-00002")),
    (lambda f: (f / SECOND).write_bytes(b"\x10" * 500), ("corrupt", "model-00002")),
    (lambda f: (f / "model.safetensors.index.json").unlink(), ("no model.safetensors",)),
    (lambda f: (f / "config.json").unlink(), ("config.json", "missing")),
    (lambda f: (f / "config.json").write_text("{"), ("config.json", "not valid JSON")),
])
def test_damaged_folder(broken, damage, words):
    damage(broken)
    with pytest.raises(BadInput) as error:
        load(broken)
    assert all(word in str(error.value) for word in words), error.value


def test_every_wrong_tensor_is_named(broken):
    path = broken / SECOND
    tensors = mx.load(str(path))
    names = sorted(tensors)
    tensors["model.surplus"] = tensors.pop(names[0])
    tensors[names[1]] = mx.concatenate([tensors[names[1]], tensors[names[1]]])
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    index = json.loads((broken / INDEX).read_text())    # which promises what the shard now holds
    index["weight_map"]["model.surplus"] = index["weight_map"].pop(names[0])
    (broken / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadInput) as error:
        load(broken)
    words = ("1 missing: " + names[0], "model.surplus", names[1], "of another shape")
    assert all(word in str(error.value) for word in words)


def change_tensor(folder, name, change):
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = mx.load(str(file))
    tensors[name] = change(tensors[name])
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight",
                                  "model.layers.1.input_layernorm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_one_ruined_number(broken, name, value, dtype):
    """One among all of a tensor's is found, of any type and place; its tensor is named."""
    def change(tensor):
        flat = tensor.astype(dtype).reshape(-1)
        flat[flat.size // 3] = float(value)
        return flat.reshape(tensor.shape)
    change_tensor(broken, name, change)
    with pytest.raises(BadInput, match=f"NaN or infinity in {name};"):
        load(broken)


@pytest.mark.parametrize("dtype", [mx.int32, mx.bool_, mx.uint32, mx.uint8])
def test_weights_that_are_no_floats(broken, dtype):
    name = "model.layers.2.mlp.up_proj.weight"
    change_tensor(broken, name, lambda tensor: tensor.astype(dtype))
    with pytest.raises(BadInput) as error:
        load(broken)
    kind = str(dtype).removeprefix("mlx.core.")
    assert f"of the wrong type: {name} {kind}; expected float32" in str(error.value)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_is_finite_at_the_ends(dtype):
    """The largest numbers of either sign are finite; a NaN of any sign and payload is not."""
    signed, _, infinity = BITS_OF[dtype]
    sign = -2 ** (8 * dtype.size - 1)
    as_float = lambda *bits: mx.array(bits, signed).view(dtype)
    finite = as_float(infinity - 1, sign + infinity - 1, 0, sign, 1, sign + 1)
    assert mx.isfinite(finite).all() and is_finite(finite)
    for bits in (infinity, infinity + 1, sign - 2 * sign - 1):
        for value in (bits, sign + bits):
            ruined = as_float(*[0] * 40, value, sign)
            assert not mx.isfinite(ruined).all() and not is_finite(ruined)


def test_truncated_file_is_noticed(tmp_path):
    whole = (GOLDEN / "tinyllama" / "model.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:5000])
    with pytest.raises(BadInput, match="truncated or corrupt"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_the_last_block(family):
    """Asked for some positions alone, the last tap is what it is without that: unsorted ones too,
    doubled ones, behind a cache and behind left padding."""
    model, _ = load(GOLDEN / family, dtype="float32")
    tokens = mx.array(np.random.default_rng(0).integers(3, 90, (2, 12)))
    positions = mx.array([[5, 2], [11, 11]])
    whole = model.final_resid(tokens)
    taps = list(model.stream(tokens, positions=positions))
    assert mx.abs(taps[-1] - gather_positions(whole, positions)).max() < 1e-4
    assert taps[-1].shape[1] == 2 and taps[-2].shape[1] == 12
    assert mx.abs(model.last_resid(tokens) - whole[:, -1]).max() < 1e-4
    for start in (None, mx.array([0, 3])):
        cache, other = model.make_cache(12, start), model.make_cache(12, start)
        first = model.final_resid(tokens[:, :7], cache)
        assert mx.abs(model.last_resid(tokens[:, :7], other) - first[:, -1]).max() < 1e-4
        behind = model.final_resid(tokens[:, 7:], cache)
        at = mx.array([[4, 1], [0, 2]])
        assert mx.abs(model.final_resid(tokens[:, 7:], other, positions=at)
                      - gather_positions(behind, at)).max() < 1e-4
        assert mx.array_equal(cache[-1].keys, other[-1].keys)


def test_positions_have_the_same_gradient():
    """Of a loss on three positions, for every adapted matrix, against the whole last block."""
    model = lora_model()
    tokens = mx.array(np.random.default_rng(0).integers(3, 90, (2, 9)))
    positions, want = mx.array([[4, 7, 7], [2, 3, 8]]), mx.array(
        np.random.default_rng(1).normal(size=(2, 3, 32)).astype(np.float32))
    loss = lambda of: lambda model: (of(model) * want).sum()
    few = nn.value_and_grad(model, loss(
        lambda m: m.final_resid(tokens, positions=positions)))(model)
    all_of = nn.value_and_grad(model, loss(
        lambda m: gather_positions(m.final_resid(tokens), positions)))(model)
    assert mx.allclose(few[0], all_of[0], rtol=1e-5)
    theirs = dict(tree_flatten(all_of[1]))
    for name, grad in tree_flatten(few[1]):
        assert mx.abs(grad - theirs[name]).max() < 1e-5 * max(1, mx.abs(theirs[name]).max()), name


def entropy(logits, ids):
    """Of each row, in nats: a function of all its logits."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(mx.exp(logprobs) * logprobs).sum(-1)


@pytest.mark.parametrize("read", [
    token_logprobs, lambda logits, ids: token_logprobs(logits / 0.7, ids), entropy],
    ids=["logprob", "temperature", "entropy"])
@pytest.mark.parametrize("trained,recomputed", [
    ("stream", "none"), ("stream", "mlp"), ("unembedding", "none"), ("unembedding", "block")])
def test_read_logits_is_head_then_read(read, trained, recomputed, monkeypatch):
    """Values and gradients, in parts of three rows of logits, against all logits at once."""
    monkeypatch.setattr(memory, "logit_rows", lambda *_: 3)
    model = small_model()
    memory.spare(model, config(recompute=recomputed))
    model.freeze()
    if trained == "unembedding":
        model.model.embed_tokens.unfreeze()
    mx.random.seed(2)
    resid, weights = mx.random.normal((2, 5, 32)), mx.random.normal((2, 5))
    ids = mx.random.randint(0, model.args.vocab_size, (2, 5))
    parts = lambda resid: (weights * model.read_logits(read, resid, ids)).sum()
    plain = lambda resid: (weights * read(model.head(resid), ids)).sum()
    # recomputing puts a trace's weights into the model: they are inputs and outputs, as in training
    compiled = mx.compile(mx.value_and_grad(parts), inputs=[model.state], outputs=[model.state])
    for of in (mx.value_and_grad(parts), compiled):
        value, grad = of(resid)
        expected, expected_grad = mx.value_and_grad(plain)(resid)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, expected_grad, atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(model.read_logits(read, resid, ids, with_grad=False),
                               read(model.head(resid), ids), rtol=1e-5)
    if trained == "unembedding":
        table = lambda fn: nn.value_and_grad(model, lambda: fn(resid))()[1]["model"][
            "embed_tokens"]["weight"]
        np.testing.assert_allclose(table(parts), table(plain), atol=1e-6, rtol=1e-4)
