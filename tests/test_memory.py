"""Memory: what is computed again changes no number; what is estimated is what is there."""
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    GOLDEN,
    TINY,
    TINY_COT,
    assert_one_clear_line,
    config,
    grads_of,
    random_model,
    run,
    small_config,
    small_model,
    write_model,
)
from mlx.utils import tree_flatten

from bench.fullsize import SHAPES
from config import Config, load_config
from engine import blas, memory, parallel
from files.model_folder import ModelArgs, parse_args
from generate import choose, sample_batch
from lens import read_prompts
from lora import apply_lora
from model import load
from text.tokenizer import load_tokenizer
from train import make_method, make_optimizer, prepare_model

STEPS = {   # method: settings of one step
    "sft": {}, "dual_reward": {}, "mask_prompt": {"mask_prompt": False},
    "grpo": {"grpo_group_size": 4, "max_completion_tokens": 5},
    "markovian": {"grpo_group_size": 4, "chain_tokens": 6},
}


def one_step(which, full, sums_data):
    """A model of three blocks, and the micro-batches of its first step."""
    source = TINY_COT if which == "markovian" else TINY
    tokenizer, model = load_tokenizer(source), small_model(blocks=3, source=source)
    method = "sft" if which == "mask_prompt" else which
    kl = {"grpo_kl_weight": 0.0} if full else {}
    data = {"data": str(sums_data)} if which == "markovian" else {}
    cfg = config(method=method, batch_size=8, data_samples=50, full=full, grad_accum_steps=2,
                 **STEPS[which], **data, **(kl if which == "grpo" else {}))
    if not full:
        apply_lora(model, 4, 8.0, ("q", "v", "o", "up"))
        mx.random.seed(1)
        model.load_weights([(k, mx.random.normal(v.shape) * 0.3) for k, v in
                            tree_flatten(model.trainable_parameters()) if "lora_b" in k],
                           strict=False)
    source, _ = make_method(cfg, model, tokenizer)
    if method == "grpo":
        reward = lambda problem, completion: float(len(completion.text))
        source.task.functions = [("some", reward, 1.0)]
    return model, cfg, source.at(0)[0][0]


@pytest.mark.parametrize("kept", ["mlp", "block"])
@pytest.mark.parametrize("which,full", [(w, f) for w in STEPS for f in (False, True)
                                        if not (f and w == "markovian")])
def test_recomputing_changes_no_gradient(kept, which, full, sums_data, monkeypatch):
    """Loss and every gradient, LoRA's or all weights', behind prefilled caches too.

    `mx.checkpoint` gives weights that its function closes over gradient 0, and a cache written
    twice would shift positions. The logits come in parts of 3 rows.
    """
    monkeypatch.setattr(memory, "logit_rows", lambda *_: 3)
    model, cfg, micro_batches = one_step(which, full, sums_data)
    expected_loss, _, expected = grads_of(model, cfg, micro_batches)
    memory.spare(model, replace(cfg, recompute=kept))
    loss, _, grads = grads_of(model, cfg, micro_batches)
    assert max(np.abs(g).max() for g in expected.values()) > 1e-4
    assert all(np.abs(g).max() > 0 for k, g in expected.items())
    assert abs(loss - expected_loss) < 1e-5
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected[name], atol=2e-6, rtol=1e-4, err_msg=name)


def test_published_sizes_by_arithmetic():
    """Parameters of the model cards: 1.236, 8.030 and 32.764 billion, in float32."""
    for name, billions in (("Llama-3.2-1B", 1.236), ("Llama-3.1-8B", 8.030),
                           ("Qwen2.5-32B", 32.764)):
        args = parse_args(SHAPES[name], name)
        assert isinstance(args, ModelArgs)
        found = memory.weight_bytes(args, SHAPES[name], Config(dtype="float32")) / 4e9
        assert abs(found - billions) < 0.001, (name, found)
        biases = 64 * (5120 + 2 * 1024) if "Qwen" in name else 0
        full = memory.trained_numbers(args, Config(full=True)) + biases
        assert abs(full / 1e9 - billions) < 0.001


