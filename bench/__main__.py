"""How fast, beside what, and how far from the limit: each work timed in turn with its peers.

    python bench.py --json bench.json --png docs/bench.png  # all works, 40 M random parameters
    python bench.py --shape 1b --only sft                   # Llama-3.2-1B's; tiny: bundled
    python bench.py --only lens --model FOLDER --peer-python OTHER/bin/python

Machines are shared and noisy: read the ratios, not the seconds. In every round all sides run in
turn, each in a process of its own (a BLAS cannot be exchanged in a running one), and so does a
matrix product, which says what the machine gives at that moment. The limit of a work is the
operations that it cannot do without (`minimal_flops`, counted by hand) over the rate of that
product; where tokens are decoded, the bytes that must be read count too, if they take longer.
Peers live in peers/ and run in an environment of their own (`make bench-peers`); a missing one is
skipped. Training starts from ids on every side: no text is tokenised and no file written.
Quote nothing from a busy machine, of which a note tells: torch's threads wait for each other, and a
peer of small products then takes up to seventy times as long, ours hardly longer.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import blas
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

import memory
from bench.fullsize import write_model, write_word_tokenizer
from bench.peers.clock import clock, random_prompts
from clean import provenance
from config import BadInput, Config, run_main, write_text
from data import Batches, Problem, Row
from eval import class_block
from generate import sample
from grpo import Rollouts
from hub import find_folder, read_json
from lens import read_prompts
from model import Llama, ModelArgs, init_weights, load, parse_args, save_safetensors
from plot import plt, save_figure
from train import compile_step, make_loss, next_updates, prepare_model, take_updates

HERE = Path(__file__).parent
RANK, TOP, ROUNDS, LENS_PEER_BATCH = 16, 5, 3, 64   # the peers' lens is fastest at 64 prompts
SIZES = {   # what one call of each work is given
    "sft": {"rows": 8, "tokens": 64, "answer": 8},
    "dual_reward": {"rows": 8, "tokens": 64, "answer": 8},
    "grpo": {"rows": 4, "group": 8, "tokens": 32, "completion": 16},
    "generate": {"rows": 32, "group": 1, "tokens": 32, "completion": 16},
    "lens": {"rows": 256, "tokens": 16},
    "load": {}, "start": {},
}
START = ["train.py", "configs/dual_reward.yaml"]    # what `make run` runs
SHAPES = {  # D, blocks, heads, key-value heads, MLP, vocabulary
    "40m": (512, 8, 8, 4, 1408, 32000), "tiny": (128, 8, 4, 4, 256, 1394),
    "1b": (2048, 16, 32, 8, 8192, 128256)}
PEFT, AS_INSTALLED, OWN_BUNDLED = ("transformers + peft", "mlx-lm as installed",
                                   "ours on mlx's bundled BLAS")
GOALS = {   # (shape, work): {peer: least ratio, limit_share: least, the others: at most}
    ("40m", "sft"): {PEFT: 1.5, "mlx-lm": 2.8, AS_INSTALLED: 60, "limit_share": .6,
                     "peak_gib": .45},
    ("40m", "grpo"): {"TRL": 5, "peak_gib": .6},
    ("40m", "generate"): {"transformers": 1.2, "mlx-lm": 2},
    ("40m", "lens"): {"transformers": 1.1, "TransformerLens": 1.6},
    ("1b", "sft"): {PEFT: 1.5, "mlx-lm": 1.7, "limit_share": .75, f"memory of {PEFT}": .7},
    ("bundled", "start"): {"seconds": 2},
}


# --------------------------------------------------------------------------------------------------
# the limit: what a work cannot do without


def block_weights(args: ModelArgs) -> int:
    """Numbers in one block's seven matrices: each costs a token a multiplication and an addition.

    example  D 4, one head of 4, F 8: q, k, v, o 16 each, gate, up, down 32 each -> 160
    """
    return sum(a * b for a, b in memory.matrix_shapes(args).values())


def seen_pairs(rows: int, T: int, past: int = 0) -> int:
    """(query, key) pairs of causal attention: query t of T sees itself, what precedes it, the past.

    example  1 row, 3 tokens -> 1 + 2 + 3 = 6; behind 10 others: 11 + 12 + 13 = 36
    """
    return rows * (T * past + T * (T + 1) // 2)


@dataclass
class Pass:
    """Tokens through the blocks. The last block is needed at the positions that are read alone.

    There only keys and values are made of all tokens; queries, and all behind them, of `read`.
    """
    tokens: int
    pairs: int          # (query, key) pairs of a block
    read: int
    read_pairs: int     # the same of the last block

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(*(getattr(self, k) + getattr(other, k) for k in Pass.__dataclass_fields__))


def one_pass(rows: int, T: int, read: int, past: int = 0) -> Pass:
    """Rows of T tokens behind `past` cached ones, the last `read` of each row read.

    example  1 row of 3 tokens, 1 read -> 3 tokens, 6 pairs, 1 read, 3 pairs
    """
    return Pass(rows * T, seen_pairs(rows, T, past), rows * read,
                seen_pairs(rows, read, past + T - read))


def product_flops(args: ModelArgs, p: Pass, cost=lambda inside, outside: inside * outside,
                  targets: str = "q k v o gate up down") -> int:
    """2 * cost of some of the matrices, for all tokens that pass them, in all blocks."""
    shapes = memory.matrix_shapes(args)
    of = lambda name: (args.num_hidden_layers - 1) * p.tokens + (
        p.tokens if name in ("k", "v") else p.read)
    return sum(2 * cost(*shapes[name]) * of(name) for name in targets.split())


def attention_flops(args: ModelArgs, p: Pass) -> int:
    """Per pair and head 2 d for its score and 2 d for its share of the value."""
    pairs = (args.num_hidden_layers - 1) * p.pairs + p.read_pairs
    return 4 * pairs * args.num_attention_heads * args.head_dim


def forward_flops(args: ModelArgs, p: Pass) -> int:
    return product_flops(args, p) + attention_flops(args, p)


def head_flops(args: ModelArgs, positions: int) -> int:
    """The unembedding at some positions."""
    return 2 * positions * args.hidden_size * args.vocab_size


def training_flops(args: ModelArgs, p: Pass, positions: int) -> int:
    """A LoRA step on q, k, v, o, forward and backward; logits at `positions` only.

    Forward: the blocks with their adapters x A B, the unembedding. Backward: weights are frozen, so
    each product has one gradient, its input's, of the same cost; attention has four products where
    the forward pass has two; an adapter has its input's gradient and its own two, twice the forward
    cost. Block 0 passes nothing to what is below it: its q, k, v (and their adapters' A) spare
    their input's gradient. Not counted: norms, softmax, SwiGLU, clipping, the optimizer.
    """
    adapters = product_flops(args, p, lambda inside, outside: RANK * (inside + outside), "q k v o")
    forward = forward_flops(args, p) + adapters
    backward = product_flops(args, p) + 2 * attention_flops(args, p) + 2 * adapters
    alone = args.num_hidden_layers == 1     # then block 0 is the last one too
    spared = sum(2 * (p.read if alone and name == "q" else p.tokens) * inside * (outside + RANK)
                 for name, (inside, outside) in memory.matrix_shapes(args).items() if name in "qkv")
    return forward + backward - spared + 2 * head_flops(args, positions)


def decode_flops(args: ModelArgs, sizes: dict) -> int:
    """Every token but the first and last of all completions, once through blocks and unembedding.

    The first comes from the prompt's own pass, the last is not read any more: C - 1 steps.
    """
    R, steps = sizes["rows"] * sizes["group"], sizes["completion"] - 1
    return forward_flops(args, one_pass(R, steps, steps, sizes["tokens"])) + head_flops(
        args, R * steps)


def decode_bytes(args: ModelArgs, sizes: dict, width: int = 4) -> int:
    """What decoding must read: all weights at each step, keys and values of all that is seen."""
    R, steps = sizes["rows"] * sizes["group"], sizes["completion"] - 1
    kv = 2 * args.num_key_value_heads * args.head_dim * args.num_hidden_layers
    return width * (steps * parameters(args) + kv * seen_pairs(R, steps, sizes["tokens"]))


def parameters(args: ModelArgs) -> int:
    """Numbers in all blocks' matrices and in the unembedding."""
    return args.num_hidden_layers * block_weights(args) + args.vocab_size * args.hidden_size


def minimal_flops(work: str, args: ModelArgs, sizes: dict) -> int:
    """Floating-point operations that no way of doing a work can spare; 0 for load and start.

    sft, dual_reward   one step: all but each row's last token, which is only a target, through the
                       blocks; logits at the answers, and at the last prompt token for the class
    generate           each prompt once, logits at its last token; then `decode_flops`
    grpo               rollouts as in generate, adapters fused; the same tokens once more for the
                       reference, adapters off, and in a training step. A prompt passes once for its
                       group, its last token's logits too
    lens               one pass; logits at the last position, at L + 1 taps
    example  sft, 1 row of 3 tokens, 1 answer; D 4, one head, F 8, V 10, 1 block, r 16: 2 tokens, 1
             read, which sees 2. Forward: k, v 2 * 2 * 32, the others 2 * 128, attention 4 * 2 * 4,
             416 in all; adapters 2 * 16 * 8 * (2 + 2 + 1 + 1) = 1536; backward 416 + 32 + 3072 less
             2 * (2 + 2 + 1) * 4 * (4 + 16) = 800; logits 2 * 80 -> 4832
    """
    if work in ("load", "start"):
        return 0
    rows, T = sizes["rows"], sizes["tokens"]
    if work in ("sft", "dual_reward"):
        answers = sizes["answer"]   # the class is read where the first answer token is predicted
        return training_flops(args, one_pass(rows, T - 1, answers),
                              rows * (answers + (work == "dual_reward")))
    prompts = one_pass(rows, T, 1)
    if work == "lens":
        return forward_flops(args, prompts) + head_flops(args, rows * (args.num_hidden_layers + 1))
    sampled = forward_flops(args, prompts) + head_flops(args, rows) + decode_flops(args, sizes)
    if work == "generate":
        return sampled
    R, steps = rows * sizes["group"], sizes["completion"] - 1
    return 2 * sampled + training_flops(args, prompts + one_pass(R, steps, steps, T),
                                        rows + R * steps)


def limit_seconds(work: str, args: ModelArgs, sizes: dict, machine: dict) -> float:
    """The least time that this machine could need. Decoding: operations or bytes, the slower."""
    flops, rate = minimal_flops(work, args, sizes), machine["flops_per_s"]
    if work not in ("generate", "grpo"):
        return flops / rate
    decoding = decode_flops(args, sizes)
    return (flops - decoding) / rate + max(
        decoding / rate, decode_bytes(args, sizes) / machine["bytes_per_s"])


def measure_machine(D: int, F: int) -> dict:
    """flops_per_s of a float32 product (512, D) x (D, F), bytes_per_s of a copy; best of several.

    The copy counts what is read and what is written, and takes all cores.
    """
    x, w = mx.random.normal((512, D)), mx.random.normal((F, D))
    mx.eval(x, w)
    product = min(clock(lambda: mx.eval(x @ w.T), 20))
    size, parts = 2 ** 28, os.cpu_count()
    if blas.CPU_WHEEL:
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        cuts = [slice(i * size // parts, (i + 1) * size // parts) for i in range(parts)]

        def copy():
            threads = [threading.Thread(target=np.copyto, args=(target[c], source[c]))
                       for c in cuts]
            [t.start() for t in threads], [t.join() for t in threads]
    else:
        source = mx.ones((size // 4,))
        mx.eval(source)
        copy = lambda: mx.eval(source + 1)
    return {"flops_per_s": 2 * 512 * D * F / product, "bytes_per_s": 2 * size / min(clock(copy, 5))}


# --------------------------------------------------------------------------------------------------
# our own side, in a process of its own


def write_random_model(folder: Path, shape: tuple[int, ...]) -> Path:
    """A Llama of random weights, words w0, w1, ... as tokens; for timing only. shape: see SHAPES"""
    D, L, H, K, F, V = shape
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V,
           "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H,
           "num_key_value_heads": K, "head_dim": D // H, "intermediate_size": F,
           "tie_word_embeddings": True, "max_position_embeddings": 2048, "rope_theta": 500000.0,
           "rms_norm_eps": 1e-6, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
    model = Llama(parse_args(raw, "bench"))
    mx.random.seed(0)
    init_weights(model)
    save_safetensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())))
    write_word_tokenizer(folder, V)
    write_text(folder / "config.json", json.dumps(raw))
    return folder


class IdRollouts(Rollouts):
    """Rollouts whose prompts are written as ids: nothing is tokenised."""

    def encode(self, problem: Problem) -> list[int]:
        return [int(word) for word in problem.prompt.split()]


def training_call(work: str, folder: str, sizes: dict):
    """A function that takes the next whole step: batch, loss, gradients, clipping, AdamW."""
    rows, T, group = sizes["rows"], sizes["tokens"], sizes.get("group", 1)
    more = {"grpo_group_size": group, "grpo_kl_weight": 0.04, "grpo_guard": False,
            "max_completion_tokens": sizes["completion"]} if work == "grpo" else {}
    cfg = Config(method=work, model=folder, batch_size=rows * group, lr=1e-5, lora_rank=RANK,
                 lora_alpha=2.0 * RANK, lora_targets=("q", "k", "v", "o"), **more)
    model, tokenizer = prepare_model(cfg)
    prompts = random_prompts(folder, max(256, rows), T)
    if work == "grpo":
        tokenizer.stop_ids = set()      # every completion has the same length on every side
        source = IdRollouts(model, tokenizer, [
            Problem(" ".join(map(str, ids)), "0", "", "") for ids in prompts], cfg)
        rewards = random.Random(0)
        source.reward = lambda problem, completion: rewards.random()
    else:
        source = Batches([Row(ids, T - sizes["answer"], 5) for ids in prompts], cfg)
    optimizer = optim.AdamW(cfg.lr)
    optimizer.init(model.trainable_parameters())
    memory.prepare(cfg, model, memory.load_of(cfg, source))     # the limits of a real run
    compiled = compile_step(model, optimizer, make_loss(cfg, class_block(cfg, model)))
    steps = iter(range(10 ** 9))

    def step():
        i = next(steps)
        updates, about = next_updates(source, i, cfg)
        take_updates(None, i, updates, about["rows"], compiled, optimizer, cfg.lr, cfg)
    return step


def make_call(work: str, folder: str, sizes: dict):
    """A function that does a work once."""
    if work in ("sft", "dual_reward", "grpo"):
        return training_call(work, folder, sizes)
    if work == "load":
        return lambda: mx.eval(load(folder)[0].parameters())
    model, tokenizer = load(folder)
    mx.eval(model.parameters())
    prompts = random_prompts(folder, sizes["rows"], sizes["tokens"])
    if work == "lens":
        targets = [ids[:1] for ids in prompts]
        return lambda: read_prompts(model, prompts, targets, TOP)
    tokenizer.stop_ids = set()
    return lambda: sample(model, tokenizer, prompts, sizes["completion"])


def time_here(work: str, folder: str, sizes: dict, count: int) -> dict:
    """Our side of a work in this process: median seconds, peak GiB, and GiB before the model."""
    before = memory.peak_gib()
    seconds = clock(make_call(work, folder, sizes), count)
    return {"seconds": statistics.median(seconds), "peak_gib": memory.peak_gib(),
            "before_gib": before}


def time_start(command: list[str] = START) -> dict:
    """From the command to the record of the first step: imports, model, data, look inside, step."""
    with tempfile.TemporaryDirectory() as folder:
        path, found, start = Path(folder, "run", "metrics.jsonl"), None, time.perf_counter()
        process = subprocess.Popen([sys.executable, *command, f"run_dir={folder}/run"], cwd=HERE,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not found and process.poll() is None:
            time.sleep(0.005)
            lines = path.read_text().splitlines() if path.exists() else []
            found = next((line for line in lines if '"grad_norm"' in line and line[-1] == "}"), "")
        seconds = time.perf_counter() - start
        process.terminate()     # a clean save, then the folder goes
        why = (process.communicate()[1].strip().splitlines() or ["no message"])[-1]
    if not found:
        raise BadInput(f"{' '.join(command)} ended before its first step: {why}")
    return {"seconds": seconds, "peak_gib": json.loads(found)["peak_gib"]}


# --------------------------------------------------------------------------------------------------
# peers


@dataclass
class Peer:
    """Another way to do a work: the packages it needs, its command behind the Python."""
    packages: tuple[str, ...]
    command: list
    env: dict = field(default_factory=lambda: {"NANOLENS_BLAS": blas.LOADED or "none"})
    once: bool = False      # too slow for more than one call in one round


def peers_of(work: str, folder: str, args: ModelArgs, sizes: dict, count: int) -> dict[str, Peer]:
    """The peers of a work by name; those on MLX's bundled BLAS only where a step ends in time."""
    hf, lm, torch_lens = ("torch", "transformers"), ("mlx_lm",), ("torch", "transformer_lens")
    n, bundled = list(sizes.values()), {"NANOLENS_BLAS": "none"}
    if work == "load":
        return {name: Peer(needs, ["peers/load.py", name, folder, count])
                for name, needs in (("transformers", hf), ("mlx-lm", lm))}
    if work == "generate":
        n = [sizes[key] for key in ("rows", "tokens", "completion")]
        return {name: Peer(needs, ["peers/generate.py", name, folder, *n, count])
                for name, needs in (("transformers", hf), ("mlx-lm", lm))}
    if work == "lens":
        lens = lambda which, needs, *more: Peer(needs, [
            "peers/lens.py", which, folder, *n, LENS_PEER_BATCH, count, *more])
        return {"transformers": lens("transformers", hf),
                "transformers, all our numbers": lens("transformers", hf, "all"),
                "TransformerLens": lens("transformer_lens", torch_lens),
                "TransformerLens, all our numbers": lens("transformer_lens", torch_lens, "all")}
    if work == "grpo":
        return {"TRL": Peer((*hf, "peft", "trl", "datasets"), [
            "peers/trl_grpo.py", folder, *n, min(count, 3)])}
    if work == "dual_reward":
        block = class_block(Config(), Llama(args))
        return {PEFT: Peer((*hf, "peft"), ["peers/sft.py", folder, *n, count, block])}
    if work != "sft":
        return {}
    found = {PEFT: Peer((*hf, "peft"), ["peers/sft.py", folder, *n, count]),
             "mlx-lm": Peer(lm, ["peers/mlxlm_sft.py", folder, *n, count])}
    if blas.LOADED and parameters(args) < 2e8:
        found[AS_INSTALLED] = Peer(lm, ["peers/mlxlm_sft.py", folder, *n, 1], bundled, once=True)
        found[OWN_BUNDLED] = Peer((), own_command(work, folder, sizes, 1), bundled, once=True)
    return found


def own_command(work: str, folder: str, sizes: dict, count: int) -> list:
    return ["bench.py", "--here", folder, "--only", work, "--sizes", json.dumps(sizes),
            "--count", count]


def packages_in(python: str) -> dict[str, str]:
    """{module: version} of the peers' packages that a Python has."""
    code = ("import importlib.metadata as m, importlib.util as u, json; names = {'torch': 'torch', "
            "'transformers': 'transformers', 'peft': 'peft', 'trl': 'trl', 'datasets': 'datasets', "
            "'transformer_lens': 'transformer-lens', 'mlx_lm': 'mlx-lm'}; print(json.dumps("
            "{k: m.version(v) for k, v in names.items() if u.find_spec(k)}))")
    try:
        return json.loads(run_other([python, "-c", code]).splitlines()[-1])
    except (OSError, ValueError) as error:
        raise BadInput(f"--peer-python {python} does not run ({error}); expected a Python, such as "
                       ".venv-bench/bin/python, or none") from None


def find_pythons(named: str | None) -> dict[str, dict[str, str]]:
    """{Python: its packages}: the one named or .venv-bench's, then this one; "none": no peers."""
    if named == "none":
        return {}
    prepared = str(HERE / ".venv-bench/bin/python")
    first = named or (prepared if Path(prepared).exists() else sys.executable)
    return {python: packages_in(python) for python in dict.fromkeys([first, sys.executable])}


def run_other(command: list, **env) -> str:
    """Run a command in this folder; returns its standard output. Raises BadInput if it fails."""
    # without the order of operations that blas.py has set for this process: peers have their own
    own = {k: v for k, v in os.environ.items() if k != "MLX_BFS_MAX_WIDTH"}
    done = subprocess.run([*map(str, command)], cwd=HERE, env=own | env, capture_output=True,
                          text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"{' '.join(map(str, command[1:3]))} failed: {why}")
    return done.stdout


# --------------------------------------------------------------------------------------------------
# in turn


def measure(work: str, folder: str, sizes: dict, pythons: dict, rounds: int) -> dict:
    """One work beside its peers: {work, seconds, tokens_per_s, peak_gib, limit_share, peers}."""
    args = parse_args(read_json(Path(folder) / "config.json"), folder)
    count = 20 if parameters(args) < 1e7 else 7 if parameters(args) < 2e8 else 2
    last_line = lambda *words, **env: json.loads(run_other(words, **env).splitlines()[-1])
    # full float32 on a GPU too, as torch does by itself
    ours = time_start if work == "start" else lambda: last_line(
        sys.executable, *own_command(work, folder, sizes, count), MLX_ENABLE_TF32="0")
    machine = lambda: last_line(sys.executable, "bench.py", "--here", folder, "--only", "machine",
                                MLX_ENABLE_TF32="0")
    peers, pythons_of = {}, {}
    for name, peer in peers_of(work, folder, args, sizes, count).items() if pythons else ():
        pythons_of[name] = sys.executable if not peer.packages else next(
            (p for p, found in pythons.items() if found.keys() >= set(peer.packages)), None)
        if pythons_of[name]:
            peers[name] = peer
        else:
            print(f"{name}: not installed, skipped", flush=True)
    taken = {"": [], "machine": [], **{name: [] for name in peers}}
    start, others = time.perf_counter(), busy_elsewhere()
    for turn in range(rounds):      # in turn, so that a slow minute of the machine hits all
        taken[""].append(ours())
        if minimal_flops(work, args, sizes):
            taken["machine"].append(machine())
        for name, peer in list(peers.items()):
            try:
                if not (peer.once and turn):
                    taken[name].append(last_line(pythons_of[name], *peer.command, **peer.env))
            except BadInput as error:   # a peer's own trouble does not end the run
                print(f"{name}: {error}; skipped", flush=True)
                del peers[name], taken[name]
    others = (busy_elsewhere() - others) / (time.perf_counter() - start)
    if others > 0.1:
        print(f"note: other processes took {others:.1f} of {os.cpu_count()} cores while {work} was "
              "timed; repeat on a quiet machine before quoting", flush=True)
    return {**summarise(work, args, sizes, taken), "other_cores": others}


def busy_elsewhere() -> float:
    """CPU seconds that all but this process and its ended children have taken; Linux, else 0."""
    if sys.platform != "linux":
        return 0.0
    user, nice, system, _, _, *more = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    # what the host takes away counts as well
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def summarise(work: str, args: ModelArgs, sizes: dict, taken: dict[str, list[dict]]) -> dict:
    """Medians over rounds; ratios and shares are taken within a round, then their median.

    taken  {"": our rounds, "machine": the machine's, peer: ...}, each [{seconds, peak_gib}, ...]
    """
    ours, machine = taken[""], taken["machine"]
    middle = lambda runs, key: statistics.median(r[key] for r in runs)
    ends = lambda values: [min(values), max(values)]
    tokens = sizes.get("rows", 0) * sizes.get("group", 1) * (
        sizes.get("completion") or sizes.get("tokens", 0))
    shares = [limit_seconds(work, args, sizes, m) / r["seconds"] for r, m in zip(ours, machine)]
    result = {"work": work, "seconds": middle(ours, "seconds"),
              "spread": ends([r["seconds"] for r in ours]), "rounds": len(ours),
              "tokens_per_s": tokens / middle(ours, "seconds") if tokens else None,
              "peak_gib": middle(ours, "peak_gib"),
              "limit_share": statistics.median(shares) if shares else None,
              "minimal_flops": minimal_flops(work, args, sizes), "sizes": sizes, "peers": {}}
    if machine:
        result["machine"] = {key: middle(machine, key) for key in machine[0]}
    for name, runs in taken.items():
        if name in ("", "machine") or not runs:
            continue
        ratios = [p["seconds"] / r["seconds"] for p, r in zip(runs, ours)]
        result["peers"][name] = {
            "seconds": middle(runs, "seconds"), "spread": ends([p["seconds"] for p in runs]),
            "peak_gib": middle(runs, "peak_gib"), "ratio": statistics.median(ratios),
            "ratio_spread": ends(ratios), "rounds": len(runs)}
    return result


# --------------------------------------------------------------------------------------------------
# for a person


def goals_of(result: dict) -> dict[str, tuple[float, bool]]:
    """{name: (goal, reached)} of what was measured."""
    goals = {}
    for name, goal in GOALS.get((result["shape"], result["work"]), {}).items():
        other = result["peers"].get(name.removeprefix("memory of "))
        if name.startswith("memory of "):
            if other:
                goals[name] = goal, result["peak_gib"] <= goal * other["peak_gib"]
        elif name in result:
            if result[name] is not None:
                least = name == "limit_share"
                goals[name] = goal, result[name] >= goal if least else result[name] <= goal
        elif other:
            goals[name] = goal, other["ratio"] >= goal
    return goals


def table(results: list[dict]) -> str:
    """Lines of one width: ours first, then each peer with how many times as fast ours is."""
    lines = [f"{'':34}{'ms':>9}  {'low - high':>19}{'tokens/s':>10}{'GiB':>7}{'of limit':>10}"
             f"{'ours is':>9}"]
    for result in results:
        goals, peers = goals_of(result), result["peers"]
        marks = {name: f"  {goal:g}: {'reached' if reached else 'MISSED'}"
                 for name, (goal, reached) in goals.items()}
        speed, share = result["tokens_per_s"], result["limit_share"]
        own = ";".join(f"  {name}{marks[name]}" for name in goals if name not in peers)
        lines.append(f"{result['work'] + ', ' + result['shape']:34}{times(result)}"
                     f"{f'{speed:,.0f}' if speed else '':>10}{result['peak_gib']:7.2f}"
                     f"{f'{100 * share:.0f} %' if share else '':>10}{own and ' ' * 9 + own}")
        lines += [f"{'  ' + name:34}{times(peer)}{'':10}{peer['peak_gib']:7.2f}{'':10}"
                  f"{peer['ratio']:8.2f}x{marks.get(name, '')}" for name, peer in peers.items()]
    return "\n".join(lines)


def times(side: dict) -> str:
    low, high = (f"{1000 * s:,.1f}" for s in side["spread"])
    return f"{1000 * side['seconds']:9,.1f}  {low + ' - ' + high:>19}"


def draw(results: list[dict], path: str) -> None:
    """A bar for each work and peer: how many times as fast ours is; a black line is the goal."""
    bars = [(f"{r['work']}: {name}", peer, goals_of(r).get(name), r["work"]) for r in results
            for name, peer in r["peers"].items()]
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * len(bars)), layout="constrained")
    works = list(dict.fromkeys(work for *_, work in bars))
    for y, (label, peer, goal, work) in enumerate(reversed(bars)):
        axes.barh(y, peer["ratio"], color=f"C{works.index(work)}", height=0.7)
        axes.plot(peer["ratio_spread"], [y, y], color="0.3", lw=1)
        axes.text(max(peer["ratio_spread"]) * 1.05, y, f"{peer['ratio']:.2g}", va="center",
                  fontsize=8)
        if goal:
            axes.plot([goal[0]] * 2, [y - 0.42, y + 0.42], color="black", lw=2.5)
    reach = [x for _, peer, goal, _ in bars for x in (*peer["ratio_spread"], *(goal or ())[:1])]
    low, high = 0.8 * min(1, *reach), 1.6 * max(reach)
    ticks = [n * 10.0 ** e for e in range(-2, 4) for n in (1, 2, 5)]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)
    axes.axvline(1, color="0.5", lw=1, ls="--")
    axes.set_yticks(range(len(bars)), [label for label, *_ in reversed(bars)], fontsize=8)
    axes.set(xlabel="peer's time over ours (log scale); black: goal; thin line: lowest to highest "
             "round", title=f"times as fast, {results[0]['device']}")
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------


