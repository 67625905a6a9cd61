"""Our own side of each work, on random weights of any shape: what a process of its own is given.

Training takes the very steps of train.py, without its evaluations and files, on rows that are there
as ids, so that any model's tokenizer will do.
"""
import itertools
import json
import os
import random
import statistics
import subprocess
from functools import partial
from pathlib import Path

import engine.blas  # before mlx
import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers

from bench.limit import RANK, measure_machine
from bench.peers.clock import clock, random_prompts
from config import Config, load_overrides, run_main
from data import Batches
from engine import memory
from files.disk import read_json, write_bytes, write_text
from files.keys import BadInput
from files.model_folder import parse_args, save_safetensors
from generate import choose, sample
from grpo import Answers, Rollouts, rollout_loss
from lens import read_prompts
from losses import dual_loss, sft_loss
from model import Llama, load
from report.conversation import stream_text
from text.arithmetic import Problem
from text.rows import Row
from train import accumulate, compile_step, make_optimizer, prepare_model

ROOT = Path(__file__).parent.parent
TOP = 5     # tokens that the lens returns for each tap
TRAINING = ("sft", "dual_reward", "grpo")


def llama_config(D: int, L: int, H: int, K: int, F: int, V: int) -> dict:
    """config.json of a small Llama: width, blocks, heads, key-value heads, MLP, vocabulary."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V,
            "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H,
            "num_key_value_heads": K, "head_dim": D // H, "intermediate_size": F,
            "tie_word_embeddings": True, "max_position_embeddings": 8192, "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}


def write_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer whose tokens are words: <unk>, <s>, </s>, then w0, w1, ..."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(vocab_size - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_bytes(folder / "tokenizer.json", tokenizer.to_str().encode())
    write_text(folder / "tokenizer_config.json", json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>", "pad_token": "</s>"}))


def write_random_model(folder: Path, raw: dict) -> Path:
    """A checkpoint of random weights of config.json `raw`, a shard a block, and a word tokenizer.

    Blocks share one set of random numbers: shapes, types and files are what is tried, and drawing
    billions of numbers would take longer than all the rest. A folder that is there is left alone.
    """
    if (folder / "config.json").exists():
        return folder
    one = Llama(parse_args(raw | {"num_hidden_layers": 1}, str(folder)))
    dtype = getattr(mx, raw.get("torch_dtype", "float32"))
    mx.random.seed(0)
    weights = {}
    for key, value in tree_flatten(one.parameters()):
        drawn = mx.ones(value.shape) if value.ndim == 1 else 0.02 * mx.random.normal(value.shape)
        weights[key] = drawn.astype(dtype)
        mx.eval(weights[key])   # one at a time: never two copies of all
    rest = {key: value for key, value in weights.items() if ".layers." not in key}
    shards = {"model-rest.safetensors": rest}
    for i in range(raw["num_hidden_layers"]):
        shards[f"model-block{i}.safetensors"] = {
            key.replace(".layers.0.", f".layers.{i}."): value
            for key, value in weights.items() if key not in rest}
    for file, arrays in shards.items():
        save_safetensors(folder / file, arrays)
    write_text(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {
        key: file for file, arrays in shards.items() for key in arrays}}))
    write_word_tokenizer(folder, raw["vocab_size"])
    write_text(folder / "config.json", json.dumps(raw))     # last: a folder that has it is whole
    return folder


def make_method(cfg: Config, model: Llama, tokenizer, sizes: dict):
    """The batch source and the loss, as train.make_method's, on rows or prompts of random ids."""
    prompts = random_prompts(cfg.model, max(256, sizes["rows"]), sizes["tokens"])
    if cfg.method != "grpo":
        rows = [Row(ids, len(ids) - sizes["answer"], class_id=5) for ids in prompts]
        if cfg.method == "sft":
            return Batches(rows, cfg), partial(sft_loss, cfg)
        return Batches(rows, cfg), partial(dual_loss, cfg)
    tokenizer.stop_ids = set()      # every completion has the same length on every side
    rewards, judge = random.Random(0), Answers(model, tokenizer, [], cfg)
    judge.prompts = prompts
    # random, so that every group has an advantage
    judge.functions = [("random", lambda problem, completion: rewards.random(), 1.0)]
    problems = [Problem("", "0", "", "")] * len(prompts)
    return Rollouts(model, problems, cfg, judge), partial(rollout_loss, cfg, None)


