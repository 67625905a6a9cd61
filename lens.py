"""The logit lens: what the residual stream says before the last block.

*Logit lens* (nostalgebraist 2020): at each tap the model's own final norm and unembedding are
applied, softmax(U . N(h)) in float32, with the statistics of that tap. It calls `model.head`, the
very function that makes the model's logits, on the very stream that training and generation run, so
at the last tap it *is* the model (what went wrong elsewhere: study/prior_work.md).
A lens probability is not a belief: it depends on the residual's length too. So rank, entropy and
the distance to the final distribution stand beside it.

Memory: of a (rows, V) array of logits a few numbers per row are kept. Never (taps, B, T, V).

    python lens.py --ckpt runs/dual_reward --prompt "7 * 8 = " [--words multiply 56]
                   [--png FILE] [--html FILE] [--json FILE]

Its relatives stand in study/: the Jacobian lens, direct logit attribution, probes, edits.
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

from config import BadInput, run_main, write_text
from fastexp import exp, fold, linux_cpu, logsumexp
from generate import check_context
from lora import load_checkpoint
from model import Llama, gather_positions
from parallel import cut, side_by_side
from report.page import lens_page
from report.plot import lens_heatmap
from report.stats import EMERGED, depth
from report.terminal import lens_table
from tokenizer import Tokenizer

ROWS_PER_BATCH = 128
GROUP = 128     # tokens; see top_tokens
# of so many logits a part's call of the head is made: fewer, and its matrix product runs slowly
LOGITS_PER_CALL = 2 ** 24
# and so many are reduced at once on a CPU: with what is computed of them they fit its L2 cache
LOGITS_IN_CACHE = 2 ** 18


@dataclass
class Reading:
    """What the lens saw: numpy, axes (L+1 taps, B, A positions), N targets, k top tokens; nats."""
    probs: np.ndarray       # (L+1, B, A, N) probability of each target
    ranks: np.ndarray       # (L+1, B, A, N) 1 + number of tokens with a strictly larger logit
    ties: np.ndarray        # (L+1, B, A, N) other tokens with the same logit; 0: the rank is sure
    logprobs: np.ndarray    # (L+1, B, A, N) log of probs, where probs are too small to be told
    entropy: np.ndarray     # (L+1, B, A)
    kl: np.ndarray          # (L+1, B, A) KL(last tap || this tap): 0 at L
    final_probs: np.ndarray  # (L+1, B, A) probability of the token the model ends up with
    top_ids: np.ndarray     # (L+1, B, A, k) most probable first
    top_probs: np.ndarray   # (L+1, B, A, k)

    def first(self, n: int) -> "Reading":
        """The reading of the first n rows alone."""
        return Reading(*(getattr(self, name)[:, :n] for name in Reading.__dataclass_fields__))


def final_distribution(logits: mx.array) -> tuple[mx.array, ...]:
    """What the last tap (B, A, V) says: probabilities (B, A, V), entropy, top token (B, A, 1)."""
    logprobs = logits - logsumexp(logits)[..., None]
    probs = exp(logprobs)
    return probs, -fold(mx.sum, probs * logprobs), top_tokens(logits, 1)


def read_logits(logits: mx.array, targets: mx.array, k: int, final_probs: mx.array,
                final_entropy: mx.array, final_top: mx.array) -> tuple[mx.array, ...]:
    """Reduce float32 logits (B, A, V) to one tap's arrays of a Reading.

    targets (B, A, N) int32; the rest is final_distribution's
    """
    logits = logits - fold(mx.max, logits)[..., None]                               # (B, A, V)
    weights = exp(logits)           # once: on a CPU it costs more than all else here
    total = fold(mx.sum, weights)
    log_total = mx.log(total)
    entropy = log_total - fold(mx.sum, weights * logits) / total
    # sum q (log q - log p), with log p = logits - log_total
    kl = log_total - fold(mx.sum, final_probs * logits) - final_entropy
    chosen = mx.take_along_axis(logits, targets, axis=-1)                           # (B, A, N)
    # no sort: two reductions a target; float32, since bfloat16 logits tie by the hundred
    count = lambda compare: mx.stack([compare(logits, chosen[..., n:n + 1]).sum(-1)
                                      for n in range(targets.shape[-1])], -1)
    ranks, ties = count(mx.greater) + 1, count(mx.equal) - 1
    logprobs = chosen - log_total[..., None]
    prob_of = lambda ids: mx.exp(
        mx.take_along_axis(logits, ids, axis=-1) - log_total[..., None])
    top = top_tokens(logits, k)
    return (mx.exp(logprobs), ranks, ties, logprobs, entropy, kl,
            prob_of(final_top)[..., 0], top, prob_of(top))


def top_tokens(logits: mx.array, k: int) -> mx.array:
    """The k largest, largest first: (..., V) -> (..., k) ids. mx.topk gives values only.

    Of groups of 128 tokens only the k with the largest maxima can hold one of the k largest tokens.
    So the maxima are partitioned, then k groups: a tenth of the time that all V tokens take.
    """
    if k == 1:
        return mx.argmax(logits, axis=-1, keepdims=True)
    largest = lambda x: mx.argpartition(-x, kth=k - 1, axis=-1)[..., :k]
    *lead, V = logits.shape
    if V % GROUP or V // GROUP <= k:
        top = largest(logits)
    else:
        groups = logits.reshape(*lead, GROUP, V // GROUP)   # group g: tokens g, g + V / 128, ...
        best = largest(groups.max(-2))                                              # (..., k)
        within = mx.take_along_axis(groups, best[..., None, :], axis=-1)            # (..., 128, k)
        found = largest(within.reshape(*lead, GROUP * k))
        top = found // k * (V // GROUP) + mx.take_along_axis(best, found % k, axis=-1)
    order = mx.argsort(-mx.take_along_axis(logits, top, axis=-1), axis=-1)
    return mx.take_along_axis(top, order, axis=-1)


def pick_taps(model: Llama, tokens: mx.array, positions: mx.array):
    """taps_at for a part of a batch: a generator, see side_by_side."""
    picked = []
    for tap, resid in enumerate(model.stream(tokens, positions=positions)):
        at_last = tap == model.args.num_hidden_layers
        picked.append(resid if at_last else gather_positions(resid, positions))
        # here, or the lazy graph would hold the whole stream of all taps until the end
        yield picked[-1], resid
    return picked


def taps_at(model: Llama, tokens: mx.array, positions: mx.array) -> list[mx.array]:
    """The residual stream at some positions (B, A) of tokens (B, T): L+1 arrays (B, A, D)."""
    parts = side_by_side(lambda part: pick_taps(model, **part),
                         cut({"tokens": tokens, "positions": positions}))
    return [mx.concatenate(taps) for taps in zip(*parts)]


def read_taps(model: Llama, tokens: mx.array, positions: mx.array, targets: mx.array,
              k: int = 1, jacobians: mx.array | None = None) -> Reading:
    """Read all taps at some positions.

    tokens     (B, T) int32, right-padded if rows differ (beyond every position asked for)
    positions  (B, A) int32: position p predicts token p+1
    targets    (B, A, N) int32 token ids to follow, N at least 1
    jacobians  (L+1, D, D) from study.jacobian: read J h instead of h; none: the logit lens
    source     logit lens; at tap L the probabilities are the model's own (tested)
    """
    parts = side_by_side(lambda part: read_part(model, **part, k=k, jacobians=jacobians), cut(
        {"tokens": tokens, "positions": positions, "targets": targets}))
    return Reading(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts)))


def read_part(model: Llama, tokens: mx.array, positions: mx.array, targets: mx.array, k: int,
              jacobians: mx.array | None):
    """read_taps for a part of a batch: a generator of a Reading's arrays."""
    resids = yield from pick_taps(model, tokens, positions)
    if jacobians is not None:
        resids = [resid.astype(mx.float32) @ J.T for resid, J in zip(resids, jacobians)]
    at_once = max(1, LOGITS_PER_CALL // (targets.shape[0] * targets.shape[1]
                                        * model.args.vocab_size))
    rows = max(1, LOGITS_IN_CACHE // (targets.shape[1] * model.args.vocab_size))
    rows = rows if linux_cpu() else len(targets)
    taps, final = [], None
    for end in range(len(resids), 0, -at_once):     # from the last tap, which all are compared with
        logits = model.head(mx.stack(resids[max(0, end - at_once):end]))            # (g, B, A, V)
        yield logits
        final = final or final_distribution(logits[-1])
        yield final
        for tap in reversed(range(len(logits))):
            pieces = []
            for i in range(0, len(targets), rows):
                few = slice(i, i + rows)
                reading = read_logits(logits[tap, few], targets[few], k, *(x[few] for x in final))
                yield reading       # here, or the graph would hold the temporaries of all taps
                pieces.append([np.array(a) for a in reading])
            taps.append([np.concatenate(arrays) for arrays in zip(*pieces)])
    return [np.stack(arrays[::-1]) for arrays in zip(*taps)]


def pad_prompts(prompts: list[list[int]]) -> tuple[mx.array, mx.array]:
    """Right-pad prompts: tokens (B, T), and the position of each one's last token (B, 1)."""
    T = max(map(len, prompts))
    tokens = mx.array([ids + [0] * (T - len(ids)) for ids in prompts])
    return tokens, mx.array([[len(ids) - 1] for ids in prompts])


def read_prompts(model: Llama, prompts: list[list[int]], targets: list[list[int]],
                 k: int = 1, jacobians: mx.array | None = None) -> Reading:
    """Read all taps at the last token of each prompt: A = 1. prompts: ids; targets: N ids each."""
    parts = []
    for i in range(0, len(prompts), ROWS_PER_BATCH):
        tokens, positions = pad_prompts(prompts[i:i + ROWS_PER_BATCH])
        chosen = mx.array(targets[i:i + ROWS_PER_BATCH])[:, None]
        parts.append(read_taps(model, tokens, positions, chosen, k, jacobians))
    return Reading(*(np.concatenate([getattr(p, name) for p in parts], axis=1)
                     for name in Reading.__dataclass_fields__))


# --------------------------------------------------------------------------------------------------
# at which depth


def depth(score: np.ndarray, threshold: float, hold: int = 3) -> dict[str, int]:
    """Where a curve over taps rises, peaks and stays; taps, -1 for never.

    score    (L+1,) of one quantity. Looked at before the last block only, taps 1 to L-1: tap 0 is
             the input token, tap L the output.
    first    the first tap at the threshold or above: counts blips
    onset    the first such tap after a lower one that keeps it for `hold` taps (fewer at the end):
             what can be read from tap 0 on has no onset, since it never rose
    sustained  the first tap from which it stays; right for answers, wrong for words that fade again
    peak     where it is largest
    example  [0, .1, .6, .2, .7, .8, .9, 1] at .5 -> first 2, onset 4, sustained 4, peak 6
    """
    last = len(score) - 2
    above = np.asarray(score) >= threshold
    inner = range(1, last + 1)
    find = lambda rule: next((k for k in inner if rule(k)), -1)
    return {"first": find(lambda k: above[k]),
            "onset": find(lambda k: not above[k - 1] and above[k:min(k + hold, last + 1)].all()),
            "sustained": find(lambda k: above[k:last + 1].all()),
            "peak": 1 + int(np.argmax(score[1:last + 1]))}


def saturation(top_ids: np.ndarray) -> np.ndarray:
    """The first tap from which the top token is the model's own to the end: (L+1, ...) -> (...).

    source   Geva et al. 2203.14680: "saturation event"
    """
    same = top_ids == top_ids[-1]
    # from the end: how long the run of equal top tokens is
    return len(top_ids) - np.cumprod(same[::-1], axis=0).sum(0)


# --------------------------------------------------------------------------------------------------
# the Jacobian lens


def unembedding_rows(model: Llama, ids: mx.array) -> mx.array:
    """Rows of the unembedding, float32 (N, D), whatever type or bits it has.

    Pulled back through the unembedding itself, a linear map: quantised and tied ones need no case.
    """
    V, D = model.args.vocab_size, model.args.hidden_size
    one_hot = (mx.arange(V) == ids[:, None]).astype(mx.float32)                     # (N, V)
    zeros = mx.zeros((len(ids), D))
    return mx.vjp(lambda x: model.unembed(x).astype(mx.float32), [zeros], [one_hot])[1][0]


def word_directions(model: Llama, ids: mx.array) -> mx.array:
    """gain * U_w: what N(h), before its division by the length, is multiplied with; (N, D)."""
    return unembedding_rows(model, ids) * model.model.norm.weight.astype(mx.float32)


def jacobian(model: Llama, prompts: list[list[int]], directions: mx.array) -> mx.array:
    """Mean over positions and prompts of d<direction, last tap> / d(tap k): (L+1, N, D) float32.

    prompts     any text, as ids; not the prompts to be read
    directions  (N, D). With the identity the result is J itself, for `read_taps`; with
                `word_directions` it is each word's read-out vector r, by one backward pass a word,
                and argmax_w <r_w, h> is the Jacobian lens's choice among the words.
    A position's effect is summed over itself and all later ones, so at tap L this is `directions`.
    source      Gurnee et al. 2026, transformer-circuits.pub, adjoint form
    """
    tokens, last = pad_prompts(prompts)
    real = (mx.arange(tokens.shape[1]) <= last).astype(mx.float32)[..., None]       # (B, T, 1)
    L, D = model.args.num_hidden_layers, model.args.hidden_size

    @mx.compile
    def pull_back(direction):
        # an array of zeros added at every tap: its gradient is the tap's
        def final_resid(*added):
            edit = {k: lambda resid, extra=extra: resid + extra for k, extra in enumerate(added)}
            return model.final_resid(tokens, edit=edit).astype(mx.float32)
        zeros = [mx.zeros((*tokens.shape, D)) for _ in range(L + 1)]
        _, grads = mx.vjp(final_resid, zeros, [real * direction])
        return mx.stack([(g * real).sum((0, 1)) for g in grads]) / real.sum()       # (L+1, D)

    rows = []
    for direction in directions:
        rows.append(pull_back(direction))
        mx.eval(rows[-1])
    return mx.stack(rows, axis=1)


# --------------------------------------------------------------------------------------------------
# direct logit attribution


def contributions(model: Llama, prompts: list[list[int]], targets: list[int],
                  foils: list[int] | None = None,
                  heads: bool = False) -> tuple[list[str], np.ndarray]:
    """Each component's share of a logit at the last prompt token: N names, and (N, B) in logits.

    With foils, of the difference of two logits, target minus foil: what all logits share cancels.
    Components are the embedding, every block's attention (or its heads one by one) and its MLP.
    They sum to the logit, since the stream is a sum and the scale is the clean run's: contribution
    of c is <gain * U_target, c> / rms(h_L). A later norm or block would react to a missing
    component, so this is not the effect of removing it.
    """
    tokens, last = pad_prompts(prompts)
    rows = word_directions(model, mx.array(targets))                                # (B, D)
    if foils is not None:
        rows = rows - word_directions(model, mx.array(foils))
    pick = lambda resid: gather_positions(resid, last)[:, 0].astype(mx.float32)     # (B, D)
    names, parts, before = ["embed"], [], None
    for tap, resid in enumerate(model.stream(tokens)):
        if tap == 0:
            parts.append(pick(resid))
        else:
            block, name = model.model.layers[tap - 1], f"L{tap - 1}"
            middle = pick(block.attend(before))
            if heads:
                parts += split_heads(block.self_attn, block.input_layernorm(before), last)
                names += [f"{name} head {i}" for i in range(model.args.num_attention_heads)]
                bias = middle - pick(before) - sum(parts[-model.args.num_attention_heads:])
                parts[-1] = parts[-1] + bias    # o_proj's bias, where there is one, and rounding
            else:
                parts.append(middle - pick(before))
                names.append(f"{name} attn")
            parts.append(pick(resid) - middle)
            names.append(f"{name} mlp")
        mx.eval(parts[-1], resid)
        before = resid
    scale = mx.sqrt((pick(before) ** 2).mean(-1) + model.args.rms_norm_eps)         # (B,)
    return names, np.array(mx.stack([(part * rows).sum(-1) / scale for part in parts]))


def split_heads(attention, x: mx.array, last: mx.array) -> list[mx.array]:
    """What each head adds to the stream at one position: H arrays (B, D). x (B, T, D), normed.

    o_proj is linear up to its bias, whether plain, quantised or LoRA: fed with one head's slice
    and zeros elsewhere it gives that head's share.
    """
    y = gather_positions(attention.heads(x), last)[:, 0]                            # (B, H * d)
    owner = mx.arange(y.shape[-1]) // attention.head_dim
    nothing = attention.o_proj(mx.zeros_like(y))
    return [(attention.o_proj(mx.where(owner == i, y, 0)) - nothing).astype(mx.float32)
            for i in range(y.shape[-1] // attention.head_dim)]


def attribution_table(model: Llama, tokenizer: Tokenizer, prompt: str, words: list[str]) -> str:
    """Who wrote the word's logit (or its difference to a second word's), block by block."""
    ids = tokenizer.encode_prompt(prompt)
    target, *foil = chosen = tokenizer.word_ids(words, ids)
    names, shares = contributions(model, [ids], [target], foil or None, heads=True)
    named = dict(zip(names, shares[:, 0]))
    lines = [f"direct logit attribution of {words[0]!r}" + (f" minus {words[1]!r}" if foil else "")
             + f" (tokens {tokenizer.show(chosen)}): {shares.sum():.2f} logits, "
               "final norm's scale held",
             f"  embed {named['embed']:7.2f}",
             "  block     MLP   heads"]
    for block in reversed(range(model.args.num_hidden_layers)):
        heads = [named[f"L{block} head {i}"] for i in range(model.args.num_attention_heads)]
        lines.append(f"  L{block:<5}{named[f'L{block} mlp']:7.2f}   "
                     + " ".join(f"{share:6.2f}" for share in heads))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# one prompt, for a person


def view_prompt(model: Llama, tokenizer: Tokenizer, prompt: str, words: list[str],
                k: int = 10) -> dict:
    """All taps by all positions of one prompt: plain numbers that `plot` draws, `--json` writes.

    returns  {prompt, tokens [T], taps [L+1 names], top [L+1][T][k] of [token, probability],
              entropy [L+1][T], kl [L+1][T], words {word: {id, piece, prob [L+1], rank [L+1],
              onset, peak}} at the last position; onset at 0.10}
    """
    ids = tokenizer.encode_prompt(prompt)
    check_context([ids], 0, model)
    chosen = tokenizer.word_ids(words, ids)
    T = len(ids)
    targets = mx.broadcast_to(mx.array(chosen or [0]), (1, T, max(len(chosen), 1)))
    reading = read_taps(model, mx.array([ids]), mx.arange(T)[None], targets,
                        min(k, model.args.vocab_size))
    cell = lambda tap, t: [[tokenizer.piece(i), round(float(p), 6)] for i, p in
                           zip(reading.top_ids[tap, 0, t], reading.top_probs[tap, 0, t])]
    taps = range(len(reading.entropy))
    names = ["embed"] + [f"L{l}" for l in range(len(taps) - 1)]
    series = {}
    for n, word in enumerate(words):
        prob = reading.probs[:, 0, -1, n]
        where = depth(prob, 0.10)
        series[word] = {"id": chosen[n], "piece": tokenizer.piece(chosen[n]),
                        "prob": prob.round(6).tolist(),
                        "rank": reading.ranks[:, 0, -1, n].tolist(),
                        "onset": names[where["onset"]] if where["onset"] > 0 else None,
                        "peak": names[where["peak"]]}
    return {
        "prompt": prompt, "tokens": [tokenizer.piece(i) for i in ids], "taps": names,
        "top": [[cell(tap, t) for t in range(T)] for tap in taps],
        "entropy": reading.entropy[:, 0].round(4).tolist(),
        "kl": reading.kl[:, 0].round(4).tolist(), "words": series,
    }


def terminal_table(view: dict, color: bool, width: int = 12) -> str:
    """Blocks by positions, last on top: each cell's top token and per cent, darker when surer."""
    def cell(token: str, prob: float) -> str:
        text = f"{token[:width - 5]:<{width - 5}}{100 * prob:4.0f} "
        shade = 255 - int(23 * prob ** 0.5)  # 256-colour greys run from 232 (black) to 255 (white)
        return (f"\033[48;5;{shade}m\033[38;5;{16 if shade > 243 else 231}m{text}\033[0m"
                if color else text)
    lines = [" " * 7 + "".join(f"{token[:width - 1]:<{width}}" for token in view["tokens"])
             + "entropy, KL to the end (nats, last position)"]
    for tap in reversed(range(len(view["taps"]))):
        lines.append(f"{view['taps'][tap]:<7}"
                     + "".join(cell(*cells[0]) for cells in view["top"][tap])
                     + f"{view['entropy'][tap][-1]:5.2f} {view['kl'][tap][-1]:6.2f}")
    for word, series in view["words"].items():
        steps = "  ".join(f"{name} {p:.2f} (#{r})" for name, p, r in
                          zip(view["taps"], series["prob"], series["rank"]))
        lines.append(f"{word!r}, token {series['piece']} ({series['id']}), at the last position, "
                     f"probability (rank): {steps}; "
                     f"onset {series['onset'] or 'none'}, peak {series['peak']}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Show what every block would answer, by the logit lens.")
    parser.add_argument("--ckpt", required=True, help="run folder, model folder or Hub name")
    parser.add_argument("--adapter", metavar="FOLDER",
                        help="take this adapter, ours, mlx-lm's or peft's, on top of --ckpt")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--words", nargs="*", default=[],
                        help="words to follow at the last position, one token each; a set in one "
                        "form, with a space before them or without, as the prompt's end asks")
    parser.add_argument("--attribute", nargs="+", default=[], metavar="WORD",
                        help="who wrote WORD's logit, or its difference to a second WORD's")
    parser.add_argument("--png", metavar="FILE")
    parser.add_argument("--html", metavar="FILE",
                        help="one self-contained page; a cell shows its ten top tokens on hover")
    parser.add_argument("--json", metavar="FILE", help="the numbers behind the pictures")
    args = parser.parse_args(argv)
    if not args.prompt:
        raise BadInput("--prompt is empty; give a text such as '7 * 8 = '")
    if len(args.attribute) > 2:
        raise BadInput(f"--attribute takes one word or two, got {len(args.attribute)}")
    model, tokenizer, _ = load_checkpoint(args.ckpt, args.adapter)
    view = view_prompt(model, tokenizer, args.prompt, args.words)
    name = f"{args.ckpt} + {args.adapter}" if args.adapter else args.ckpt
    print(f"{name}   {args.prompt!r}   logit lens: final norm and unembedding at every tap; "
          "cell: top token, per cent")
    print(lens_table(view, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if args.json:
        write_text(Path(args.json), json.dumps(view) + "\n")
    if args.png:
        lens_heatmap(view, args.png)
    if args.html:
        write_text(Path(args.html), lens_page(view))


if __name__ == "__main__":
    run_main(main)
