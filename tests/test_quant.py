"""Quantised weights against MLX's own packing, mlx-lm's models and the golden logits."""
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    GOLDEN,
    TINY,
    adapted,
    assert_one_clear_line,
    config,
    random_model,
    run,
    small_config,
    write_model,
)
from mlx.utils import tree_flatten

from checkpoint import checkpoint_files, load_base, load_checkpoint
from config import resolved
from engine import quant
from engine.quant import HalfEmbedding, HalfLinear, QuantizedLinear, unquantize
from files.adapters import adapter_arrays
from files.disk import write_text
from files.keys import BadInput, write_keys
from files.model_folder import save_safetensors, write_files
from lora import apply_lora, load_adapters, merge
from model import load
from train import prepare_model

mlx_lm = pytest.importorskip("mlx_lm.utils")
TOKENS = mx.array([[1, 7, 20, 300, 5, 9, 11, 2]])


def is_quantized(model):
    """Whether some weights are packed."""
    return any(isinstance(m, (QuantizedLinear, HalfLinear)) for _, m in model.named_modules())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_product_and_gradient_are_those_of_mlx(bits, group_size, monkeypatch):
    """Unpacked piece by piece (5 rows at a time), a few rows or many, compiled or not."""
    monkeypatch.setattr(quant, "PIECE", 5 * 128)
    weight, bias = mx.random.normal((48, 128)), mx.random.normal((48,))
    layer = QuantizedLinear.pack(weight, bias, bits, group_size)
    plain = mx.dequantize(*mx.quantize(weight, group_size, bits), group_size, bits)
    np.testing.assert_allclose(np.array(layer.unpacked()), np.array(plain), atol=1e-6)
    np.testing.assert_allclose(np.array(layer.unpacked(mx.array([3, 9]))),
                               np.array(plain[mx.array([3, 9])]), atol=1e-6)
    for rows in (1, 2, 3, 40):
        x = mx.random.normal((rows, 128))
        ours, theirs = (lambda x: mx.tanh(layer(x)).sum()), lambda x: mx.tanh(
            x @ plain.T + bias).sum()
        np.testing.assert_allclose(np.array(layer(x)), np.array(x @ plain.T + bias), atol=1e-4)
        for way in (mx.grad(ours), mx.compile(mx.grad(ours))):
            np.testing.assert_allclose(np.array(way(x)), np.array(mx.grad(theirs)(x)), atol=1e-4)


def test_eight_bits_stay_with_the_golden_logits():
    """Mean absolute error below 0.1, with groups of 64 and 32; four bits are visibly coarser."""
    expected = mx.load(str(GOLDEN / "llama3_2" / "expected.safetensors"))
    error = {}
    for bits, group_size in ((8, 64), (8, 32), (4, 64)):
        model, _ = load(GOLDEN / "llama3_2", "float32", bits=bits, group_size=group_size)
        assert is_quantized(model)
        error[bits, group_size] = mx.abs(
            model(expected["tokens"]) - expected["logits"]).mean().item()
    assert max(error[8, 64], error[8, 32]) < 0.1 < error[4, 64]


def as_mlx_community(family, folder, bits, group_size, skip=()):
    """Quantise a golden model with mlx-lm and save it as on the Hub; returns mlx-lm's model."""
    theirs, raw = mlx_lm.load_model(GOLDEN / family)
    theirs.set_dtype(mx.float32)
    keep = lambda path, m: not any(name in path for name in skip)
    theirs, raw = mlx_lm.quantize_model(theirs, raw, group_size, bits, quant_predicate=keep)
    mlx_lm.save_model(folder, theirs)
    mlx_lm.save_config(raw, folder / "config.json")
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits,group_size", [(4, 32), (8, 64), (3, 64)])
def test_mlx_community_checkpoint_gives_mlx_lms_logits(family, bits, group_size, tmp_path):
    """Embedding and unembedding quantised too, tied or not; what it cannot divide is plain."""
    theirs = as_mlx_community(family, tmp_path, bits, group_size)
    model, _ = load(tmp_path)
    assert is_quantized(model)
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(theirs(TOKENS)), atol=1e-3)