@pytest.mark.parametrize("keys", [{}, {"bits": 4}, {"bits": 8}, {"full": True}])
def test_weights_and_trained_are_counted_as_they_are(keys, small_folder, tmp_path):
    """weight_bytes from config.json equals the arrays of the loaded model."""
    folder = write_model(tmp_path / "m", small_config() | {"intermediate_size": 64}, TINY)
    cfg = config(model=str(folder), lora_rank=4, **keys)
    model, _ = prepare_model(cfg)
    trained = sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
    assert trained == memory.trained_numbers(model.args, cfg)
    held = sum(v.nbytes for _, v in tree_flatten(model.parameters())) - (
        0 if cfg.full else 4 * trained)
    raw = json.loads((folder / "config.json").read_text())
    assert held == memory.weight_bytes(model.args, raw | {"torch_dtype": "float32"}, cfg)


def family_folder(source, folder, packed=0, skip=()):
    """A random model of 16 bits; packed: in mlx-community's layout, all but the layers in skip."""
    raw = json.loads((source / "config.json").read_text()) | {
        "intermediate_size": 192, "torch_dtype": "bfloat16"}
    write_model(folder, raw, source)
    if packed:
        raw["quantization"] = {"bits": packed, "group_size": 32, **{path: False for path in skip}}
    arrays = {}
    for name, weight in mx.load(str(folder / "model.safetensors")).items():
        arrays[name], path = weight.astype(mx.bfloat16), name.removesuffix(".weight")
        if packed and weight.ndim == 2 and path not in skip:
            arrays |= dict(zip((name, f"{path}.scales", f"{path}.biases"),
                               mx.quantize(arrays[name], 32, packed)))
    (folder / "config.json").write_text(json.dumps(raw))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder, raw


SKIP = ("model.embed_tokens", "model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("keys,stored", [
    ({}, {}), ({"dtype": "bfloat16"}, {}), ({"bits": 4}, {}), ({"bits": 3}, {}),
    ({"bits": 8, "dtype": "bfloat16"}, {}), ({}, {"packed": 4}),
    ({"dtype": "bfloat16"}, {"packed": 4}), ({}, {"packed": 8, "skip": SKIP})])
@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_weights_of_every_family_are_counted_as_they_are(family, keys, stored, tmp_path):
    """Biases, untied tables, groups that follow a row's width, layers left unpacked: all bytes."""
    folder, raw = family_folder(TINY if family == "tiny" else GOLDEN / family, tmp_path / "m",
                                **stored)
    model, _ = load(folder, keys.get("dtype"), keys.get("bits"))
    held = sum(v.nbytes for _, v in tree_flatten(model.parameters()))
    assert held == memory.weight_bytes(model.args, raw, config(**keys))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("full", [True, False])
def test_trained_part_is_what_gradient_and_optimizer_hold(full, dtype, small_folder):
    """Masters beside bfloat16 weights; LoRA's numbers and all moments are float32 in any case."""
    cfg = config(model=str(small_folder), lora_rank=4, full=full, dtype=dtype)
    model, _ = prepare_model(cfg)
    held = lambda tree: sum(v.nbytes for _, v in tree_flatten(tree) if v.ndim)
    gradient, state = held(model.trainable_parameters()), held(make_optimizer(cfg, model).state)
    found = memory.step_bytes(model.args, cfg, memory.Load(64, 8, 8))["trained"]
    assert found == gradient + state
    assert state == (3 if full and dtype == "bfloat16" else 2) * 4 * memory.trained_numbers(
        model.args, cfg)


def test_more_memory_for_more_rows_less_when_recomputed():
    args, load = parse_args(SHAPES["Llama-3.2-1B"], "x"), memory.Load(512, 64, 512)
    peak = lambda load=load, **keys: memory.estimate(args, Config(**keys), load, 2 ** 32)["peak"]
    assert peak(recompute="block") < peak(recompute="mlp") < peak()
    # of logits, which exist for a few rows at a time: a hundred, where memory is not scarce
    assert memory.logit_rows(args, "none") * parallel.count() < load.logit_rows
    more_rows = memory.Load(512, 64, 2048)
    assert peak() < peak(memory.Load(1024, 64, 512)) and peak() == peak(more_rows)
    assert peak(full=True) < peak(more_rows, full=True)     # all at once
    assert peak(full=True) - peak() > 12    # gradient and two moments of 1.24 B numbers, in GiB


