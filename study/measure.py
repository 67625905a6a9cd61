"""What is seen in one finished run: a few numbers a block, for study/measures/BASE-ARM-SEED.json.

All on operand pairs that no model was trained on, but swaps of problems with one-digit answers,
which are few: those are on all pairs (prompts.swap_splits).
"""
import engine.blas  # noqa: F401  (before mlx)
import numpy as np

from config import Config
from eval import measure_accuracy
from model import Llama
from report.stats import auc_within
from study.jacobian import last_token_stream, read_stream
from study.probe import four_claims
from study.prompts import Matched, judged, make_matched, operations_of, swap_operations
from study.swaps import (
    Streams,
    class_means,
    effect,
    exchange,
    fit_subspace,
    make_swaps,
    outcome,
    read_streams,
    swap_of,
    unedited,
)
from text.arithmetic import Problem
from text.rows import answer_lengths, class_word_ids, series_ids
from text.tokenizer import Tokenizer

ANSWER_TOKENS = 8   # of every arm, whatever it was trained with
FEWEST = 5          # right, and wrong, answers in which strength may be compared


def measure(model: Llama, tokenizer: Tokenizer, cfg: Config, size: dict, base: dict | None,
            texts: list[list[int]] | None) -> dict:
    """Look inside one model: {values {name: number}, curves {name: [L+1]}, right, claims}.

    size    problems (a cell), pairs (prompts.make_matched), every (the taps of probe and swaps:
            each `every`th, the trained, the hand-over block's, the last)
    base    of the model that it was trained from: {lengths of edits, hand_over block}; None: this
            is the base
    texts   to fit the Jacobian lens on; None: without it
    """
    problems = judged(cfg, size["problems"])
    result = read_series(model, tokenizer, cfg, problems)
    matched = make_matched(cfg, tokenizer, size["pairs"])
    streams = read_streams(model, matched.prompts)
    L, block = model.args.num_hidden_layers, cfg.class_block(model.args)
    found = {"hand_over": base["hand_over"]} if base else {}
    if not base:
        found["turned_by_block"] = turned_by_block(model, tokenizer, cfg, matched, streams)
        found["hand_over"] = hand_over([found["turned_by_block"]])
    blocks = sorted({block, found["hand_over"]})
    taps = sorted({*range(1, L + 1, size["every"]), *(b + 1 for b in blocks), L})
    ids = class_word_ids(cfg, tokenizer, problems)
    words = [ids[operation] for operation in operations_of(cfg)]
    claims = four_claims(model, tokenizer, cfg, matched, streams, taps,
                         np.array(base["lengths"]) if base else None, words, texts)
    return {**result, **found, "block": block, "edits": claims["edits"],
            "lengths": rounded(claims["lengths"]), "taps": [compact(t) for t in claims["taps"]],
            "subspace": best_subspace(model, tokenizer, cfg, matched, streams, blocks)}


def read_series(model: Llama, tokenizer: Tokenizer, cfg: Config, problems: list[Problem]) -> dict:
    """Accuracy and the logit lens' series at the last prompt token, block by block.

    word     the operation's own name;  target  what the class loss of this arm wants, or would
    auc      chance that a right answer's target is likelier at the trained block than a wrong one's
    answer   over answers of one token: a first token that many share does not say one of them
    Accuracy and answer are over add and subtract where the bundled models are asked, for products
    of unseen pairs they cannot compute.
    """
    learnable = np.array([cfg.data != "arithmetic" or p.operation in ("add", "subtract")
                          for p in problems])
    rows = measure_accuracy(model, tokenizer, [p for p, k in zip(problems, learnable) if k],
                            ANSWER_TOKENS)
    right = np.array([row["correct"] for row in rows])
    prompts, ids = series_ids(tokenizer, problems)                                  # (B, 3)
    named = class_word_ids(cfg, tokenizer, problems)
    targets = np.array([named[p.operation] for p in problems])
    stream = last_token_stream(model, prompts)                                      # (L+1, B, D)
    reading = read_stream(model, stream, np.column_stack([ids[:, :2], targets]).tolist())
    probs, ranks = reading.probs[:, :, 0], reading.ranks[:, :, 0]                   # (L+1, B, 3)
    top = reading.top_ids[:, :, 0, 0]                                               # (L+1, B)
    one_token = learnable & (answer_lengths(tokenizer, problems) == 1)
    inner = slice(1, -1)        # before the last block, which is the output itself
    curves = {
        "word.top1": (top == ids[:, 1]).mean(1), "word.prob": probs[:, :, 1].mean(1),
        "target.top1": (top == targets).mean(1), "target.prob": probs[:, :, 2].mean(1),
        "answer.top1": (top == ids[:, 0])[:, one_token].mean(1),
        "answer.prob": probs[:, one_token, 0].mean(1),
        "answer.rank": np.median(ranks[:, one_token, 0], axis=1),
        "entropy": reading.entropy[:, :, 0].mean(1),
        # cross-entropy through a norm leaves the stream's own length free
        "length": np.linalg.norm(stream, axis=-1).mean(1)}
    cells = np.array([p.operation for p, k in zip(problems, learnable) if k])
    enough = min(right.sum(), (~right).sum()) >= FEWEST
    at_block = reading.logprobs[cfg.class_block(model.args) + 1, :, 0, 2]           # (B,)
    values = {
        "accuracy": right.mean(), "n": len(right), "answers": int(one_token.sum()),
        "word.strength": probs[inner, :, 1].max(0).mean(),
        "target.strength": probs[inner, :, 2].max(0).mean(),
        "word.any": (top[inner] == ids[:, 1]).any(0).mean(), "n.word": len(problems),
        "answer.half": half_rise(curves["answer.prob"]),
        "auc": auc_within(at_block[learnable], right, cells) if enough else None}
    return {"values": {name: None if v is None else round(float(v), 5)
                       for name, v in values.items()},
            "curves": {name: rounded(curve) for name, curve in curves.items()},
            "right": "".join("01"[r] for r in right.astype(int))}