def test_a_layers_own_settings(tmp_path):
    """mlx-lm's mixed quantisation: other bits for one kind of layer, none for another."""
    theirs, raw = mlx_lm.load_model(GOLDEN / "llama3_2")
    theirs.set_dtype(mx.float32)
    choose = lambda path, m: ({"bits": 8, "group_size": 32} if "down_proj" in path
                              else "embed" not in path)
    theirs, raw = mlx_lm.quantize_model(theirs, raw, 64, 4, quant_predicate=choose)
    mlx_lm.save_model(tmp_path, theirs)
    mlx_lm.save_config(raw, tmp_path / "config.json")
    model, _ = load(tmp_path)
    down, up = model.model.layers[0].mlp.down_proj, model.model.layers[0].mlp.up_proj
    assert (down.bits, down.group_size, up.bits, up.group_size) == (8, 32, 4, 64)
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(theirs(TOKENS)), atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_at_load_is_what_mlx_lm_does(bits):
    theirs, raw = mlx_lm.load_model(GOLDEN / "llama3_2")
    theirs.set_dtype(mx.float32)
    theirs, _ = mlx_lm.quantize_model(theirs, raw, 64, bits,
                                      quant_predicate=lambda path, _: "proj" in path)
    model, _ = load(GOLDEN / "llama3_2", "float32", bits=bits)
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(theirs(TOKENS)), atol=1e-3)


def write_wide_model(folder, dtype):
    """Blocks that outweigh everything else: 8 of 2.4 MB in float32."""
    raw = small_config(blocks=8) | {"hidden_size": 256, "intermediate_size": 512}
    model = random_model(raw)
    model.set_dtype(dtype)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_safetensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())))
    return model


def test_loading_never_holds_the_plain_model(tmp_path):
    """Peak memory stays within the quantised size and two of the largest tensor."""
    model = write_wide_model(tmp_path / "m", mx.float32)
    sizes = [v.nbytes for _, v in tree_flatten(model.parameters())]
    del model
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load(tmp_path / "m", bits=4, group_size=32)
    peak, held = mx.get_peak_memory() - before, mx.get_active_memory() - before
    assert held < 0.35 * sum(sizes)
    assert peak < held + 2 * max(sizes) + 2 ** 19


@pytest.mark.parametrize("tied", [True, False])
def test_sixteen_bit_tables_under_a_float32_model(tied, tmp_path, monkeypatch):
    """With bits on a CPU they stay 16-bit: half the memory, the same numbers, gradients too."""
    monkeypatch.setattr(quant, "PIECE", 100 * 32)
    raw = small_config() | {"tie_word_embeddings": tied, "intermediate_size": 64}
    model = random_model(raw)
    model.set_dtype(mx.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_safetensors(tmp_path / "model.safetensors", dict(tree_flatten(model.parameters())))
    half, _ = load(tmp_path, bits=8, group_size=32)
    whole, _ = load(tmp_path, "float32", bits=8, group_size=32)
    if mx.default_device() == mx.Device(mx.cpu):
        assert isinstance(half.model.embed_tokens, HalfEmbedding)
        assert tied or isinstance(half.lm_head, HalfLinear)
        assert half.model.norm.weight.dtype == mx.float32
    tokens = mx.array([[1, 7, 20, 300, 5]])
    np.testing.assert_allclose(np.array(half(tokens)), np.array(whole(tokens)), atol=1e-5)
    resid = mx.random.normal((1, 5, 32))
    grads = [mx.grad(lambda x, m=m: (m.head(x) ** 2).sum())(resid) for m in (half, whole)]
    largest = mx.abs(grads[0]).max().item()
    assert largest > 1e-2
    # each is a sum over the vocabulary, rounded as its largest terms are
    np.testing.assert_allclose(np.array(grads[0]), np.array(grads[1]), rtol=1e-3,
                               atol=1e-5 * max(1, largest))


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_adapter_round_trip_and_merge(bits, tmp_path, tokenizer):
    """Saved, loaded on a quantised base, merged into unpacked weights: the same logits."""
    base = lambda: load(GOLDEN / "llama3_2", "float32", bits=bits)[0]
    model = base()
    apply_lora(model, 4, 8.0, ("q", "o", "down"))
    model.load_weights([(k, mx.random.normal(v.shape) * 0.1)
                        for k, v in adapter_arrays(model).items()], strict=False)
    expected = np.array(model(TOKENS))
    cfg = config(lora_rank=4, lora_alpha=8.0, lora_targets=("q", "o", "down"))
    write_files(tmp_path, checkpoint_files(model, cfg))
    other = base()
    load_adapters(other, tmp_path)
    np.testing.assert_array_equal(np.array(other(TOKENS)), expected)
    merge(other)
    assert is_quantized(other) and not isinstance(other.model.layers[0].self_attn.q_proj,
                                                  QuantizedLinear)
    np.testing.assert_allclose(np.array(other(TOKENS)), expected, atol=1e-3)
    unquantize(other, mx.float32)
    assert not is_quantized(other)
    np.testing.assert_allclose(np.array(other(TOKENS)), expected, atol=1e-3)


def test_a_qlora_run_trains_evaluates_and_fuses(write_config, tmp_path):
    """The command line whole, on a base in 4 bits; GRPO goes on from it; the export is plain."""
    folder = write_model(tmp_path / "base", small_config() | {"intermediate_size": 64}, TINY)
    path, run_dir = write_config("qlora", model=folder, bits=4)
    run("train.py", path, check=0)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(r["loss"]) for r in records if "loss" in r)
    run("eval.py", "--ckpt", run_dir, check=0)
    run("lora.py", "--ckpt", run_dir, "--out", tmp_path / "fused", check=0)
    assert "quantization" not in json.loads((tmp_path / "fused" / "config.json").read_text())
    fused, _ = load(tmp_path / "fused")
    trained, _, _ = load_checkpoint(run_dir)
    np.testing.assert_allclose(np.array(fused(TOKENS)), np.array(trained(TOKENS)), atol=1e-3)
    path, _ = write_config("second", model=run_dir, bits=8)
    run("train.py", path, check=0)


