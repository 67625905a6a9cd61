"""What is measured in one finished run, for measures.json: numbers, curves, and problem by problem.

Everything is on operand pairs that no model saw: accuracy in four wordings, the logit lens's three
series, the four claims (probe), attribution, and whether strength tells right answers from wrong.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import Config
from eval import measure_accuracy
from files.disk import read_json_lines
from lens import read_prompts
from model import Llama
from report.stats import EMERGED, auc_within, depth
from study.attribution import contributions
from study.probe import fit_probe, four_claims, matched_problems
from text.arithmetic import Problem, held_out
from text.rows import answer_lengths, class_ids, series_ids, target_ids
from text.tokenizer import Tokenizer

WORDINGS = ("symbolic", "asked", "worded", "asked_worded")


def measure(model: Llama, tokenizer: Tokenizer, cfg: Config, size: dict) -> dict:
    """Look inside one model: {values {name: number}, curves {name: [L+1]}, problems {name: [...]},
    block, claims}.

    values    one number a run; names say what, where: word.block.asked is the operation word's
              top-1 share at the trained block, over "what is 7 * 8 = " prompts
    problems  the same before averaging, where a measure is a mean over problems; the problems do
              not depend on the seed, so runs can be paired
    """
    block = cfg.class_block(model.args)
    result = {"values": {}, "curves": {}, "problems": {}, "block": block}
    rows = []
    for wording in WORDINGS:
        n = size["problems"] if wording == "symbolic" else -(-size["problems"] // 3)
        problems = held_out(replace(cfg, data_wordings=(wording,)), "test", n)
        rows += measure_wording(model, tokenizer, cfg, problems, wording, block, result)
    values = result["values"]
    measure_masked(model, tokenizer, cfg, size["pairs"], block, values)
    measure_prediction([r for r in rows if r["operation"] in ("add", "subtract")], values)
    result["claims"] = four_claims(model, tokenizer, cfg, size["pairs"], size["swap_pairs"])
    summarize_claims(result["claims"]["taps"], block, values)
    measure_attribution(model, tokenizer, cfg, size, result)
    return result


def measure_wording(model: Llama, tokenizer: Tokenizer, cfg: Config, problems: list[Problem],
                    wording: str, block: int, result: dict) -> list[dict]:
    """Accuracy and the logit lens on unseen pairs in one wording; adds to result, returns rows.

    Accuracy and the answer's series are over add and subtract, which the base can learn; the word's
    series are over all operations. The answer's are over answers of one token alone: a first token
    that many answers share does not say that one of them is there. Without any they are None.
    """
    values, curves = result["values"], result["curves"]
    prompts, ids = series_ids(tokenizer, problems)
    ids = np.column_stack([ids, class_ids(cfg, tokenizer, problems)])               # (B, 4)
    answer, word, symbol, target = range(4)
    reading = read_prompts(model, prompts, ids.tolist())
    probs, top = reading.probs[:, :, 0], reading.top_ids[:, :, 0, 0]                # (L+1, B, 4)
    rows = measure_accuracy(model, tokenizer, problems, cfg.max_completion_tokens)
    sums = np.array([p.operation in ("add", "subtract") for p in problems])
    whole = sums & (answer_lengths(tokenizer, problems) == 1)
    inner = slice(1, -1)        # before the last block, which is the output itself

    def keep(name: str, per_problem: np.ndarray) -> None:
        values[name] = float(per_problem.mean()) if len(per_problem) else None
        result["problems"][name] = [round(float(v), 5) for v in per_problem]

    keep(f"accuracy.{wording}", np.array([r["correct"] for r in rows])[sums])
    keep(f"word.block.{wording}", top[block + 1] == ids[:, word])
    final, own = reading.final_probs[:, :, 0], reading.final_probs[inner, :, 0].max(0)
    for i, row in enumerate(rows):
        row |= {"word": probs[inner, i, word].max(), "answer": probs[inner, i, answer].max(),
                "own": own[i], "confidence": final[-1, i]}
    if wording != "symbolic":
        return rows
    keep("word.strength", probs[inner, :, word].max(0))
    keep("symbol.strength", probs[inner, :, symbol].max(0))
    keep("answer.strength", probs[inner, whole, answer].max(0))
    keep("answer.last", probs[-1, whole, answer])
    keep("target.block", top[block + 1] == ids[:, target])
    others = [k for k in range(1, len(top) - 1) if k != block + 1]
    keep("word.spread", (top[others] == ids[:, word]).mean(0))
    # the token before the last prompt token, and the answer behind it: causal, so the stream there
    # is that of the prompt cut or continued
    for name, change in (("earlier", lambda p, i: p[:-1]), ("later", lambda p, i: [*p, int(i)])):
        moved = [change(p, i) for p, i in zip(prompts, ids[:, answer])]
        at = read_prompts(model, moved, ids.tolist()).top_ids[block + 1, :, 0, 0]
        keep(f"word.block.{name}", at == ids[:, word])
    curves |= {"word.prob": probs[:, :, word].mean(1), "symbol.prob": probs[:, :, symbol].mean(1),
               "word.top1": (top == ids[:, word]).mean(1),
               "entropy": reading.entropy[:, :, 0].mean(1), "kl": reading.kl[:, :, 0].mean(1)}
    if whole.any():
        curves["answer.prob"] = probs[:, whole, answer].mean(1)
    for name in ("word", "answer"):
        where = depth(curves[f"{name}.prob"], EMERGED) if f"{name}.prob" in curves else {}
        values |= {f"{name}.peak": where["peak"] - 1 if where else None,
                   f"{name}.onset": where["onset"] - 1 if where.get("onset", -1) > 0 else None}
    for name in curves:
        curves[name] = [round(float(v), 5) for v in curves[name]]
    curves.setdefault("answer.prob", [None] * len(probs))
    return rows


def measure_masked(model: Llama, tokenizer: Tokenizer, cfg: Config, pairs: int, block: int,
                   values: dict) -> None:
    """Where the operator is masked ("7 ? 8 = ") nothing can be known: does a word fire anyway?

    masked.fires  share of prompts whose top token at the trained block is some operation's word
    masked.prob   mean probability there of the likeliest of these words
    """
    problems = matched_problems(cfg, "test", pairs, "masked")
    words = list(target_ids(tokenizer, problems, "word").values())
    prompts = [tokenizer.encode_prompt(text) for text in dict.fromkeys(p.prompt for p in problems)]
    reading = read_prompts(model, prompts, [words] * len(prompts))
    top = reading.top_ids[block + 1, :, 0, 0]
    values |= {"masked.fires": float(np.isin(top, words).mean()),
               "masked.prob": float(reading.probs[block + 1, :, 0].max(-1).mean())}


def measure_prediction(rows: list[dict], values: dict) -> None:
    """Does strength before the last block tell right answers from wrong ones, in one model?

    word, answer  the operation word's, the right answer's strength (this one knows the answer)
    own           the largest probability before the last block of what the model ends up saying
    after_confidence.*  log-odds of being right for one standard deviation more, in a logistic
                  regression that also has the last block's confidence and a term for each cell
    None where fewer than five answers are right, or wrong: nothing can be said
    """
    right = np.array([r["correct"] for r in rows])
    cells = np.array([f"{r['operation']} {r['wording']}" for r in rows])
    enough = min(right.sum(), (~right).sum()) >= 5
    logit = lambda name: np.array([np.log(np.clip(r[name], 1e-9, 1) / np.clip(1 - r[name], 1e-9, 1))
                                   for r in rows])
    for name in ("word", "answer", "own", "confidence"):
        values[f"auc.{name}"] = auc_within(logit(name), right, cells) if enough else None
    for name in ("word", "own"):
        features = np.column_stack([logit(name), logit("confidence"),
                                    *(cells == c for c in np.unique(cells)[1:])])
        weight = fit_probe(features, right.astype(int), 1e-4).weight if enough else None
        values[f"after_confidence.{name}"] = float(weight[1, 0] - weight[0, 0]) if enough else None


def summarize_claims(taps: list[dict], block: int, values: dict) -> None:
    """The numbers of probe.four_claims that hypotheses name: at the trained block, and counts."""
    at, first = taps[block + 1], taps[1]
    jacobian = at["jacobian_lens"]
    values |= {
        "probe.block": at["probe"]["accuracy"]["value"], "probe.worded": at["probe"]["worded"],
        "selectivity.block": at["probe"]["selectivity"]["value"],
        "cosine.block": at["probe"]["cosine"],
        "aligned.block": at["logit_lens"]["aligned"]["value"],
        "matched.rank.block": at["logit_lens"]["rank"],
        "jacobian.aligned.block": jacobian["aligned"]["value"],
        "jacobian.rank.block": jacobian["rank"],
        "used.block": at["swaps"]["used"]["value"],
        "lens_used.block": at["swaps"]["lens_used"]["value"],
        **{f"flipped.{kind}.block": at["swaps"][kind]["flipped"]
           for kind in ("means", "lens", "rest", "random", "patch")},
        **{f"right.{kind}.block": at["swaps"][kind]["right"]
           for kind in ("means_ablated", "lens_ablated", "random_ablated")},
        "flipped.first": first["swaps"]["means"]["flipped"],
        "flipped.random.first": first["swaps"]["random"]["flipped"]}
    for claim in first["claims"]:
        values[f"blocks.{claim}"] = sum(tap["claims"][claim] for tap in taps[1:])


def measure_attribution(model: Llama, tokenizer: Tokenizer, cfg: Config, size: dict,
                        result: dict) -> None:
    """Who writes the answer: mean share of logit(answer) - logit(the other operation's answer)."""
    problems = [p for p in held_out(cfg, "test", size["swap_pairs"])
                if p.operation in ("add", "subtract")]
    prompts, targets, foils = [], [], []
    for p in problems:
        other = str(p.a - p.b if p.operation == "add" else p.a + p.b)
        ids, P = tokenizer.encode_pair(p.prompt, p.answer)
        foil, _ = tokenizer.encode_pair(p.prompt, other)
        prompts.append(ids[:P])
        targets.append(ids[P])
        foils.append(foil[P])
    names, shares = contributions(model, prompts, targets, foils)
    result["attribution"] = {n: round(float(v), 4) for n, v in zip(names, shares.mean(1))}


def trajectory(folder: Path, block: int) -> list[dict]:
    """The run on its way, from metrics.jsonl: [{step, accuracy, word, answer}] on validation."""
    points = [r for r in read_json_lines(folder / "metrics.jsonl") if "lens" in r]
    return [{"step": r["step"], "accuracy": r.get("valid_accuracy"),
             "word": r["lens"]["operation"]["top1"][block + 1],
             "answer": max(r["lens"]["answer"]["prob"][1:-1])} for r in points]
