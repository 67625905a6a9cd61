"""The logit lens: what the residual stream already says after each block.

*Logit lens* (nostalgebraist 2020): at each tap the model's own final norm and unembedding U are
applied, softmax(U . norm(h)) in float32, with the statistics of that tap. It calls `model.head`,
the very function that makes the model's logits, on the very stream that training and generation
run, so at the last tap it *is* the model (what went wrong elsewhere: study/prior_work.md).
A lens probability is not a belief: norm and unembedding were trained to read the last tap alone. So
rank, entropy and the distance to the final distribution stand beside it.

Memory: of a (rows, V) array of logits a few numbers per row are kept. Never (taps, B, T, V).

    python lens.py --ckpt runs/dual_reward --prompt "7 * 8 = " [--words multiply 56]
                   [--png FILE] [--html FILE] [--json FILE]

Its relatives stand in study/: the Jacobian lens, direct logit attribution, probes, edits.
Shapes: A positions of a row, N targets at each, R = B * A rows to read, k top tokens.
"""
from dataclasses import dataclass
from functools import partial

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from checkpoint import load_checkpoint
from config import run_main
from engine.decode import KVCache, pad_prompts, read_shared
from engine.memory import LENS_ROWS, LOGITS_PER_CALL, reduce_taps_in_turn
from engine.ops import blocked_reduction, exp, logsumexp, top_tokens
from engine.parallel import map_rows
from model import Llama, gather_positions
from report.stats import make_view
from text.rows import check_context, choose_template, followed_ids
from text.tokenizer import Tokenizer


@dataclass
class Reading:
    """What the lens saw: numpy, axes (L+1 taps, B, A positions), N targets, k top tokens; nats."""
    probs: np.ndarray       # (L+1, B, A, N) probability of each target
    ranks: np.ndarray       # (L+1, B, A, N) 1 + number of tokens with a strictly larger logit
    ties: np.ndarray        # (L+1, B, A, N) other tokens with the same logit; 0: the rank is sure
    logprobs: np.ndarray    # (L+1, B, A, N) log of probs; finite where probs underflow to 0
    entropy: np.ndarray     # (L+1, B, A)
    kl: np.ndarray          # (L+1, B, A) KL(last tap || this tap); at L 0 up to rounding
    final_probs: np.ndarray  # (L+1, B, A) probability of the token the model ends up with
    top_ids: np.ndarray     # (L+1, B, A, k) most probable first
    top_probs: np.ndarray   # (L+1, B, A, k)


def final_distribution(logits: mx.array) -> tuple[mx.array, ...]:
    """What the last tap (R, V) says: probabilities (R, V), entropy, top token (R, 1)."""
    logprobs = logits - logsumexp(logits)[..., None]
    probs = exp(logprobs)
    return probs, -blocked_reduction(mx.sum, probs * logprobs), top_tokens(logits, 1)


def tap_statistics(logits: mx.array, targets: mx.array, last_probs: mx.array,
                   last_entropy: mx.array, last_top: mx.array, k: int) -> tuple[mx.array, ...]:
    """Reduce float32 logits (R, V) of one tap to R rows of a Reading's fields, in their order.

    targets (R, N) int32;  last_*: final_distribution's (R, V), (R,), (R, 1), what KL compares with
    """
    ranks, ties = [], []
    for n in range(targets.shape[1]):
        # no sort: two reductions a target, made before the shift below, which rounds small
        # differences away. The logits of a bfloat16 model tie by the hundred
        chosen = mx.take_along_axis(logits, targets[:, n:n + 1], axis=-1)           # (R, 1)
        ranks.append((logits > chosen).sum(-1) + 1)
        ties.append((logits == chosen).sum(-1) - 1)
    top = top_tokens(logits, k)                                                     # (R, k)
    logits = logits - blocked_reduction(mx.max, logits)[:, None]                    # (R, V)
    weights = exp(logits)           # once: on a CPU it costs more than all else here
    total = blocked_reduction(mx.sum, weights)                                      # (R,)
    log_total = mx.log(total)
    entropy = log_total - blocked_reduction(mx.sum, weights * logits) / total
    # KL(q || p) = sum q (log q - log p), with log p = logits - log_total
    kl = log_total - blocked_reduction(mx.sum, last_probs * logits) - last_entropy

    def logprobs_of(ids):
        return mx.take_along_axis(logits, ids, axis=-1) - log_total[:, None]

    logprobs = logprobs_of(targets)                                                 # (R, N)
    return (mx.exp(logprobs), mx.stack(ranks, -1), mx.stack(ties, -1), logprobs, entropy, kl,
            mx.exp(logprobs_of(last_top))[:, 0], top, mx.exp(logprobs_of(top)))


# --------------------------------------------------------------------------------------------------
# from tokens to a Reading