@pytest.mark.parametrize("change,words", [
    ({"bits": 4, "group_size": 7}, ("groups of 7", "32, 64, 128")),
    ({"bits": 7, "group_size": 64}, ("7 bits", "2, 3, 4")),
    ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, ("mxfp4", "affine")),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("gptq", "mlx-community")),
    ({"load_in_4bit": True}, ("load_in_4bit", "mlx-community"))])
def test_layouts_that_are_not_read(change, words, tmp_path):
    as_mlx_community("llama3_2", tmp_path, 4, 64)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("quantization"), raw.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": change}))
    with pytest.raises(BadInput) as error:
        load(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name,change,words", [
    ("scales", lambda x: x * float("nan"), "NaN or infinity in model.layers.1.mlp.up_proj.scales"),
    ("biases", lambda x: x + float("inf"), "NaN or infinity in model.layers.1.mlp.up_proj.biases"),
    ("weight", lambda x: x.astype(mx.float32), "wrong type: model.layers.1.mlp.up_proj.weight"),
    ("weight", lambda x: x.astype(mx.int32), "wrong type: model.layers.1.mlp.up_proj.weight"),
    ("scales", lambda x: x.astype(mx.int32), "wrong type: model.layers.1.mlp.up_proj.scales")])
def test_packed_tensors_that_are_ruined(name, change, words, tmp_path):
    as_mlx_community("llama3_2", tmp_path, 4, 64)
    load(tmp_path)
    arrays = mx.load(str(tmp_path / "model.safetensors"))
    key = f"model.layers.1.mlp.up_proj.{name}"
    arrays[key] = change(arrays[key])
    mx.eval(arrays)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    with pytest.raises(BadInput, match=words):
        load(tmp_path)


def write_run(folder, model_name, seed, **keys):
    """A run's folder without the training: an adapter on what `load_base` gives."""
    cfg = config(model=str(model_name), lora_rank=4, lora_alpha=8.0, lora_targets=("q", "down"),
                 **keys)
    model = adapted(load_base(model_name, cfg.dtype, cfg.bits)[0], ("q", "down"), seed=seed)
    write_text(folder / "config.yaml", write_keys(resolved(cfg)))
    write_files(folder, checkpoint_files(model, cfg))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_through_a_chain_of_runs(dtype, tmp_path):
    """What is asked goes for every run under the name, whatever each of them trained in."""
    base = write_model(tmp_path / "base", small_config() | {"intermediate_size": 64}, TINY)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    first = write_run(tmp_path / "first", base, 1, dtype=other)
    second = write_run(tmp_path / "second", first, 2, dtype=other)
    for name in (base, first, second):
        model, _ = load_base(name, dtype)
        kinds = {str(v.dtype) for _, v in tree_flatten(model.parameters())}
        assert kinds == {f"mlx.core.{dtype}"}
    assert load_base(second)[0].model.norm.weight.dtype == getattr(mx, other)     # its own


