"""Speed and memory of the project's own commands, measured side by side in one run.

    python bench.py --json bench.json [--only train_sft] [--model models/tiny]
    python bench.py --only grpo_step --peer-python OTHER/bin/python  # beside TRL, installed there
    python bench.py --only lens --peer-python OTHER/bin/python  # transformers, TransformerLens

Machines are shared and noisy: read the ratios, not the seconds. Each figure is the median over
rounds in which both sides run in turn, each in a process of its own, since a BLAS cannot be
exchanged in a running one. Training is measured on the bundled model against MLX's bundled BLAS;
generation, a GRPO step and the lens on random weights of 40 M parameters, against peers/.
"""
import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import blas
import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers

from config import BadInput, Config, run_main, write_text
from data import Problem
from generate import sample
from grpo import Rollouts
from lens import read_prompts
from lora import apply_lora
from memory import peak_gib
from model import Llama, init_weights, load, parse_args, save_safetensors
from plot import read_records
from train import compile_step, make_loss, take_step

TRAINING = {"train_sft": "configs/sft.yaml", "train_sft_full": "configs/sft_full.yaml",
            "train_dual_reward": "configs/dual_reward.yaml"}
WORKS = (*TRAINING, "generate", "grpo_step", "lens")
STEPS, WARM_UP_STEPS, ROUNDS = 40, 10, 3
PROMPTS, GROUP, PROMPT_TOKENS, COMPLETION_TOKENS = 4, 8, 32, 16
# the peers are fastest at 64 prompts a batch; ours takes the batches that read_prompts makes
LENS_PROMPTS, LENS_TOKENS, LENS_TOP, LENS_PEER_BATCH = 256, 16, 5, 64
HERE = Path(__file__).parent


