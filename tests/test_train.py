"""The loop: it learns, and it stops before harm."""
import json
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, assert_one_clear_line, config, loss_of, run, small_model
from mlx.utils import tree_flatten

from checkpoint import load_checkpoint
from config import load_config
from data import Batches
from engine import parallel
from eval import measure_accuracy
from files.keys import BadInput, Stopped
from files.run_folder import Run
from model import load
from tasks.__main__ import write_task
from text.arithmetic import make_problem, sample_train
from text.rows import tokenize
from train import accumulate, compile_step, lr_at, make_optimizer, prepare_model, take_steps, train

IDS = {"add": 1010, "subtract": 1011, "multiply": 1012}


def tokenized(problems, tokenizer):
    return tokenize(problems, tokenizer, 128, [IDS[p.operation] for p in problems])


def steps(model, cfg, problems, tokenizer, loss=None):
    """The records of cfg.steps steps, taken as train.take_steps takes them."""
    batches = Batches(tokenized(problems, tokenizer), cfg)
    loss_and_grads, update = compile_step(cfg, model, make_optimizer(cfg, model),
                                          loss or loss_of(cfg))
    records = []
    for s in range(cfg.steps):
        [micro_batches], _ = batches.at(s)
        grads, sums, maxima = accumulate(loss_and_grads, micro_batches, model.parts)
        records.append(update(grads, sums | maxima, lr_at(s, cfg)))
    return records


def weights(path):
    return {k: np.array(v) for k, v in mx.load(str(path)).items()}


# --- it learns


def test_sft_learns_eight_answers(model, tokenizer):
    problems = [make_problem("add", a, 90 - a) for a in range(3, 7)]
    problems += [make_problem("multiply", a, 5) for a in (3, 6, 9, 12)]
    cfg = config(full=True, steps=80, batch_size=8, lr=1e-2)
    metrics = steps(model, cfg, problems, tokenizer)
    assert metrics[-1]["loss"] < 0.05 < metrics[0]["loss"]
    assert all(r["correct"] for r in measure_accuracy(model, tokenizer, problems, 4))


def test_dual_reward_makes_the_word_top_1(model, tokenizer):
    cfg = config(method="dual_reward", full=True, steps=60, batch_size=16, lr=1e-2,
                 class_weight=0.5)
    metrics = steps(model, cfg, sample_train(cfg)[:64], tokenizer)
    assert metrics[-1]["class_accuracy"] == 1.0
    assert metrics[-1]["class_loss"] < 0.1 < metrics[0]["class_loss"]


def test_accumulation_equals_one_batch(tokenizer):
    """4 x 8 rows with unequal target counts take the same step as 1 x 32.

    The same, that is, up to float32 summation order.
    """
    problems = sample_train(config(data_wordings=("symbolic", "worded")))[:64]
    results = []
    for parts in (1, 4):
        model = small_model()
        cfg = config(full=True, steps=3, batch_size=32, grad_accum_steps=parts, lr=1e-2,
                     mask_prompt=False)
        metrics = steps(model, cfg, problems, tokenizer)
        results.append((metrics, dict(tree_flatten(model.parameters()))))
    for a, b in zip(results[0][0], results[1][0]):
        assert abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-3
    for name, value in results[0][1].items():
        other = results[1][1][name]
        np.testing.assert_allclose(np.array(value), np.array(other), atol=2e-3, err_msg=name)


def test_adamw_and_clipping_against_numpy(model, tokenizer):
    """Two steps of one weight by the textbook's formulas in float64.

    They start from gradients of the uncompiled loss.
    """
    import mlx.nn as nn

    cfg = config(full=True, steps=2, batch_size=8, lr=1e-3, weight_decay=0.1, grad_clip=0.5,
                 lr_schedule="constant")
    problems, name = sample_train(cfg)[:16], "model.layers.0.mlp.up_proj.weight"
    start = small_model()
    weight = np.array(dict(tree_flatten(start.parameters()))[name]).astype(np.float64)
    metrics = steps(model, cfg, problems, tokenizer)
    [[batch]], _ = Batches(tokenized(problems, tokenizer), cfg).at(0)
    _, grads = nn.value_and_grad(start, loss_of(cfg))(start, batch)
    grads = {k: np.array(g).astype(np.float64) for k, g in tree_flatten(grads)}
    norm = np.sqrt(sum((g ** 2).sum() for g in grads.values()))
    assert abs(norm - metrics[0]["grad_norm"]) < 1e-4 * norm and norm > 0.5
    g = grads[name] * 0.5 / norm
    m, v = 0.1 * g, 0.001 * g * g
    one = weight * (1 - 1e-3 * 0.1) - 1e-3 * (m / 0.1) / (np.sqrt(v / 0.001) + 1e-8)
    model_one = small_model()
    steps(model_one, config(**{**vars(cfg), "steps": 1}), problems, tokenizer)
    ours = dict(tree_flatten(model_one.parameters()))[name]
    np.testing.assert_allclose(np.array(ours), one, atol=2e-5)


