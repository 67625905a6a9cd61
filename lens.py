"""The logit lens: read every tap of the residual stream as if it were the last.

At each tap the model's own final norm and unembedding are applied, softmax(U . N(h)) in float32,
with the statistics of that tap. The lens calls `model.head`, the very function that makes the
model's logits, on the very stream that training and generation run, so at the last tap it *is* the
model. (The prior code looped over blocks without the causal mask.) A lens probability is not a
belief: it depends on the residual's length too. So rank and entropy stand beside it.
Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.

Memory: taps are read one after another as the forward pass makes them, at the asked positions only;
what is kept of a (rows, V) array of logits is a few numbers per row. Never (taps, B, T, V).

    python lens.py --ckpt runs/dual_reward --prompt "7 * 8 = " [--words multiply 56]
                   [--png FILE] [--html FILE] [--json FILE]
"""
import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

import plot
from config import BadInput, run_main, write_text
from fastexp import exp, logsumexp
from generate import check_context
from lora import load_checkpoint
from losses import gather_positions
from model import Llama
from tokenizer import Tokenizer

ROWS_PER_BATCH = 256


@dataclass
class Reading:
    """What the lens saw: numpy, axes (L+1 taps, B, A positions), N targets, k top tokens; nats."""
    probs: np.ndarray       # (L+1, B, A, N) probability of each target
    ranks: np.ndarray       # (L+1, B, A, N) 1 + number of tokens with a strictly larger logit
    ties: np.ndarray        # (L+1, B, A, N) other tokens with the same logit; 0: the rank is sure
    entropy: np.ndarray     # (L+1, B, A)
    top_ids: np.ndarray     # (L+1, B, A, k) most probable first
    top_probs: np.ndarray   # (L+1, B, A, k)

    def first(self, n: int) -> "Reading":
        """The reading of the first n rows alone."""
        return Reading(*(getattr(self, name)[:, :n] for name in Reading.__dataclass_fields__))


