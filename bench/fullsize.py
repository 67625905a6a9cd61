"""The real path on the real shapes: random weights of exactly a published model's, on this machine.

    python fullsize.py                              # make fullsize: all, half an hour on two cores
    python fullsize.py sft grpo recompute=mlp       # some works, any key
    python fullsize.py sft --peer-python OTHER/bin/python   # beside transformers and peft

For Llama-3.2-1B's shapes (1.24 B parameters, 128,256 tokens): load, two steps each of SFT,
dual-reward and GRPO, the lens, generation; plain, with activations recomputed, and in 4 bits. Then
Llama-3.1-8B's and Qwen2.5-32B's, in 4 bits and with a few of their blocks, and the arithmetic for
the rest. Every work runs in a process of its own: its peak memory is its own.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers

import memory
from config import BadInput, Config, json_lines, load_overrides, run_main, write_bytes, write_text
from generate import sample
from lens import read_prompts
from model import Llama, load, parse_args
from train import compile_step, load_source, make_loss, next_updates, prepare_model, take_updates

COMMON = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu",
          "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 64,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
         "rope_theta": 500000.0, **COMMON}
SHAPES = {
    "Llama-3.2-1B": LLAMA | {
        "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
        "tie_word_embeddings": True},
    "Llama-3.1-8B": LLAMA | {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "head_dim": 128,
        "tie_word_embeddings": False},
    "Qwen2.5-32B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 5120,
        "num_hidden_layers": 64, "intermediate_size": 27648, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 152064, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, **COMMON},
}
BLOCKS = {"Llama-3.2-1B": 16, "Llama-3.1-8B": 4, "Qwen2.5-32B": 2}  # on disk and in memory here
PROMPT, ANSWER = 55, 7          # words; with BOS and EOS 64 tokens, 8 of them targets
STEP = ["batch_size=8", "lr=1e-5"]
GRPO = ["grpo_group_size=4", "grpo_reward=fullsize.py:reward_sum", "max_completion_tokens=4"]
WORKS = ("load", "sft", "dual_reward", "grpo", "lens", "generate")


def reward_sum(problem, completion) -> float:
    """Random weights are never right; a reward that differs within groups, so that GRPO works."""
    return float(sum(completion.ids) % 7)


def write_word_tokenizer(folder: Path, vocab_size: int, *first: str) -> None:
    """A tokenizer whose tokens are words: the special ones, `first`, then w0, w1, ..."""
    words = ["<unk>", "<s>", "</s>", *first]
    words += [f"w{i}" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_bytes(folder / "tokenizer.json", tokenizer.to_str().encode())
    write_text(folder / "tokenizer_config.json", json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>", "pad_token": "</s>"}))


def write_model(name: str, folder: Path) -> Path:
    """A sharded checkpoint of random bfloat16 weights, a shard a block, and a word tokenizer.

    Blocks share one set of random numbers: shapes, types and files are what is tried, and drawing
    billions of numbers would take longer than all the rest.
    """
    folder = folder / name
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    raw = SHAPES[name] | {"num_hidden_layers": BLOCKS[name]}
    one = Llama(parse_args(raw | {"num_hidden_layers": 1}, name))
    mx.random.seed(0)
    weights = {}
    for key, value in tree_flatten(one.parameters()):
        drawn = (0.02 * mx.random.normal(value.shape)).astype(mx.bfloat16)
        weights[key] = mx.ones(value.shape, mx.bfloat16) if value.ndim == 1 else drawn
        mx.eval(weights[key])
    shards = {"model-rest.safetensors": {k: v for k, v in weights.items() if ".layers." not in k}}
    block = {k: v for k, v in weights.items() if ".layers." in k}
    for i in range(BLOCKS[name]):
        shards[f"model-block{i}.safetensors"] = {
            k.replace(".layers.0.", f".layers.{i}."): v for k, v in block.items()}
    for file, arrays in shards.items():
        mx.save_safetensors(str(folder / file), arrays, metadata={"format": "pt"})
    where = {key: file for file, arrays in shards.items() for key in arrays}
    write_text(folder / "model.safetensors.index.json", json.dumps(
        {"metadata": {}, "weight_map": where}))
    write_word_tokenizer(folder, raw["vocab_size"], "add", "subtract", "multiply")
    for split in ("train", "valid", "test"):
        text = lambda first, n: " ".join(f"w{first + i}" for i in range(n))
        rows = [{"prompt": text(i, PROMPT) + " ", "response": text(7 * i, ANSWER),
                 "operation": "add"} for i in range(32)]
        write_text(folder / f"{split}.jsonl", json_lines(rows))
    write_text(folder / "config.json", json.dumps(raw))
    return folder


def do_work(work: str, folder: str, overrides: list[str]) -> dict:
    """One work in this process: {seconds, peak_gib, ...}; of training, the second step's."""
    start = time.perf_counter()
    if work in ("sft", "dual_reward", "grpo"):
        cfg = load_overrides([*STEP, *(GRPO if work == "grpo" else []), f"method={work}",
                              f"model={folder}", f"data={folder}", *overrides])
        return take_two_steps(cfg)
    cfg = load_overrides([f"model={folder}", *overrides])
    model, tokenizer = load(folder, cfg.dtype, cfg.bits, group_size=cfg.bits_group_size)
    if work != "load":
        start = time.perf_counter()
        prompts = [tokenizer.encode_prompt(f"w{n} w8 w9 ") for n in range(8)]
        if work == "lens":
            read_prompts(model, prompts, [[5]] * 8, 5)
        else:
            sample(model, tokenizer, prompts[:2], 8)
    return {"seconds": time.perf_counter() - start, "peak_gib": memory.peak_gib()}