def gather_taps(model: Llama, tokens: mx.array, positions: mx.array,
                cache: list[KVCache] = ()) -> list[mx.array]:
    """The residual stream at some positions (B, A) of tokens (B, T): L+1 arrays (B, A, D)."""
    # tap L comes at the positions alone: nobody reads the last block's other rows
    *below, last = model.stream(tokens, cache, positions=positions)
    # gathered: slices would keep all positions of their taps in memory
    return [gather_positions(resid, positions) for resid in below] + [last]


def taps_at(model: Llama, tokens: mx.array, positions: mx.array,
            shared: list[KVCache] = ()) -> list[mx.array]:
    """gather_taps of parts side by side; shared: caches of what stands before (read_shared)."""
    def read(part):
        rows = part["tokens"]                                                       # (b, T)
        cache = [c.repeat(len(rows), c.offset + rows.shape[1]) for c in shared]
        return gather_taps(model, rows, part["positions"], cache)

    parts = map_rows(read, {"tokens": tokens, "positions": positions}, model.parts)
    return [mx.concatenate(taps) for taps in zip(*parts)]


def read_resids(model: Llama, resids: list[mx.array], targets: mx.array, k: int = 1) -> Reading:
    """Read L+1 taps (B, A, D), or what a relative of the lens makes of them; targets (B, A, N)."""
    B, A, N = targets.shape
    batch = {"resids": mx.stack(resids, axis=2).reshape(B * A, len(resids), -1),
             "targets": targets.reshape(B * A, N)}

    def read(part):
        # in plain words: [tap_statistics(model.head(resid), targets, *final, k) for resid in taps],
        # the last tap first, since all are compared with it. But logits are large: so it is done in
        # pieces, none of which is held longer than it is read
        return reduce_taps_in_turn(model, part["resids"], part["targets"], final_distribution,
                                   partial(tap_statistics, k=k))                # (R, L+1, ...) each

    parts = map_rows(read, batch, model.parts,
                     rows=max(1, LOGITS_PER_CALL // model.args.vocab_size))
    arrays = []
    for pieces in zip(*parts):
        values = np.concatenate(pieces)                                         # (R, L+1, ...)
        arrays.append(np.moveaxis(values.reshape(B, A, *values.shape[1:]), 2, 0))
    return Reading(*arrays)


def read_taps(model: Llama, tokens: mx.array, positions: mx.array, targets: mx.array,
              k: int = 1) -> Reading:
    """Read all taps at some positions.

    tokens     (B, T) int32, right-padded if rows differ (beyond every position asked for)
    positions  (B, A) int32: position p predicts token p+1
    targets    (B, A, N) int32 token ids to follow, N at least 1
    """
    return read_resids(model, taps_at(model, tokens, positions), targets, k)


def read_prompts(model: Llama, prompts: list[list[int]], targets: list[list[int]],
                 k: int = 1) -> Reading:
    """Read all taps at the last token of each prompt: A = 1. prompts: ids; targets: N ids each."""
    return read_resids(model, last_taps(model, prompts), mx.array(targets)[:, None], k)


def last_taps(model: Llama, prompts: list[list[int]]) -> list[mx.array]:
    """The residual stream at the last token of each prompt: L+1 arrays (B, 1, D)."""
    batches = []
    for i in range(0, len(prompts), LENS_ROWS):
        shared, own = read_shared(model, prompts[i:i + LENS_ROWS])
        batches.append(taps_at(model, *pad_prompts(own), shared))
    return [mx.concatenate(taps) for taps in zip(*batches)]


def view_prompt(model: Llama, tokenizer: Tokenizer, prompt: str, words: list[str],
                template: str = "none") -> dict:
    """All taps at all positions of one prompt, as plain numbers: make_view's."""
    ids, _ = tokenizer.encode_messages([{"role": "user", "content": prompt}], template)
    check_context([ids], 0, model)
    chosen = followed_ids(tokenizer, words, ids)
    # at every position the same words; without any, one token that nobody reads
    targets = mx.broadcast_to(mx.array(chosen or [0]), (1, len(ids), max(len(chosen), 1)))
    reading = read_taps(model, mx.array([ids]), mx.arange(len(ids))[None], targets,
                        k=min(10, model.args.vocab_size))
    return make_view(reading, tokenizer, prompt, ids, words, chosen)


def main(argv: list[str]) -> None:
    from files.options import lens_options  # training, which imports this file, has no such words
    from report.lens_view import show_view
    args = lens_options(argv)
    model, tokenizer, cfg = load_checkpoint(args.ckpt, args.adapter)
    template = choose_template(args.template, cfg, tokenizer, "none")
    view = view_prompt(model, tokenizer, args.prompt, args.words, template=template)
    show_view(view, f"{args.ckpt} + {args.adapter}" if args.adapter else args.ckpt, args)


if __name__ == "__main__":
    run_main(main)
