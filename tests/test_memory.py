"""Memory: what is computed again changes no number; what is estimated is what is there."""
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    TINY,
    TINY_COT,
    assert_one_clear_line,
    config,
    grads_of,
    run,
    small_config,
    small_model,
    write_model,
)
from mlx.utils import tree_flatten

import memory
import model as model_module
from bench.fullsize import SHAPES
from config import Config, load_config
from lora import apply_lora
from model import ModelArgs, parse_args
from tokenizer import load_tokenizer
from train import load_source, next_updates, prepare_model

STEPS = {   # method: settings of one step
    "sft": {}, "dual_reward": {}, "mask_prompt": {"mask_prompt": False},
    "grpo": {"grpo_group_size": 4, "max_completion_tokens": 5, "grpo_entropy_weight": 0.1},
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
    batches = load_source(cfg, model, tokenizer)
    batches.reward = lambda problem, completion: float(len(completion.text))
    return model, cfg, next_updates(batches, 0, cfg)[0][0]


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("which,full", [(w, f) for w in STEPS for f in (False, True)
                                        if not (f and w == "markovian")])
def test_recomputing_changes_no_gradient(recompute, which, full, sums_data, monkeypatch):
    """Loss and every gradient, LoRA's or all weights', behind prefilled caches too.

    `mx.checkpoint` gives weights that its function closes over gradient 0, and a cache written
    twice would shift positions. The logits come in parts of 3 rows.
    """
    monkeypatch.setattr(model_module, "logit_rows", lambda *_: 3)
    model, cfg, micro_batches = one_step(which, full, sums_data)
    expected_loss, _, expected = grads_of(model, cfg, micro_batches)
    model.recompute = recompute
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
        found = memory.weight_bytes(SHAPES[name], Config(dtype="float32")) / 4e9
        assert abs(found - billions) < 0.001, (name, found)
        args = parse_args(SHAPES[name], name)
        assert isinstance(args, ModelArgs)
        biases = 64 * (5120 + 2 * 1024) if "Qwen" in name else 0
        full = memory.trained_numbers(args, Config(full=True)) + biases
        assert abs(full / 1e9 - billions) < 0.001


@pytest.mark.parametrize("keys", [{}, {"bits": 4, "bits_group_size": 32}, {"full": True}])
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
    assert held == memory.weight_bytes(raw | {"torch_dtype": "float32"}, cfg)


def test_more_memory_for_more_rows_less_when_recomputed():
    args, load = parse_args(SHAPES["Llama-3.2-1B"], "x"), memory.Load(512, 64, 64)
    peak = lambda load=load, **keys: memory.estimate(args, Config(**keys), load, 2 ** 32)["peak"]
    assert peak(recompute="block") < peak(recompute="mlp") < peak()
    more_rows = memory.Load(512, 64, 512)   # of logits, which exist for a few rows at a time
    assert peak() < peak(memory.Load(1024, 64, 64)) and peak() == peak(more_rows)
    assert peak(full=True) < peak(more_rows, full=True)     # all at once
    assert peak(full=True) - peak() > 12    # gradient and two moments of 1.24 B numbers, in GiB


def test_what_does_not_fit_is_refused_with_advice(write_config):
    """One line, before and after loading, that says what would help; nothing is left behind."""
    path, folder = write_config("c", memory_limit_gib=0.2)
    done = run("train.py", path)
    assert_one_clear_line(done, "0.2 are there", "recompute=block", "grad_accum_steps=8", "bits=4")
    path, _ = write_config("d", memory_limit_gib=0.00001)
    assert_one_clear_line(run("train.py", path), "weights", "try bits=4")
    for value in ("-1", "nan", "0"):
        path, _ = write_config("e", cache_limit_gib=value)
        assert_one_clear_line(run("train.py", path), "cache_limit_gib", "above 0")
    assert not folder.exists()


def test_run_reports_estimate_and_peak(write_config):
    path, folder = write_config("c")
    done = run("train.py", path, check=0)
    assert "estimated peak" in done.stdout and "peak memory" in done.stdout
    report = json.loads((folder / "report.json").read_text())
    # the libraries alone hold 0.07
    assert 0.1 < report["estimated_peak_gib"] < 2 and 0.07 < report["peak_gib"] < 2


def test_all_weights_on_top_of_an_adapter(write_config):
    """The base that an adapter had frozen is thawed: every weight moves."""
    path, first = write_config("first")
    run("train.py", path, check=0)
    cfg = load_config(path, [f"model={first}", "full=true", "run_dir=x"])
    model, _ = prepare_model(cfg)
    assert len(tree_flatten(model.trainable_parameters())) == len(tree_flatten(model.parameters()))