@pytest.mark.parametrize("own,asked", [(None, 4), (4, 8), (8, 4), (4, 4), (4, None)])
def test_bits_through_a_chain_of_runs(own, asked, tmp_path):
    """Other bits than the run's own: of the merged model every layer, rounded once.

    The same bits, or none asked: what the adapter was merged into stays plain.
    """
    base = write_model(tmp_path / "base", small_config() | {"intermediate_size": 64}, TINY)
    first = write_run(tmp_path / "first", base, 1, bits=own)
    second = write_run(tmp_path / "second", first, 2, bits=own)
    merged, _ = load_base(second, "float32")        # as trained, its adapters merged
    weights = {path: layer.unpacked() if isinstance(layer, QuantizedLinear) else layer.weight
               for path, layer in quant.block_layers(merged)}
    model, _ = load_base(second, "float32", asked, group_size=32)
    if asked in (own, None):
        np.testing.assert_array_equal(np.array(model(TOKENS)), np.array(merged(TOKENS)))
        plain = {p for p, m in quant.block_layers(model) if not isinstance(m, QuantizedLinear)}
        assert plain == {p for p in weights if p.endswith(("q_proj", "down_proj"))}
        return
    assert quant.packed_settings(model) == {(asked, 32)}
    for path, layer in quant.block_layers(model):
        expected = mx.dequantize(*mx.quantize(weights[path], 32, asked), 32, asked)
        np.testing.assert_allclose(np.array(layer.unpacked()), np.array(expected), atol=1e-5)


def test_bits_of_bad_input(tmp_path, write_config):
    """Widths that groups do not divide, other bits than stored."""
    with pytest.raises(BadInput, match="groups of 32 do not divide the input width 176; no group"):
        load(GOLDEN / "tinyllama", bits=4)
    with pytest.raises(BadInput, match="width 32; take groups of 32"):
        quant.check_settings(4, 64, 32, "x")
    as_mlx_community("llama3_2", tmp_path / "q", 4, 64)
    with pytest.raises(BadInput, match="already quantised to 4 bits"):
        load(tmp_path / "q", bits=8)
    assert is_quantized(load(tmp_path / "q", bits=4)[0])     # the same again is no contradiction
    path, _ = write_config("c", bits=7)
    assert_one_clear_line(run("train.py", path), "bits = 7", "2, 3, 4, 5, 6, 8")
    path, _ = write_config("d", bits=4)
    assert_one_clear_line(run("train.py", path), "groups of 32", "the input width 48",
                          "train without bits")


def test_a_packed_model_is_not_trained_whole(tmp_path):
    """Its weights are codes; full: true asks for all of them."""
    plain = write_model(tmp_path / "plain", small_config() | {"intermediate_size": 64}, TINY)
    theirs, raw = mlx_lm.load_model(plain)
    theirs, raw = mlx_lm.quantize_model(theirs, raw, 32, 4)
    packed = write_model(tmp_path / "packed", small_config(), TINY)
    mlx_lm.save_model(packed, theirs)
    mlx_lm.save_config(raw, packed / "config.json")
    with pytest.raises(BadInput, match="full: true cannot train .*packed, whose weights are quant"):
        prepare_model(config(model=str(packed), full=True))
    assert prepare_model(config(model=str(packed)))[0].parts == 1


def test_groups_follow_each_rows_width(tmp_path):
    """64 weights share a scale, or 32 in a row that 64 does not divide."""
    folder = write_model(tmp_path / "m", small_config() | {"intermediate_size": 64}, TINY)
    model, _ = load(folder, bits=4)
    block = model.model.layers[0]
    assert block.mlp.down_proj.group_size == 64 and block.mlp.up_proj.group_size == 32
    assert quant.packed_settings(model) == {(4, 32), (4, 64)}
    plain, _ = load(folder, "float32")
    quant.quantize(plain, 4)
    assert quant.packed_settings(plain) == {(4, 32), (4, 64)}
    np.testing.assert_array_equal(np.array(model(TOKENS)), np.array(plain(TOKENS)))