def half_rise(curve: np.ndarray) -> float | None:
    """The block at which a curve over taps first has half of its last value, between two blocks.

    A whole block would hide what moves a rising curve by less than one. None: its end is 0
    example  taps [0, 0, .2, .6, .8], half .4 -> between tap 2 (block 1) and 3 (block 2): 1.5
    """
    half = curve[-1] / 2
    if half <= 0:
        return None
    k = int(np.argmax(curve >= half))       # the first tap
    below = curve[k - 1] if k else 0.0
    return float(k - 1 - (curve[k] - half) / max(curve[k] - below, 1e-12))


def rounded(values, digits: int = 4) -> list:
    return [None if v is None else float(f"{v:.{digits}g}") for v in values]


def compact(tap: dict) -> dict:
    """A tap's entry of probe.four_claims without intervals, whose unit is no problem here."""
    found = {"tap": tap["tap"], "claims": [name for name, held in tap["claims"].items() if held],
             "probe": tap["probe"]["accuracy"]["value"], "control": tap["probe"]["control"],
             "aligned": tap["logit_lens"]["aligned"]["value"], "rank": tap["logit_lens"]["rank"]}
    found = {name: round(v, 4) if isinstance(v, float) else v for name, v in found.items()}
    if tap["jacobian_lens"]:
        found |= {"jacobian": round(tap["jacobian_lens"]["aligned"]["value"], 4),
                  "floor": round(tap["jacobian_lens"]["floor"], 4)}
    # turned, right, near
    found["swaps"] = {kind: rounded(tap["swaps"][kind].values())
                      for kind in tap["swaps"] if kind != "tap"}
    return found


def turned_by_block(model: Llama, tokenizer: Tokenizer, cfg: Config, matched: Matched,
                    streams: Streams) -> list[float]:
    """The share of right answers that the swap turns, after each block but the last.

    On validation pairs; behind worked examples these are few, so on training pairs too: the base
    has trained on neither.
    """
    splits = ("valid",) if cfg.data == "arithmetic" else ("valid", "train")
    swaps = make_swaps(tokenizer, matched, swap_operations(cfg), splits)
    means, L = class_means(streams, matched), model.args.num_hidden_layers
    clean, turned = unedited(model, streams, swaps), []
    for tap in range(1, L):
        swapped = streams.stream[tap][swaps.own] + swap_of(swaps, means[tap])
        found = effect(outcome(model, streams, swaps, swapped, tap), clean)
        turned.append(found["turned"] or 0.0)
    return rounded(turned)


def hand_over(curves: list[list[float]]) -> int:
    """The last block after which the swap turns at least half, by the mean of turned_by_block's
    curves (of a base's folds); where it never does, the block of the strongest swap.

    example  [[.1, .6, .5, .2]] -> 2;  [[.1, .4, .2]] -> 1
    """
    mean = np.mean(curves, axis=0)
    half = np.flatnonzero(mean >= 0.5)
    return int(half[-1]) if len(half) else int(mean.argmax())


def best_subspace(model: Llama, tokenizer: Tokenizer, cfg: Config, matched: Matched,
                  streams: Streams, blocks: list[int]) -> dict:
    """The subspace that gains most at some blocks, found on training pairs, tried on others.

    returns  {block: [its effect, the class means' swap on the same pairs]}, each [turned, right,
             near] as swaps.effect
    """
    make = lambda *splits: make_swaps(tokenizer, matched, swap_operations(cfg), splits)
    fitted, tried, found = make("train"), make("valid", "test"), {}
    means, clean = class_means(streams, matched), unedited(model, streams, tried)
    for block in blocks:
        stream = streams.stream[block + 1]
        basis = fit_subspace(model, streams, fitted, means[block + 1], block + 1)
        found[block] = []
        for edited in (exchange(stream[tried.own], stream[tried.other], basis),
                       stream[tried.own] + swap_of(tried, means[block + 1])):
            seen = outcome(model, streams, tried, edited, block + 1)
            found[block].append(rounded(effect(seen, clean).values()))
    return found