def find_model(shape: str, scratch: Path) -> Path:
    """The folder of a shape's random weights; the large one stays in runs/fullsize."""
    if shape == "1b":
        return write_model("Llama-3.2-1B", HERE / "runs" / "fullsize").resolve()
    return write_random_model(scratch, SHAPES[shape])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speed and memory, ours and peers'.")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("--png", metavar="FILE", help="draw the ratios")
    parser.add_argument("--only", metavar="WORK", action="append",
                        help=f"of {', '.join(SIZES)}; may be given repeatedly")
    parser.add_argument("--shape", choices=SHAPES, default="40m", help="of the random weights")
    parser.add_argument("--model", help="a folder in the Hub's layout instead")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peer-python", help="a Python that has the peers' packages (default: "
                        ".venv-bench's where it exists, then this one); none: ours alone")
    for word in ("--here", "--sizes", "--count"):   # one side of one work, for this script itself
        parser.add_argument(word, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    allowed = [*SIZES, "machine"] if args.here else list(SIZES)
    if wrong := [work for work in args.only or () if work not in allowed]:
        raise BadInput(f"unknown work {', '.join(wrong)}; expected {', '.join(SIZES)}")
    if args.rounds < 1:
        raise BadInput(f"--rounds {args.rounds}: expected at least 1")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.here and args.only == ["machine"]:
        shape = parse_args(read_json(Path(args.here) / "config.json"), args.here)
        print(json.dumps(measure_machine(shape.hidden_size, shape.intermediate_size)))
        return
    if args.here:
        print(json.dumps(time_here(args.only[0], args.here, json.loads(args.sizes),
                                   int(args.count))))
        return
    pythons = find_pythons(args.peer_python)
    versions = {**provenance(), **{k: v for found in reversed(pythons.values())
                                   for k, v in found.items()}}
    device = f"{versions['device']}, {os.cpu_count()} cores"
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = find_folder(args.model) if args.model else find_model(args.shape, Path(scratch))
        for work in dict.fromkeys(args.only or SIZES):
            shape = "bundled" if work == "start" else args.model or args.shape
            results.append({**measure(work, str(folder.resolve()), SIZES[work], pythons,
                                      args.rounds),
                            "shape": shape, "device": device, "versions": versions})
            print(table(results[-1:]), flush=True)
    if len(results) > 1:
        print(f"\n{table(results)}")
    if args.json:
        write_text(Path(args.json), json.dumps(results, indent=1) + "\n")
    if args.png:
        draw(results, args.png)


if __name__ == "__main__":
    run_main(main)