def training_call(work: str, folder: str, sizes: dict, keys: list[str], about: dict):
    """A function that takes the next whole step: batch, loss, gradients, clipping, AdamW."""
    group = sizes.get("group", 1)
    more = [f"grpo_group_size={group}", "grpo_kl_weight=0.04", "grpo_guard=false",
            f"max_completion_tokens={sizes['completion']}"] if work == "grpo" else []
    cfg = load_overrides([
        f"method={work}", f"model={folder}", f"batch_size={sizes['rows'] * group}", "lr=1e-5",
        f"lora_rank={RANK}", f"lora_alpha={2 * RANK}", "lora_targets=q,k,v,o", *more, *keys])
    raw = read_json(Path(folder) / "config.json")
    if cfg.full or cfg.bits or raw.get("quantization") or raw.get("quantization_config"):
        engine.blas.operations_in_own_order()   # as train.train: before anything is evaluated
    model, tokenizer = prepare_model(cfg)
    source, loss = make_method(cfg, model, tokenizer, sizes)
    optimizer = make_optimizer(cfg, model)
    # the limits of a real run
    about["estimated_gib"] = memory.prepare(cfg, model, raw, memory.load_of(cfg, source))["peak"]
    loss_and_grads, update = compile_step(cfg, model, optimizer, loss)
    steps, about["losses"] = itertools.count(), []

    def step():
        updates, _ = source.at(next(steps))
        for micro_batches in updates:
            grads, sums, maxima = accumulate(loss_and_grads, micro_batches, model.parts)
            record = update(grads, sums | maxima, cfg.lr)
        about["losses"].append(round(record["loss"], 3))
    return step


def make_call(work: str, folder: str, sizes: dict, keys: list[str], about: dict):
    """A function that does a work once; keys: of Config; about: what there is to say besides."""
    if work in TRAINING:
        return training_call(work, folder, sizes, keys, about)
    cfg = load_overrides([f"model={folder}", *keys])
    read = lambda: load(folder, cfg.dtype, cfg.bits)
    if work == "load":
        return lambda: mx.eval(read()[0].parameters())
    model, tokenizer = read()
    mx.eval(model.parameters())
    prompts = random_prompts(folder, sizes["rows"], sizes["tokens"])
    if work == "lens":
        targets = [ids[:1] for ids in prompts]
        return lambda: read_prompts(model, prompts, targets, TOP)
    tokenizer.stop_ids = set()
    if work == "chat":      # what generate.py --chat prints, a piece a token
        greedy = partial(choose, temperature=0)
        return lambda: list(stream_text(model, tokenizer, *prompts, sizes["completion"], greedy))
    return lambda: sample(model, tokenizer, prompts, sizes["completion"])


def time_here(work: str, folder: str, sizes: dict, count: int, keys: list[str] = ()) -> dict:
    """Our side of a work in this process: median seconds, peak GiB, and GiB before the model.

    Work "machine": what the machine gives, limit.measure_machine's.
    """
    if work == "machine":
        shape = read_json(Path(folder) / "config.json")
        return measure_machine(shape["hidden_size"], shape["intermediate_size"], sizes["rows"])
    about, before = {}, memory.peak_gib()
    seconds = clock(make_call(work, folder, sizes, keys, about), count)
    return {"seconds": statistics.median(seconds), "peak_gib": memory.peak_gib(),
            "before_gib": before, **about}


def own_command(work: str, folder: str | Path, sizes: dict, count: int,
                keys: list[str] = ()) -> list:
    """`time_here` as a command behind a Python, for a process of its own."""
    return ["-m", "bench.ours", work, folder, json.dumps(sizes), count, *keys]


def run_other(command: list, **env) -> str:
    """Run a command in the project's folder; its standard output, BadInput where it fails."""
    # without the order of operations that engine/blas.py has set for this process
    own = {k: v for k, v in os.environ.items() if k != engine.blas.ORDER}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=own | env, capture_output=True,
                          text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"{' '.join(map(str, command[1:3]))} failed: {why}")
    return done.stdout


def main(argv: list[str]) -> None:
    """The other end of `own_command`: one line of JSON."""
    work, folder, sizes, count, *keys = argv
    print(json.dumps(time_here(work, folder, json.loads(sizes), int(count), keys)))


if __name__ == "__main__":
    run_main(main)