def time_training(config: str, model: str, blas_name: str) -> dict:
    """Train for a few steps in a process of its own.

    Returns the median seconds of a step and tokens/s after warm-up, and peak GiB.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", config, f"model={model}", f"run_dir={folder}/run",
                   f"steps={STEPS}", "eval_every_steps=0", "lens_every_steps=0",
                   "data_operations=add"]
        run_other(command, NANOLENS_BLAS=blas_name)
        records = read_records(Path(folder, "run", "metrics.jsonl"))
    steady = [r for r in records if r["step"] > WARM_UP_STEPS]
    return {"seconds": statistics.median(r["seconds"] for r in steady),
            "tokens_per_s": statistics.median(r["tokens_per_s"] for r in steady),
            "peak_gib": records[-1]["peak_gib"]}


def write_random_model(folder: Path) -> None:
    """A Llama of 40 M random parameters, words w0, w1, ... as tokens; for timing only."""
    V = 32000
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V,
           "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
           "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1408,
           "tie_word_embeddings": True, "max_position_embeddings": 2048, "rope_theta": 500000.0,
           "rms_norm_eps": 1e-6, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
    model = Llama(parse_args(raw, "bench"))
    mx.random.seed(0)
    init_weights(model)
    save_safetensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())))
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(V - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    write_text(folder / "tokenizer_config.json", json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    write_text(folder / "config.json", json.dumps(raw))


def time_here(work: str, folder: str) -> dict:
    """Our own side of `generate`, `grpo_step` and `lens`, in this process."""
    model, tokenizer = load(folder)
    tokenizer.stop_ids = set()      # every completion has the same length on every side
    rng, seconds = random.Random(0), []
    tokens = PROMPTS * GROUP * COMPLETION_TOKENS
    if work == "lens":
        tokens = LENS_PROMPTS * LENS_TOKENS
        prompts = [[rng.randrange(3, 1000) for _ in range(LENS_TOKENS)]
                   for _ in range(LENS_PROMPTS)]
        targets = [[rng.randrange(3, 1000)] for _ in prompts]
        repeat = lambda _: read_prompts(model, prompts, targets, LENS_TOP)
    elif work == "generate":
        prompts = [[rng.randrange(3, 1000) for _ in range(PROMPT_TOKENS)]
                   for _ in range(PROMPTS * GROUP)]
        repeat = lambda _: sample(model, tokenizer, prompts, COMPLETION_TOKENS)
    else:
        apply_lora(model, 16, 32.0, ("q", "k", "v", "o"))
        cfg = Config(method="grpo", batch_size=PROMPTS * GROUP, grpo_group_size=GROUP,
                     grpo_kl_weight=0.04, max_completion_tokens=COMPLETION_TOKENS, lr=1e-5)
        text = lambda: " ".join(f"w{rng.randrange(1000)}" for _ in range(PROMPT_TOKENS))
        source = Rollouts(model, tokenizer, [Problem(text(), "w1", "", "") for _ in range(256)],
                          cfg)
        source.reward = lambda problem, completion: rng.random()
        optimizer = optim.AdamW(cfg.lr)
        optimizer.init(model.trainable_parameters())
        compiled = compile_step(model, optimizer, make_loss(cfg, 0))

        def repeat(step):
            for micro_batches in source.at(step)[0]:
                take_step(step, micro_batches, *compiled, optimizer, cfg.lr, cfg)
    for step in range(5):
        start = time.perf_counter()
        repeat(step)
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[1:])
    return {"seconds": middle, "tokens_per_s": tokens / middle, "peak_gib": round(peak_gib(), 2)}


def run_other(command: list[str], **env) -> str:
    """Run a command in this folder; returns its standard output. Raises BadInput if it fails."""
    done = subprocess.run(command, cwd=HERE, env={**os.environ, **env}, capture_output=True,
                          text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"{' '.join(command)} failed: {why}")
    return done.stdout


def measure(work: str, model: str, peer_python: str | None) -> dict:
    """One work beside its peers: {work, seconds, tokens_per_s, peak_gib, peers: {name: ...}}."""
    if work in TRAINING:
        ours = lambda: time_training(TRAINING[work], model, os.environ.get("NANOLENS_BLAS", ""))
        peers = {"mlx's bundled BLAS": lambda: time_training(TRAINING[work], model, "none")}
    else:
        last_line = lambda *command, **env: json.loads(
            run_other([*map(str, command)], **env).splitlines()[-1])
        shapes = (PROMPT_TOKENS, COMPLETION_TOKENS)
        ours = lambda: last_line(sys.executable, "bench.py", "--only", work, "--here", model)
        peers = {}
        if work == "generate":
            rows = PROMPTS * GROUP
            if importlib.util.find_spec("mlx_lm"):
                peers["mlx-lm"] = lambda: last_line(
                    sys.executable, "peers/generate.py", "mlx-lm", model, rows, *shapes,
                    NANOLENS_BLAS=blas.LOADED)
            if peer_python:
                peers["transformers"] = lambda: last_line(
                    peer_python, "peers/generate.py", "transformers", model, rows, *shapes)
        elif work == "lens" and peer_python:
            for which in ("transformers", "transformer_lens"):
                for name, more in ((f"{which}, top tokens only", ()),
                                   (f"{which}, the same numbers as ours", ("all",))):
                    peers[name] = lambda which=which, more=more: last_line(
                        peer_python, "peers/lens.py", which, model, LENS_PROMPTS, LENS_TOKENS,
                        LENS_PEER_BATCH, *more)
        elif peer_python:
            peers["TRL"] = lambda: last_line(
                peer_python, "peers/trl_grpo.py", model, PROMPTS, GROUP, *shapes, 3)
    sides = {"": ours, **peers}
    # in turn, so that a slow minute of the machine hits all
    rounds = [{name: side() for name, side in sides.items()} for _ in range(ROUNDS)]
    middle = lambda name: {key: statistics.median(r[name][key] for r in rounds)
                           for key in rounds[0][name]}
    mine = middle("")
    beside = {name: middle(name) for name in peers}
    figures = {name: {"seconds": p["seconds"], "peak_gib": p["peak_gib"],
                      "ratio": p["seconds"] / mine["seconds"]} for name, p in beside.items()}
    return {"work": work, **mine, "limit_share": None, "peers": figures}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure speed and memory, ours and peers'.")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", choices=WORKS)
    parser.add_argument("--model", help="models/tiny for training, random weights otherwise")
    parser.add_argument("--peer-python", help="a Python with torch, transformers, and per "
                        "work peft and trl, or transformer_lens")
    parser.add_argument("--here", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(time_here(args.only, args.here)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for work in [args.only] if args.only else WORKS:
            model = args.model or ("models/tiny" if work in TRAINING else folder)
            if model == folder and not Path(folder, "config.json").exists():
                write_random_model(Path(folder))
            results.append(measure(work, model, args.peer_python))
    for r in results:
        print(f"{r['work']}: {1000 * r['seconds']:.1f} ms, {r['tokens_per_s']:.0f} tokens/s, "
              f"peak {r['peak_gib']:.2f} GiB")
        for name, peer in r["peers"].items():
            print(f"  {name}: {1000 * peer['seconds']:.1f} ms, peak {peer['peak_gib']:.2f} GiB; "
                  f"ours is {peer['ratio']:.1f} times as fast")
    if args.json:
        write_text(Path(args.json), json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