def take_two_steps(cfg: Config) -> dict:
    """What train.train does, without its evaluations and files."""
    model, tokenizer = prepare_model(cfg)
    source = load_source(cfg, model, tokenizer)
    optimizer = optim.AdamW(cfg.lr)
    optimizer.init(model.trainable_parameters())
    estimated = memory.prepare(cfg, model, memory.load_of(cfg, source))["peak"]
    compiled = compile_step(model, optimizer, make_loss(cfg, 0))
    losses = []
    for step in range(2):
        start = time.perf_counter()
        updates, about = next_updates(source, step, cfg)
        record = take_updates(None, step, updates, about["rows"], compiled, optimizer, cfg.lr, cfg)
        losses.append(round(record["loss"], 3))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gib": memory.peak_gib(), "estimated": estimated,
            "losses": losses}


def run_json(command: list[str]) -> dict:
    """A command's last line, as JSON; BadInput with the last line of its errors where it fails."""
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"{' '.join(command[1:])} failed: "
                       f"{(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def arithmetic() -> list[str]:
    """Estimated peaks at full depth: LoRA on q, k, v, o, 8 rows of 64 tokens."""
    lines = []
    for name, raw in SHAPES.items():
        args = parse_args(raw, name)
        for label, keys in (("float32", {"dtype": "float32"}), ("16 bits", {"dtype": "bfloat16"}),
                            ("4 bits", {"bits": 4})):
            found = [memory.estimate(args, cfg, memory.Load(512, 64, 64),
                                     memory.weight_bytes(raw, cfg))
                     for cfg in (Config(**keys), Config(recompute="block", **keys))]
            lines.append(f"{name:13}  {label:8}  weights {found[0]['weights']:6.1f}  peak "
                         f"{found[0]['peak']:6.1f}, recompute=block {found[1]['peak']:6.1f} GiB")
    return lines


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Full-size shapes with random weights.")
    parser.add_argument("words", nargs="*", metavar="WORK or key=value",
                        help=f"{', '.join(WORKS)}; none: all")
    parser.add_argument("--folder", type=Path, default=Path("runs/fullsize"),
                        help="where checkpoints are written, 2 to 6 GB each")
    parser.add_argument("--only", choices=SHAPES, help="one model's shapes")
    parser.add_argument("--peer-python", help="a Python with torch, transformers and peft")
    parser.add_argument("--here", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)   # words may stand behind options
    overrides = [word for word in args.words if "=" in word]
    works = [word for word in args.words if "=" not in word] or list(WORKS)
    if wrong := [work for work in works if work not in WORKS]:
        raise BadInput(f"unknown work {', '.join(wrong)}; expected {', '.join(WORKS)}")
    if args.here:
        print(json.dumps(do_work(works[0], args.here, overrides)))
        return
    for name in [args.only] if args.only else SHAPES:
        folder = write_model(name, args.folder)
        if args.peer_python:
            peer = run_json([args.peer_python, "peers/sft.py", str(folder), "8", "64", "8", "2"])
            print(f"{name:13} transformers + peft, float32: sft {peer['seconds']:.1f} s, "
                  f"peak {peer['peak_gib']:.2f} GiB", flush=True)
        small = ["bits=4", "recompute=block"]
        variants = [[], ["recompute=mlp"], ["recompute=block"], small]
        for more in [overrides] if overrides else variants if name == "Llama-3.2-1B" else [small]:
            for work in works:
                if more and work in ("load", "lens", "generate") and "bits=4" not in more:
                    continue    # nothing is recomputed there
                found = run_json([sys.executable, "fullsize.py", work, *more,
                                  "--here", str(folder)])
                about = (f", estimated {found['estimated']:.2f}; losses {found['losses']}"
                         if "losses" in found else "")
                print(f"{name:13} {BLOCKS[name]:2} blocks  {' '.join(more) or 'float32':22} "
                      f"{work:11} {found['seconds']:6.1f} s  peak {found['peak_gib']:5.2f} GiB"
                      f"{about}", flush=True)
    print("\nEstimates at full depth, LoRA on q, k, v, o, 8 rows of 64 tokens:")
    print("\n".join(arithmetic()))


if __name__ == "__main__":
    run_main(main)
