"""Sample completions of many prompts at once, and keep the log-probability of every token.

Prompts are left-padded into one batch, so that one pass gives the next token of every row. Each
prompt is prefilled once, its keys and values repeated for the G completions of its group. Rows that
have stopped leave the batch. Every token is drawn by inverting the cumulative distribution at one
uniform number fixed beforehand for its row and position: which rows share a batch, and when they
leave it, changes no draw.

    python generate.py --ckpt runs/sft --prompt "7 * 8 = " --temperature 0.8 --top-p 0.95 --seed 1
    python generate.py --ckpt MODEL --chat --system "Be brief."
"""
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from checkpoint import load_checkpoint
from config import BadInput, run_main
from engine.decode import KVCache, in_batches, left_pad, read_shared
from engine.memory import CACHED_TOKENS, DECODED_ROWS
from engine.ops import blocked_reduction, exp
from engine.parallel import map_rows
from lens import gather_taps
from model import Llama
from text.rows import check_context, choose_template
from text.tokenizer import Tokenizer, first_stop, tokens_until_stop


@dataclass
class Completion:
    ids: list[int]          # sampled tokens, the stop token included
    text: str               # decoded; cut at a stop, and but for many_lines at the first line break
    finished: bool          # ended by a stop token or text; otherwise cut by the length limit
    logprobs: np.ndarray    # (len(ids),) float32 at the temperature used; empty for greedy
    entropies: np.ndarray   # (len(ids),) float32 nats of the whole distribution then; the same
    stop: str = ""          # which of `stops` ended it; "": a stop token did, or nothing
    taps: mx.array | None = None    # (L+1, D): the stream at the prompt's last token, if asked for


def choose(logits: mx.array, uniform: mx.array | None, temperature: float, top_k: int = 0,
           top_p: float = 1.0) -> tuple[mx.array, mx.array, mx.array]:
    """Next tokens: logits (B, V), uniform (B,) in [0, 1) -> tokens, log-probabilities, entropies.

    temperature  0 takes the most probable token; log-probability and entropy are then 0, unread
    top_k        only the k most probable; top_p: only the most probable that hold so much together.
                 Log-probabilities are those of the whole distribution at this temperature.
    """
    if temperature == 0:
        tokens = mx.argmax(logits, axis=-1)
        return tokens, mx.zeros(tokens.shape), mx.zeros(tokens.shape)
    shifted = (logits - blocked_reduction(mx.max, logits)[:, None]) / temperature
    mass = exp(shifted)                                                 # (B, V), not normalised
    total = blocked_reduction(mx.sum, mass)[:, None]
    kept = mass
    if 0 < top_k < logits.shape[-1]:
        kept = mx.where(mass >= mx.topk(mass, top_k).min(-1, keepdims=True), kept, 0)
    if top_p < 1:
        falling = -mx.sort(-mass, axis=-1)
        inside = mx.cumsum(falling, axis=-1) - falling < top_p * total  # the first always is
        kept = mx.where(mass >= mx.where(inside, falling, mx.inf).min(-1, keepdims=True), kept, 0)
    cdf = mx.cumsum(kept, axis=-1)
    # a hair inside (0, 1): at 0 any first token would do, at 1 rounding could find none
    level = (1e-7 + (1 - 1e-6) * uniform[:, None]) * cdf[:, -1:]
    tokens = mx.argmax(cdf > level, axis=-1)
    logprobs = mx.take_along_axis(shifted, tokens[:, None], axis=-1) - mx.log(total)
    entropy = mx.log(total[:, 0]) - blocked_reduction(mx.sum, mass * shifted) / total[:, 0]
    return tokens, logprobs[:, 0], entropy


