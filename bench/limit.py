"""The limit of a work: operations that no way of doing it can spare, over this machine's own rate.

Counted by hand from the model's shape (`minimal_flops`), and checked in the tests against a loop
that does and counts every product. The machine's rates are measured: a product of many rows, one of
as many as are decoded together, and reading for what decoding must read.
"""
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import engine.blas
import mlx.core as mx
import numpy as np

from bench.peers.clock import clock
from engine.memory import matrix_shapes
from files.model_folder import ModelArgs

RANK = 16   # of the adapters, ours and the peers'
DECODING = ("generate", "chat", "grpo")


def block_weights(args: ModelArgs) -> int:
    """Numbers in one block's seven matrices: each costs a token a multiplication and an addition.

    example  D 4, one head of 4, F 8: q, k, v, o 16 each, gate, up, down 32 each -> 160
    """
    return sum(a * b for a, b in matrix_shapes(args).values())


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


def one_pass(rows: int, T: int, read: int, past: int = 0) -> Pass:
    """Rows of T tokens behind `past` cached ones, the last `read` of each row read.

    example  1 row of 3 tokens, 1 read -> 3 tokens, 6 pairs, 1 read, 3 pairs
    """
    return Pass(rows * T, seen_pairs(rows, T, past), rows * read,
                seen_pairs(rows, read, past + T - read))


def product_flops(args: ModelArgs, p: Pass, cost=lambda inside, outside: inside * outside,
                  targets: str = "q k v o gate up down") -> int:
    """2 * cost of some of the matrices, for all tokens that pass them, in all blocks."""
    shapes = matrix_shapes(args)
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
                 for name, (inside, outside) in matrix_shapes(args).items() if name in "qkv")
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
    """Floating-point operations that no way of doing a work can spare; 0 for load.

    sft, dual_reward   one step: all but each row's last token, which is only a target, through the
                       blocks; logits at the answers, and at the last prompt token for the class
    generate, chat     each prompt once, logits at its last token; then `decode_flops`
    grpo               rollouts as in generate, adapters fused; the same tokens once more for the
                       reference, adapters off, and in a training step. A prompt passes once for its
                       group, its last token's logits too
    lens               one pass; logits at the last position, at L + 1 taps
    example  sft, 1 row of 3 tokens, 1 answer; D 4, one head, F 8, V 10, 1 block, r 16: 2 tokens, 1
             read, which sees 2. Forward: k, v 2 * 2 * 32, the others 2 * 128, attention 4 * 2 * 4,
             416 in all; adapters 2 * 16 * 8 * (2 + 2 + 1 + 1) = 1536; backward 416 + 32 + 3072 less
             2 * (2 + 2 + 1) * 4 * (4 + 16) = 800; logits 2 * 80 -> 4832
    """
    if work == "load":
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
    if work in ("generate", "chat"):
        return sampled
    R, steps = rows * sizes["group"], sizes["completion"] - 1
    return (2 * sampled + training_flops(args, prompts, rows)
            + training_flops(args, one_pass(R, steps, steps, T), R * steps))


def limit_seconds(work: str, args: ModelArgs, sizes: dict, machine: dict,
                  decode_rate: str = "flops_per_s") -> float:
    """The least time that this machine could need. Decoding: operations or bytes, the slower."""
    flops, rate = minimal_flops(work, args, sizes), machine["flops_per_s"]
    if work not in DECODING:
        return flops / rate
    decoding = decode_flops(args, sizes)
    return (flops - decoding) / rate + max(
        decoding / machine[decode_rate], decode_bytes(args, sizes) / machine["bytes_per_s"])


def measure_machine(D: int, F: int, rows: int = 0) -> dict:
    """What it gives, the best of several: flops_per_s of a float32 product (512, D) x (D, F).

    few_rows_flops_per_s   of (rows, D) x (D, F), each time other weights, from memory
    bytes_per_s            read, by all cores
    """
    size, parts = 2 ** 28, os.cpu_count()
    x, w = mx.random.normal((512, D)), mx.random.normal((F, D))
    mx.eval(x, w)
    found = {"flops_per_s": 2 * 512 * D * F / min(clock(lambda: mx.eval(x @ w.T), 20))}
    if rows:
        others = [w + i for i in range(-(-size // w.nbytes))]
        mx.eval(others)
        products = lambda: mx.eval([x[:rows] @ other.T for other in others])
        found["few_rows_flops_per_s"] = 2 * rows * D * F * len(others) / min(clock(products, 5))
    if engine.blas.CPU_WHEEL:
        pieces, pool = np.array_split(np.ones(size // 4, np.float32), parts), ThreadPoolExecutor()
        read = lambda: list(pool.map(np.max, pieces))
    else:
        source = mx.ones((size // 4,))
        mx.eval(source)
        read = lambda: mx.eval(source.max())
    return found | {"bytes_per_s": size / min(clock(read, 5))}