def test_what_does_not_fit_is_refused_with_advice(write_config):
    """One line, before and after loading, that says what would help; nothing is left behind."""
    path, folder = write_config("c", memory_limit_gib=0.1)
    done = run("train.py", path)
    assert_one_clear_line(done, "0.1 are there", "recompute=block", "grad_accum_steps=8", "bits=4")
    path, _ = write_config("d", memory_limit_gib=0.00001)
    assert_one_clear_line(run("train.py", path), "weights", "try bits=4")
    for value, expected in (("-1", "above 0"), ("nan", "a finite number"), ("0", "above 0")):
        path, _ = write_config("e", memory_limit_gib=value)
        assert_one_clear_line(run("train.py", path), "memory_limit_gib", expected)
    assert not folder.exists()


def test_run_reports_estimate_and_peak(write_config):
    path, folder = write_config("c")
    done = run("train.py", path, check=0)
    assert "estimated peak" in done.stdout and "peak memory" in done.stdout
    report = json.loads((folder / "report.json").read_text())
    # the libraries alone hold 0.06
    assert 0.1 < report["estimated_peak_gib"] < 2 and 0.06 < report["peak_gib"] < 2


def test_all_weights_on_top_of_an_adapter(write_config):
    """The base that an adapter had frozen is thawed: every weight moves."""
    path, first = write_config("first")
    run("train.py", path, check=0)
    cfg = load_config(path, [f"model={first}", "full=true", "run_dir=x"])
    model, _ = prepare_model(cfg)
    assert len(tree_flatten(model.trainable_parameters())) == len(tree_flatten(model.parameters()))


# --------------------------------------------------------------------------------------------------
# a real vocabulary, few blocks


def most_at_once(what, *args):
    """The most bytes of MLX's arrays during what(*args), beyond those before it."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    what(*args)
    return mx.get_peak_memory() - before


def decode(model, prompts, group, temperature):
    """generate.sample without a tokenizer: 6 tokens behind each prompt, nothing stops."""
    V = model.args.vocab_size
    uniforms = mx.random.uniform(shape=(len(prompts) * group, 6))
    sample_batch(model, prompts, group, lambda logits, u: choose(logits, u, temperature), uniforms,
                 mx.zeros(V, mx.bool_))


@pytest.mark.parametrize("parts", [1, 2])
def test_inspections_and_sampling_need_what_is_estimated(parts, monkeypatch):
    """SmolLM2's 49,152 tokens, two blocks: the lens, validation, 8 prompts x 8, to an eighth.

    All that a step of 4 rows needs here is a tenth of it.
    """
    monkeypatch.setattr(blas, "PARTS", parts)
    mx.set_cache_limit(0)
    model = random_model(small_config() | {"vocab_size": 49152})
    mx.eval(model.parameters())
    prompts = [[1 + (7 * i + t) % 900 for t in range(10)] for i in range(64)]
    cfg, load = config(batch_size=4), memory.Load(40, 10, 16, prompt=10, valid=64)
    lens_alone, decoding_alone = (replace(cfg, **{f"{off}_every_steps": 0})
                                  for off in ("eval", "lens"))
    rollouts = replace(cfg, method="grpo", batch_size=64)
    sampling = memory.step_bytes(model.args, rollouts, memory.Load(440, 16, 384, 64 * 16))
    fused = 4 * sum(a * b for name, (a, b) in memory.matrix_shapes(model.args).items()
                    if name in cfg.lora_targets) * model.args.num_hidden_layers
    estimated = {"lens": memory.inspection_bytes(model.args, lens_alone, load),
                 "validation": memory.inspection_bytes(model.args, decoding_alone, load),
                 "sampling": sampling["sampling"] - fused}
    calls = {"lens": (read_prompts, model, prompts, [[5, 6, 7]] * 64),
             "validation": (decode, model, prompts, 1, 0),
             "sampling": (decode, model, prompts[:8], 8, 1.0)}
    # the most of three: where another process has a core, two parts may not be at work at once
    measured = {name: max(most_at_once(*call) for _ in range(3)) for name, call in calls.items()}
    ratios = {name: round(estimated[name] / measured[name], 3) for name in measured}
    assert all(0.875 < ratio < 1.125 for ratio in ratios.values()), (ratios, measured)
    whole = memory.estimate(model.args, cfg, load, 0)
    assert whole["peak"] > whole["process"] + measured["lens"] * 0.875 / memory.GIB
    assert whole["activations"] + whole["logits"] < whole["inspection"] / 5