def sample(model: Llama, tokenizer: Tokenizer, prompts: list[list[int]],
           max_completion_tokens: int, group: int = 1, temperature: float = 0.0, top_k: int = 0,
           top_p: float = 1.0, key: mx.array | None = None, many_lines: bool = False,
           before: int = 0, after: int = 0, stops: tuple[str, ...] = (),
           ends: Collection[int] = (), keep_taps: bool = False) -> list[Completion]:
    """Complete every prompt `group` times, until EOS, a line break or the limit.

    many_lines   only EOS ends a completion
    stops        texts that end one too, such as "\nUser:". The text is cut in front of the first;
                 the ids go up to the token that completes it. They are looked for in the decoded
                 text: one text has many tokenisations, and the last token of each stands elsewhere
    ends         tokens that end one too, such as the <|im_end|> of a chat template
    key      MLX random key; the same key gives the same completions in batches of any size
    before   prompts that other processes complete with this key, in front of these; after: behind
    keep_taps   for the lens, which then need not read the prompts again
    returns  len(prompts) * group completions, a prompt's in a row, in the prompts' order
    raises   BadInput if a prompt does not fit the context
    """
    check_context(prompts, max_completion_tokens, model)
    # tokens sampled since the last look, and as many as may hold the longest stop
    window = 8 + max((len(stop.encode()) for stop in stops), default=0)
    over = lambda ids: first_stop(tokenizer.decode(ids[-window:]), stops) != ""
    is_stop = np.zeros(model.args.vocab_size, bool)
    ends = {*ends, *(tokenizer.eos_ids if many_lines else tokenizer.stop_ids)}
    is_stop[[i for i in ends if i < len(is_stop)]] = True
    stop_table = mx.array(is_stop)
    uniforms = mx.random.uniform(
        shape=((before + len(prompts) + after) * group, max_completion_tokens), key=key)
    uniforms = uniforms[before * group:(before + len(prompts)) * group]
    pick = lambda logits, u: choose(logits, u, temperature, top_k, top_p)
    room = CACHED_TOKENS // (max(map(len, prompts)) + max_completion_tokens)
    per_batch, completions = max(1, min(DECODED_ROWS, room) // group), {}
    for part in in_batches(prompts, per_batch, max_completion_tokens):
        rows = np.array([j * group + g for j in part for g in range(group)])
        out = sample_batch(model, [prompts[j] for j in part], group, pick, uniforms[mx.array(rows)],
                           stop_table, over if stops else None, keep_taps)
        for row, (ids, logprobs, entropies, taps) in zip(rows.tolist(), zip(*out)):
            ended = np.flatnonzero(is_stop[ids])
            n = ended[0] + 1 if len(ended) else len(ids)
            text, stop = tokenizer.decode_until(ids[:n], many_lines, stops)
            if stop:
                n = tokens_until_stop(tokenizer, ids[:n], stops)
            kept = n if temperature else 0
            completions[row] = Completion(ids[:n].tolist(), text, len(ended) > 0 or stop != "",
                                          logprobs[:kept], entropies[:kept], stop, taps)
    return [completions[row] for row in range(len(prompts) * group)]


def prefill(model: Llama, prompts: list[list[int]], group: int, room: int,
            keep_taps: bool = False) -> tuple[mx.array, list[KVCache], list[mx.array]]:
    """Read P prompts for `group` rows each: next token's logits (R, V), caches, L+1 taps (P, D)."""
    shared, own = read_shared(model, prompts, one_length=True)      # such as worked examples
    T = max(map(len, prompts))
    tokens, start = left_pad(own)

    def read(part):
        rows = part["tokens"]
        cache = [c.repeat(len(rows), T) for c in shared] or model.make_cache(T, part["start"])
        last = mx.full((len(rows), 1), rows.shape[1] - 1)
        taps = [resid[:, 0] for resid in gather_taps(model, rows, last, cache)]     # (P, D)
        # slice the residual stream, not the logits: the unembedding runs for one position only
        logits = model.head(taps[-1])
        return logits, [(c.keys, c.values) for c in cache], taps if keep_taps else []

    parts = map_rows(read, {"tokens": tokens, "start": start}, model.parts)
    caches = model.make_cache(T, start)
    for block, cache in enumerate(caches):
        cache.update(mx.concatenate([kv[block][0] for _, kv, _ in parts]),
                     mx.concatenate([kv[block][1] for _, kv, _ in parts]))
    logits = mx.concatenate([logits for logits, _, _ in parts])
    if group > 1:       # or they would be copied for nothing
        logits = mx.repeat(logits, group, axis=0)
    taps = [mx.concatenate(tap) for tap in zip(*(taps for _, _, taps in parts))]
    return logits, [cache.repeat(group, T + room) for cache in caches], taps


def sample_batch(model: Llama, prompts: list[list[int]], group: int, pick, uniforms: mx.array,
                 is_stop: mx.array, is_over=None, keep_taps: bool = False) -> tuple:
    """Decode R = P * group rows: ids, log-probabilities, entropies, (R, C), and R times the taps.

    What stands behind a row's stop is arbitrary. is_over  of a row's ids so far: has it ended?
    """
    R, C = uniforms.shape
    logits, cache, taps = prefill(model, prompts, group, C, keep_taps)
    of_prompt = list(mx.stack(taps, axis=1)) if taps else [None] * len(prompts)     # (L+1, D)
    mx.eval(of_prompt)
    out = np.zeros((R, C), np.int32), np.zeros((R, C), np.float32), np.zeros((R, C), np.float32)
    alive, stopped, pending = np.arange(R), mx.zeros(R, mx.bool_), []
    for t in range(C):
        drawn = pick(logits, uniforms[:, t])
        pending.append(drawn)
        stopped = stopped | is_stop[drawn[0]]
        mx.async_eval(drawn, stopped)   # the device goes on while Python builds the next step
        n = t + 1
        if n == C or n & (n - 1) == 0 or n % 8 == 0:    # asking the device makes it wait: rarely
            for array, column in zip(out, zip(*pending)):
                array[alive, n - len(pending):n] = np.array(mx.stack(column, axis=1))
            if is_over:
                over = np.array([is_over(out[0][row, :n]) for row in alive])
                stopped = stopped | mx.array(over)
            pending, going = [], np.flatnonzero(~np.array(stopped))
            if n == C or not len(going):
                break
            if len(going) <= 0.75 * len(alive):         # worth copying the cache
                rows, alive = mx.array(going), alive[going]
                drawn = [x[rows] for x in drawn]
                stopped, uniforms = stopped[rows], uniforms[rows]
                cache = [c.take(rows) for c in cache]
        logits = model.head(model.last_resid(drawn[0][:, None], cache))
    return *out, [taps for taps in of_prompt for _ in range(group)]


def main(argv: list[str]) -> None:
    from files.options import generate_options  # training samples too, and talks with nobody
    from report.conversation import talk
    args = generate_options(argv)
    model, tokenizer, cfg = load_checkpoint(args.ckpt, args.adapter)
    template = choose_template(args.template, cfg, tokenizer, "chat" if args.chat else "none")
    if template == "none" and (args.chat or args.system is not None):
        raise BadInput("--chat and --system need a template, and this is none; give --template "
                       "lines, plain, cued or chat")
    talk(model, tokenizer, args, template, partial(
        choose, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p))


if __name__ == "__main__":
    run_main(main)