def test_learning_rate_schedule():
    cfg = config(lr=1.0, steps=10, lr_warmup_steps=2)
    rates = [lr_at(s, cfg) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and 0 < rates[-1] < 0.05
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert lr_at(9, config(lr=1.0, steps=10, lr_schedule="constant")) == 1.0


def test_few_traces(model, tokenizer):
    """mx.compile keeps a trace per shape, so one per length bucket, for each part of a batch.

    There are no more when the learning rate or counts change.
    """
    cfg = config(full=True, steps=12, batch_size=8, data_wordings=("symbolic", "worded"))
    traced, loss = [], loss_of(cfg)
    problems = sample_train(cfg)[:96]
    steps(model, cfg, problems, tokenizer, lambda *args: traced.append(1) or loss(*args))
    lengths = Batches(tokenized(problems, tokenizer), cfg).lengths
    assert 1 < len(lengths) and len(traced) <= len(lengths) * parallel.count(8)


# --- whole runs


def test_a_run_leaves_what_the_readme_names(write_config):
    path, folder = write_config(method="dual_reward")
    done = run("train.py", path, check=0)
    for name in ("config.yaml", "metrics.jsonl", "state.safetensors", "adapters.safetensors",
                 "adapter_config.json", "report.json", "emergence.png", "emergence.html"):
        assert (folder / name).exists(), name
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "lens" in r] == [0, 3, 6]
    assert [r["step"] for r in records if "valid_accuracy" in r] == [0, 3, 6]
    assert {"answer_loss", "class_loss", "class_accuracy", "grad_norm", "lr", "tokens_per_s",
            "peak_gib"} <= records[1].keys()
    report = json.loads((folder / "report.json").read_text())
    assert {"base", "accuracy", "layers"} <= report.keys() and "operation word" in done.stdout
    # the same command again says so and changes nothing; the stored config is itself a valid input
    before = (folder / "adapters.safetensors").stat().st_mtime_ns
    assert "is finished" in run("train.py", folder / "config.yaml", check=0).stdout
    assert (folder / "adapters.safetensors").stat().st_mtime_ns == before
    run("train.py", path, "overwrite=true", check=0)
    assert (folder / "adapters.safetensors").stat().st_mtime_ns != before
    run("eval.py", "--ckpt", folder, "--base", check=0)
    run("lens.py", "--ckpt", folder, "--prompt", "7 * 8 = ", check=0)
    run("generate.py", "--ckpt", folder, "--prompt", "7 * 8 = ", check=0)
    fused = folder.parent / "fused"
    run("lora.py", "--ckpt", folder, "--out", fused, check=0)
    tokens = mx.array([[1, 10, 20, 30, 40]])
    ours, theirs = load(fused)[0](tokens), load_checkpoint(folder)[0](tokens)
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-3)
    done = run("lora.py", "--ckpt", folder, "--out", fused)
    assert_one_clear_line(done, "already holds a model")


@pytest.mark.parametrize("keys", [
    {"full": "true"}, {"full": "true", "from_scratch": "true"},
    {"method": "dual_reward", "class_words": "answer,which,<0x01>"},
    {"data_operations": "divide", "data_wordings": "worded", "grad_clip": "0"},
    {"dtype": "bfloat16", "grad_accum_steps": 2},
])
def test_other_settings_run(write_config, keys, tmp_path):
    if "from_scratch" in keys:      # as `make tiny` does
        write_task("tiny", tmp_path / "tiny", samples=200)
        keys = keys | {"data": tmp_path / "tiny"}
    path, folder = write_config(**keys)
    train(load_config(path))
    model, tokenizer, cfg = load_checkpoint(folder)
    name = "model.safetensors" if cfg.full else "adapters.safetensors"
    assert cfg.steps == 6 and (folder / name).exists()
    assert load(folder)[0].args == model.args if cfg.full else True