def read_logits(logits: mx.array, targets: mx.array, k: int) -> tuple[mx.array, ...]:
    """Reduce float32 logits (B, A, V) to one tap's arrays of a Reading; targets (B, A, N) int32."""
    logprobs = logits - logsumexp(logits)[..., None]                                # (B, A, V)
    entropy = -(exp(logprobs) * logprobs).sum(-1)
    chosen = mx.take_along_axis(logits, targets, axis=-1)                           # (B, A, N)
    # no sort: two reductions a target; float32, since bfloat16 logits tie by the hundred
    count = lambda compare: mx.stack([compare(logits, chosen[..., n:n + 1]).sum(-1)
                                      for n in range(targets.shape[-1])], -1)
    ranks, ties = count(mx.greater) + 1, count(mx.equal) - 1
    probs = mx.exp(mx.take_along_axis(logprobs, targets, axis=-1))
    top = mx.argpartition(-logits, kth=k - 1, axis=-1)[..., :k]     # mx.topk gives values only
    values = mx.take_along_axis(logprobs, top, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return (probs, ranks, ties, entropy, mx.take_along_axis(top, order, -1),
            mx.exp(mx.take_along_axis(values, order, -1)))


def read_taps(model: Llama, tokens: mx.array, positions: mx.array, targets: mx.array,
              k: int = 1) -> Reading:
    """Read all taps at some positions.

    tokens     (B, T) int32, right-padded if rows differ (beyond every position asked for)
    positions  (B, A) int32: position p predicts token p+1
    targets    (B, A, N) int32 token ids to follow, N at least 1
    source     logit lens; at tap L the probabilities are the model's own (tested)
    """
    taps = []
    for resid in model.stream(tokens):
        reading = read_logits(model.head(gather_positions(resid, positions)), targets, k)
        # here, or the lazy graph would hold the logits of all taps until the end
        mx.eval(reading, resid)
        taps.append([np.array(a) for a in reading])
    return Reading(*(np.stack(arrays) for arrays in zip(*taps)))


def read_prompts(model: Llama, prompts: list[list[int]], targets: list[list[int]],
                 k: int = 1) -> Reading:
    """Read all taps at the last token of each prompt: A = 1. prompts: ids; targets: N ids each."""
    parts = []
    for i in range(0, len(prompts), ROWS_PER_BATCH):
        part = prompts[i:i + ROWS_PER_BATCH]
        T = max(map(len, part))
        tokens = mx.array([ids + [0] * (T - len(ids)) for ids in part])
        positions = mx.array([[len(ids) - 1] for ids in part])
        parts.append(read_taps(
            model, tokens, positions, mx.array(targets[i:i + ROWS_PER_BATCH])[:, None], k))
    return Reading(*(np.concatenate([getattr(p, name) for p in parts], axis=1)
                     for name in Reading.__dataclass_fields__))


def view_prompt(model: Llama, tokenizer: Tokenizer, prompt: str, words: list[str],
                k: int = 10) -> dict:
    """All taps by all positions of one prompt: plain numbers that `plot` draws, `--json` writes.

    returns  {prompt, tokens [T], taps [L+1 names], top [L+1][T][k] of [token, probability],
              entropy [L+1][T], words {word: {id, prob [L+1], rank [L+1]}} at the last position}
    """
    ids = tokenizer.encode_prompt(prompt)
    check_context([ids], 0, model)
    chosen = [tokenizer.single_id(word) for word in words]
    T = len(ids)
    targets = mx.broadcast_to(mx.array(chosen or [0]), (1, T, max(len(chosen), 1)))
    reading = read_taps(model, mx.array([ids]), mx.arange(T)[None], targets,
                        min(k, model.args.vocab_size))
    cell = lambda tap, t: [[tokenizer.piece(i), round(float(p), 6)] for i, p in
                           zip(reading.top_ids[tap, 0, t], reading.top_probs[tap, 0, t])]
    taps = range(len(reading.entropy))
    return {
        "prompt": prompt, "tokens": [tokenizer.piece(i) for i in ids],
        "taps": ["embed"] + [f"L{l}" for l in range(len(taps) - 1)],
        "top": [[cell(tap, t) for t in range(T)] for tap in taps],
        "entropy": reading.entropy[:, 0].round(4).tolist(),
        "words": {word: {"id": chosen[n], "prob": reading.probs[:, 0, -1, n].round(6).tolist(),
                         "rank": reading.ranks[:, 0, -1, n].tolist()}
                  for n, word in enumerate(words)},
    }


def terminal_table(view: dict, color: bool, width: int = 12) -> str:
    """Blocks by positions, last on top: each cell's top token and per cent, darker when surer."""
    def cell(token: str, prob: float) -> str:
        text = f"{token[:width - 5]:<{width - 5}}{100 * prob:4.0f} "
        shade = 255 - int(23 * prob ** 0.5)  # 256-colour greys run from 232 (black) to 255 (white)
        return (f"\033[48;5;{shade}m\033[38;5;{16 if shade > 243 else 231}m{text}\033[0m"
                if color else text)
    lines = [" " * 7 + "".join(f"{token[:width - 1]:<{width}}" for token in view["tokens"])]
    for tap in reversed(range(len(view["taps"]))):
        lines.append(f"{view['taps'][tap]:<7}"
                     + "".join(cell(*cells[0]) for cells in view["top"][tap]))
    for word, series in view["words"].items():
        steps = "  ".join(f"{name} {p:.2f} (#{r})" for name, p, r in
                          zip(view["taps"], series["prob"], series["rank"]))
        lines.append(f"{word!r} at the last position, probability (rank): {steps}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Show what every block would answer, by the logit lens.")
    parser.add_argument("--ckpt", required=True, help="run folder, model folder or Hub name")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--words", nargs="*", default=[],
                        help="words to follow at the last position, one token each")
    parser.add_argument("--png", metavar="FILE")
    parser.add_argument("--html", metavar="FILE",
                        help="one self-contained page; a cell shows its ten top tokens on hover")
    parser.add_argument("--json", metavar="FILE", help="the numbers behind the pictures")
    args = parser.parse_args(argv)
    if not args.prompt:
        raise BadInput("--prompt is empty; give a text such as '7 * 8 = '")
    model, tokenizer, _ = load_checkpoint(args.ckpt)
    view = view_prompt(model, tokenizer, args.prompt, args.words)
    print(f"{args.ckpt}   {args.prompt!r}   logit lens: final norm and unembedding at every tap; "
          "cell: top token, per cent")
    print(terminal_table(view, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if args.json:
        write_text(Path(args.json), json.dumps(view) + "\n")
    if args.png:
        plot.lens_heatmap(view, args.png)
    if args.html:
        write_text(Path(args.html), plot.lens_page(view))


if __name__ == "__main__":
    run_main(main)