def test_own_data_folder(write_config, tmp_path):
    for split in ("train", "valid", "test"):
        rows = [{"prompt": f"add {n} and ", "response": str(n), "operation": "add"}
                for n in range(9)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    path, folder = write_config(data=tmp_path, method="dual_reward", batch_size=4)
    report = train(load_config(path))
    assert report["accuracy"]["n"] == 9 and report["accuracy_named"] == {}


def test_ctrl_c_saves_and_exits_130(write_config):
    path, folder = write_config(steps=100000, save_every_steps=0, eval_every_steps=0,
                                lens_every_steps=0)
    process = subprocess.Popen([sys.executable, "train.py", str(path)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (
            metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved after step" in out and "Traceback" not in err
    saved = int(out.split("saved after step ")[1].split(".")[0])
    assert saved == json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (folder / "adapters.safetensors").exists()  # so that eval.py can look at it


def test_not_finite_stops_before_the_optimizer_moves(tokenizer, write_config):
    model = small_model()
    cfg = config(full=True, steps=1, batch_size=8)
    model.model.norm.weight = model.model.norm.weight * float("nan")
    before = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    source = Batches(tokenized(sample_train(cfg)[:16], tokenizer), cfg)
    with pytest.raises(Stopped, match="step 1: loss nan, gradient norm nan"):
        take_steps(cfg, Run(ROOT, {}, writes=False), 0, model, make_optimizer(cfg, model),
                   source, loss_of(cfg), lambda done: {}, 4)
    after = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    assert all(np.array_equal(v, before[k], equal_nan=True) for k, v in after.items())

    path, folder = write_config(lr="1e30", grad_clip=0)
    done = run("train.py", path)
    assert done.returncode == 3
    assert "stopped: step 2: loss" in done.stderr and "Traceback" not in done.stderr
    assert "on rows [" in done.stderr
    assert json.loads((folder / "failed_batch.json").read_text())["step"] == 2
    state = weights(folder / "state.safetensors")
    assert all(np.isfinite(v).all() for v in state.values() if v.ndim == 0)


# --- bad input: one line, exit code 2, nothing lost


def test_run_folder_of_another_config(write_config):
    path, folder = write_config()
    run("train.py", path, check=0)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = run("train.py", path, "lr=0.5", "seed=3")
    assert_one_clear_line(done, "holds a run with another config", "lr was", "seed was 0, is 3",
                          "overwrite=true")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_folder_that_is_no_run(write_config, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    path, _ = write_config(run_dir=tmp_path / "precious")
    for words in ((), ("overwrite=true",)):
        done = run("train.py", path, *words)
        assert_one_clear_line(done, "is not a run folder", "another run_dir")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_other_bad_input(write_config, small_folder, tmp_path):
    cases = [({"model": "no/such/folder"}, ("no model folder",)),
             ({"data_samples": 0}, ("is empty", "data_samples = 0")),
             ({"method": "dual_reward", "class_layer": 9}, ("class_layer = 9", "from 0 to 1")),
             ({"data": tmp_path / "none"}, ("expected arithmetic, a file",)),
             ({"bits": 4}, ("groups of 32 do not divide", "width 48", "train without bits"))]
    for i, (keys, words) in enumerate(cases):
        path, folder = write_config(f"bad{i}", **keys)
        assert_one_clear_line(run("train.py", path), *words)
        assert not folder.exists()  # a mistake leaves no folder behind
    (tmp_path / "rows").mkdir()
    row = json.dumps({"prompt": "x = ", "response": "1", "operation": "zebra"})
    for split in ("train", "valid", "test"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text(row + "\n")
    path, _ = write_config("word", data=tmp_path / "rows", method="dual_reward")
    assert_one_clear_line(run("train.py", path), "target words must be one token", "'zebra' is")
    path, _ = write_config("run")
    run("train.py", path, check=0)
    os.remove(tmp_path / "runs" / "run" / "adapters.safetensors")
    done = run("eval.py", "--ckpt", tmp_path / "runs" / "run")
    assert_one_clear_line(done, "holds no weights yet")


def test_seed_decides_the_start(small_folder):
    models = (prepare_model(config(model=str(small_folder), seed=s))[0] for s in (0, 0, 1))
    a, b, c = (dict(tree_flatten(model.trainable_parameters())) for model in models)
    assert all(mx.array_equal(a[k], b[k]) for k in a)
    assert any(not mx.array_equal(a[k], c[k]) for k in a)
    with pytest.raises(BadInput, match="no model folder"):
        prepare_model(config(model="none/such/folder"))
